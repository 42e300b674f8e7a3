"""`python -m qjax.bench kernels`: are the kernels right on this device, and how fast are they."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from qjax.cli import options


def shape(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    if not (n.isdigit() and k.isdigit() and int(n) and int(k)):
        raise typer.BadParameter(f"{text!r} is no shape: write N x K as 4096x14336")
    return int(n), int(k)


def kernels(
    json: Annotated[
        Path | None,
        typer.Option("--json", help="File of results, filled as it goes; a later run goes on."),
    ] = None,
    ops: Annotated[list[str] | None, typer.Option("--ops", help="May be repeated.")] = None,
    kinds: Annotated[
        list[str] | None, typer.Option("--kinds", help="Of weights or pages; may be repeated.")
    ] = None,
    shapes: Annotated[
        list[str] | None, typer.Option("--shapes", help="N x K of weights, as 4096x14336.")
    ] = None,
    rows: Annotated[list[int] | None, typer.Option("--rows", min=1)] = None,
    implementation: Annotated[
        list[str] | None, typer.Option("--implementation", help="By name; may be repeated.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small cases, little time.")] = False,
    budget: Annotated[
        float | None, typer.Option("--budget", help="Seconds after which no case begins.", min=1)
    ] = None,
    peer: Annotated[
        Path | None,
        typer.Option("--peer", help="Program that measures another library's products."),
    ] = None,
    history: options.History = None,
) -> None:
    """Check the kernels of this device, then measure them."""
    from qjax.bench import grid, report
    from qjax.bench import history as lines
    from qjax.bench import kernels as benchmark

    sizes = grid.QUICK if quick else grid.Grid()
    known("--ops", ops, grid.ALL_OPS)
    sizes = replace(sizes, ops=tuple(ops or sizes.ops), kinds=tuple(kinds or ()))
    of_ops = [k for op in grid.ALL_OPS for k in grid.kinds_of(op, replace(sizes, kinds=()))]
    known("--kinds", kinds, list(dict.fromkeys(of_ops)))
    sizes = replace(
        sizes,
        shapes=tuple(map(shape, shapes)) if shapes else sizes.shapes,
        rows=tuple(rows or sizes.rows),
    )
    result = benchmark.run(
        sizes,
        path=json,
        quick=quick,
        implementations=tuple(implementation or (None,)),
        budget_seconds=budget,
        peer=peer,
    )
    content = {**result.head, "rows": result.rows}
    if history is not None:
        lines.append(history, content, *lines.of_kernels(content))
    typer.echo(report.table(content))
    if failed := benchmark.failures(result):
        typer.echo("\n".join(["failed:", *failed]), err=True)
        raise typer.Exit(1)


def known(option: str, given: list[str] | None, known: Sequence[str]) -> None:
    for name in given or ():
        if name not in known:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}", param_hint=option)


command = kernels
