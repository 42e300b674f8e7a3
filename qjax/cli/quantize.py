"""`qjax quantize`: a model into fewer bits, as llama-quantize and mlx_lm.convert are called."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qjax.cli import options
from qjax.errors import RecipeError

if TYPE_CHECKING:
    from qjax.compress.modifiers import Modifier
    from qjax.compress.state import Finished
    from qjax.params import Params

_RECIPE = "What to"
_WEIGHTS = (".safetensors", ".gguf")


def quantize(
    source: Annotated[
        str, typer.Argument(help="A built-in name, a GGUF file, a folder, or org/name[:variant].")
    ],
    output: Annotated[Path, typer.Argument(help="A new folder, or a .gguf file.")],
    kind: Annotated[
        str | None, typer.Argument(metavar="[SCHEME]", help="The scheme, as --scheme.")
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            "--scheme",
            help="W4A16, W8A8, FP8_DYNAMIC, NVFP4 ..., or a GGUF type or mix such as Q4_K_M.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="rtn, mse, imatrix, gptq, awq, autoround, smoothquant, spinquant or hqq.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            help="A recipe of LLM Compressor's kind (YAML), instead.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            *("--group-size", "--q-group-size"),
            help="Columns that share a scale; -1 for a whole row.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore",
            help="A layer, or re:PATTERN, that stays as it is, beside lm_head; may be repeated.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    target_bits: Annotated[
        float | None,
        typer.Option(
            "--target-bits",
            help="Bits a weight of all layers together; those of each are chosen.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    calibration: options.Calibration = None,
    num_samples: Annotated[
        int | None,
        typer.Option("--num-samples", help="Sequences.", min=1, rich_help_panel=options.SAMPLES),
    ] = None,
    seq_len: options.SeqLen = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(
            "--imatrix",
            help="An importance matrix of llama.cpp instead of samples, for types of GGUF.",
            rich_help_panel=options.SAMPLES,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", help="Draws the samples.", rich_help_panel=options.SAMPLES)
    ] = 0,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="compressed-tensors, gptq, awq, bitsandbytes, fp8, gguf ...; else as fits.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="float32, bfloat16 or float16: what is not quantized becomes; else it stays, with "
            "float32 for what came quantized.",
        ),
    ] = None,
) -> None:
    """Quantize a model, and save it."""
    import qjax

    modifiers = _modifiers(
        kind, scheme, method, recipe, group_size, ignore, target_bits, calibration
    )
    if not any(modifier.requires_calibration_data for modifier in modifiers):
        for name, value in (
            ("--calibration", calibration),
            ("--num-samples", num_samples),
            ("--seq-len", seq_len),
        ):
            if value is not None:
                raise RecipeError(f"{name}: this recipe takes no samples; --method gptq would")
    began = time.perf_counter()
    params = qjax.load(source)
    found = qjax.oneshot(
        params,
        modifiers,
        calibration,
        output,
        num_calibration_samples=num_samples,
        max_seq_length=seq_len,
        seed=seed,
        imatrix=imatrix,
        format=format,
        dtype=dtype,
        on_layer=_report,
    )
    seconds = time.perf_counter() - began
    _summary(params, found, output, seconds)


def _report(done: Finished) -> None:
    """A line for each layer, above the bar."""
    from tqdm import tqdm

    if not done.errors:
        return
    worst = max(done.errors, key=lambda module: done.errors[module])
    text = f"{worst} {done.errors[worst]:.2e}"
    if done.index is not None:
        mean = sum(done.errors.values()) / len(done.errors)
        text = f"layer {done.index}: error {mean:.2e}, at most {text}"
    tqdm.write(text, file=sys.stderr)


def _summary(before: Params, after: Params, output: Path, seconds: float) -> None:
    """What became of the model: its weights by type, its size, and the time that it took."""
    typer.echo(f"{'type':<14}{'inputs':<10}{'tensors':>8}{'weights':>16}{'bits':>7}")
    for use in after.summary().uses:
        typer.echo(
            f"{use.qtype:<14}{use.activation or '-':<10}{use.tensors:>8}{use.weights:>16,}"
            f"{use.bits_per_weight:>7.2f}"
        )
    total, was = after.summary().total, before.summary().total
    files = (
        [output] if output.is_file() else [*output.glob("*.safetensors"), *output.glob("*.gguf")]
    )
    stored = sum(file.stat().st_size for file in files)
    typer.echo(
        f"{output}: {stored / 1e6:.1f} MB, {8 * stored / total.weights:.2f} bits a weight "
        f"(was {was.stored / 1e6:.1f} MB, {8 * was.stored / was.weights:.2f}); {seconds:.1f} s"
    )


def _modifiers(
    kind: str | None,
    scheme: str | None,
    method: str | None,
    recipe: Path | None,
    group_size: int | None,
    ignore: list[str] | None,
    target_bits: float | None,
    calibration: str | None,
) -> Sequence[Modifier]:
    """The recipe that the options come to."""
    from qjax.compress.presets import GGML
    from qjax.compress.recipe import parse
    from qjax.compress.shorthand import modifiers_for

    if kind is not None and scheme is not None:
        raise RecipeError(f"give the scheme once: {kind} or --scheme {scheme}")
    scheme = kind or scheme
    others = {
        "a scheme": scheme,
        "--method": method,
        "--group-size": group_size,
        "--ignore": ignore,
        "--target-bits": target_bits,
    }
    if recipe is not None:
        given = [name for name, value in others.items() if value is not None]
        if given:
            raise RecipeError(f"--recipe says it all: leave out {', '.join(given)}")
        return parse(recipe)
    if scheme is None:
        raise RecipeError(
            "say what to: --scheme W4A16 (with --method gptq), Q4_K_M, or --recipe FILE"
        )
    # As llama-quantize does it: what samples there are weigh the columns.
    weighed = calibration is not None and scheme.upper() in GGML
    return modifiers_for(
        scheme,
        method or ("imatrix" if weighed else "rtn"),
        group_size=group_size,
        ignore=ignore or (),
        target_bits=target_bits,
    )


command = quantize
