"""`qjax bench`: how fast this machine runs a model."""

from enum import StrEnum
from typing import Annotated

import typer

from qjax.cli import options


class Format(StrEnum):
    md = "md"
    csv = "csv"
    json = "json"


def bench(
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
    """Measure prompt and generation speed."""
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


command = bench
