"""`qjax tune`: which block sizes and implementations are fastest on this device."""

from typing import Annotated

import typer

from qjax.cli.bench_kernels import known, shape


def tune(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Of whose weights; as for `generate`.")
    ] = None,
    kinds: Annotated[
        list[str] | None, typer.Option("--kinds", help="Of weights, without a model.")
    ] = None,
    shapes: Annotated[
        list[str] | None, typer.Option("--shapes", help="N x K of weights, as 4096x14336.")
    ] = None,
    rows: Annotated[list[int] | None, typer.Option("--rows", min=1)] = None,
    implementation: Annotated[
        list[str] | None, typer.Option("--implementation", help="By name; may be repeated.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option("--budget", help="Seconds after which no case begins.", min=1)
    ] = None,
) -> None:
    """Measure kernels on this device and keep what is fastest, for models that run later.

    The fastest may be another one for another number of rows: with such a table, the last bits of
    a sequence's numbers depend on how many run beside it.
    """
    if (model is None) == (kinds is None) or (kinds is None) != (shapes is None):
        raise typer.BadParameter("give --model, or --kinds with --shapes")
    import qjax
    from pallas_kernels import platform, tuning
    from qjax import tune as tuner
    from qjax.bench.weights import KINDS

    counts = tuple(rows or tuner.ROWS)
    if model is not None:
        wanted = tuner.of_model(qjax.load(model), counts)
    else:
        known("--kinds", kinds, list(KINDS))
        wanted = tuner.of_shapes(kinds or (), [shape(text) for text in shapes or ()], counts)
    entered = tuner.run(wanted, implementations=implementation or (), budget_seconds=budget)
    path = tuning.user_table(platform.device().name)
    typer.echo(f"{len(entered)} measurements in {path}")


command = tune
