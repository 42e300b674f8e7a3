"""`qjax eval`: what quantization costs, as perplexity or as divergence from another model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from qjax.cli import options
from qjax.errors import RequestError

app = typer.Typer(help="Measure what quantization costs.", no_args_is_help=True)


class Format(StrEnum):
    md = "md"
    json = "json"


ModelArgument = Annotated[
    str, typer.Argument(help="A built-in name, a GGUF file, a folder, or org/name[:variant].")
]
File = Annotated[Path, typer.Option("--file", "-f", help="The text, UTF-8.")]
Window = Annotated[int, typer.Option("--window", "-c", help="Tokens of a window.")]
MaxWindows = Annotated[
    int | None, typer.Option("--max-windows", help="Only so many, from the start of the text.")
]
Output = Annotated[Format, typer.Option("--output", "-o", help="md or json.")]


@app.command()
def ppl(
    model: ModelArgument,
    file: File,
    window: Window = 512,
    max_windows: MaxWindows = None,
    numerics: options.NumericsOption = options.Numerics.exact,
    kv_cache_dtype: options.KVCacheDtype = "auto",
    kv_cache_dtype_skip_layers: options.KVCacheSkipLayers = None,
    output: Output = Format.md,
) -> None:
    """Perplexity of a text, as llama-perplexity counts it."""
    import qjax
    from qjax import evaluate

    text = _read(file)
    found = evaluate.perplexity(
        qjax.load(model),
        text,
        window=window,
        max_windows=max_windows,
        numerics=numerics.value,
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_dtype_skip_layers=kv_cache_dtype_skip_layers or (),
        progress=_progress,
    )
    if output is Format.json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    typer.echo(
        f"perplexity {found.value:.4f} ± {found.error:.4f} ({found.tokens} tokens, "
        f"{found.windows} windows of {found.window})"
    )


@app.command()
def kld(
    base: ModelArgument,
    models: Annotated[list[str], typer.Argument(help="What is compared with it, one or more.")],
    file: File,
    window: Window = 512,
    max_windows: MaxWindows = None,
    numerics: options.NumericsOption = options.Numerics.exact,
    kv_cache_dtype: options.KVCacheDtype = "auto",
    kv_cache_dtype_skip_layers: options.KVCacheSkipLayers = None,
    output: Output = Format.md,
) -> None:
    """KL divergence of models from their base, on a text; numerics and cache are the models'."""
    import qjax
    from qjax import evaluate

    text = _read(file)
    params = qjax.load(base)
    exactly = evaluate.reference(
        params, text, window=window, max_windows=max_windows, progress=_progress
    )
    found = {
        model: evaluate.divergence(
            exactly,
            params if model == base else qjax.load(model),
            numerics=numerics.value,
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_dtype_skip_layers=kv_cache_dtype_skip_layers or (),
            progress=_progress,
        )
        for model in models
    }
    if output is Format.json:
        rows = [{"model": model, **asdict(one)} for model, one in found.items()]
        typer.echo(json.dumps(rows, indent=2))
    else:
        typer.echo(evaluate.divergence_table(base, found))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read the text {file}: {error}") from error


def _progress(windows: Iterable[Any]) -> Iterator[Any]:
    from tqdm import tqdm

    return iter(tqdm(windows, desc="windows", unit="window", leave=False))
