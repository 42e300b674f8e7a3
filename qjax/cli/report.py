"""`qjax report`: which quantization of a model to use here, and what it costs, on one page."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qjax.cli import evaluate, options
from qjax.errors import RequestError

_MADE, _MEASURED = "Models that are made", "What is measured"


class Numerics(StrEnum):
    both = "both"
    exact = "exact"
    fast = "fast"


def report(
    base: evaluate.ModelArgument,
    models: Annotated[
        list[str] | None, typer.Argument(help="Quantizations of it, if there are some.")
    ] = None,
    folder: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="A folder for the page. An earlier run that was cut short goes on there.",
        ),
    ] = Path("report"),
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods",
            help="Makes quantizations of the base in 16 bits: all, or names such as "
            "fp8,int8,gptq,awq,nf4,q4_k_m; may be repeated.",
            rich_help_panel=_MADE,
        ),
    ] = None,
    calibration: options.Calibration = None,
    num_samples: Annotated[
        int,
        typer.Option("--num-samples", help="Sequences.", min=1, rich_help_panel=options.SAMPLES),
    ] = 128,
    seq_len: options.SeqLen = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            "--keep",
            help="A folder for these models; those that are there are used. By default none is "
            "kept.",
            rich_help_panel=_MADE,
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            help="A text, UTF-8; by default sentences of qjax_cloze.",
            rich_help_panel=_MEASURED,
        ),
    ] = None,
    window: evaluate.Window = 512,
    max_windows: evaluate.MaxWindows = None,
    numerics: Annotated[
        Numerics,
        typer.Option(
            "--numerics",
            help="How the text is read: with activations rounded as for speed, exactly, or both.",
            rich_help_panel=_MEASURED,
        ),
    ] = Numerics.both,
    generate: Annotated[
        int,
        typer.Option(
            "--generate",
            "-n",
            help="Tokens to decode for speed.",
            min=1,
            rich_help_panel=_MEASURED,
        ),
    ] = 64,
    batches: Annotated[
        str | None,
        typer.Option(
            "--batches",
            "-b",
            help="Sequences to decode at a time: 1,8,32. By default 1 to 128 with --methods, else "
            "1.",
            rich_help_panel=_MEASURED,
        ),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", "-r", min=1, rich_help_panel=_MEASURED)] = 3,
    history: options.History = None,
) -> None:
    """Memory, speed, perplexity and KL divergence of models beside their base, with plots."""
    import qjax
    from qjax.report import table

    names = [name.strip() for each in methods or () for name in each.split(",")]
    found = qjax.report(
        base,
        models or (),
        folder,
        methods=names,
        calibration=calibration,
        num_samples=num_samples,
        seq_len=seq_len,
        keep=keep,
        text=None if file is None else "\n\n".join(evaluate.read_documents(file)),
        text_name="" if file is None else file.name,
        window=window,
        max_windows=max_windows,
        numerics=numerics.value,
        generate=generate,
        batches=None if batches is None else _numbers(batches),
        repeats=repeats,
        history=history,
        progress=evaluate.progress,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    typer.echo(table(found))
    typer.echo(f"\n{folder / 'report.md'}")


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise RequestError(f"--batches: {text!r:.80} is no list of numbers such as 1,8,32.")
    return [int(part) for part in parts]


command = report
