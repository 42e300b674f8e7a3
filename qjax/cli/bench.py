"""`qjax bench`: how fast this machine runs a model; `qjax bench serve` and `kernels` beside it."""

from enum import StrEnum
from typing import Annotated

import typer

from qjax.cli import bench_kernels, bench_serve, options

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command(context_settings=bench_serve.SETTINGS)(bench_serve.command)
app.command()(bench_kernels.command)


class Format(StrEnum):
    md = "md"
    csv = "csv"
    json = "json"


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    model: options.Model = options.DEFAULT_MODEL,
    prompt: Annotated[
        list[int] | None, typer.Option("--prompt", "-p", help="Prompt lengths.", min=1)
    ] = None,
    generate: Annotated[
        int, typer.Option("--generate", "-n", help="Tokens to decode, 0 for none.", min=0)
    ] = 128,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", "-b", help="Sequences to decode.", min=1)
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", "-r", min=1)] = 5,
    numerics: options.NumericsOption = options.Numerics.fast,
    kv_cache_dtype: options.KVCacheDtype = "auto",
    output: Annotated[Format, typer.Option("--output", "-o")] = Format.md,
) -> None:
    """Measure prompt and generation speed here; or, by a subcommand, a server or single kernels."""
    if context.invoked_subcommand is not None:
        _check_unused(context)
        return
    import qjax
    from qjax import bench as benchmark

    rows = benchmark.run(
        qjax.load(model),
        prompt_lengths=tuple(prompt or (512, 2048)),
        generate=generate,
        batches=tuple(batch or (1, 8, 32)),
        repeats=repeats,
        numerics=numerics.value,
        kv_cache_dtype=kv_cache_dtype,
    )
    typer.echo(benchmark.table(rows, output.value))


def _check_unused(context: typer.Context) -> None:
    """An option of this command would mean nothing to a subcommand."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            option, command = name.replace("_", "-"), context.invoked_subcommand
            raise typer.BadParameter(f"--{option} belongs behind {command!r}, if it has one")
