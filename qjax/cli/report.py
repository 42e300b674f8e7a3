"""`qjax report`: what quantizations of a model cost and bring, on one page."""

from pathlib import Path
from typing import Annotated

import typer

from qjax.cli import evaluate, options


def report(
    base: evaluate.ModelArgument,
    models: Annotated[list[str], typer.Argument(help="Quantizations of it, one or more.")],
    folder: Annotated[Path, typer.Option("--output", "-o", help="A folder for the page.")],
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="A text, UTF-8; by default sentences of qjax_cloze."),
    ] = None,
    window: evaluate.Window = 512,
    max_windows: evaluate.MaxWindows = None,
    numerics: options.NumericsOption = options.Numerics.exact,
    generate: Annotated[
        int, typer.Option("--generate", "-n", help="Tokens to decode for speed.", min=1)
    ] = 64,
    repeats: Annotated[int, typer.Option("--repeats", "-r", min=1)] = 3,
) -> None:
    """Memory, speed, perplexity and KL divergence of models beside their base, with plots."""
    import qjax
    from qjax.report import table

    found = qjax.report(
        base,
        models,
        folder,
        text=None if file is None else "\n\n".join(evaluate.read_documents(file)),
        text_name="" if file is None else file.name,
        window=window,
        max_windows=max_windows,
        numerics=numerics.value,
        generate=generate,
        repeats=repeats,
        progress=evaluate.progress,
    )
    typer.echo(table(found))
    typer.echo(f"\n{folder / 'report.md'}")


command = report
