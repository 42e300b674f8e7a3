"""`qjax convert`: a model of one format in another, exactly where the numbers allow it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qjax.checkpoint.saver import Saved
    from qjax.params import Use

_SHOWN = 5  # of the rounded weights


def _list_formats(wanted: bool) -> None:
    if not wanted:
        return
    from qjax.checkpoint.save_plan import FORMATS

    typer.echo("\n".join(f"{name:<20}{what}" for name, what in FORMATS.items()))
    raise typer.Exit


def convert(
    source: Annotated[
        str, typer.Argument(help="A built-in name, a GGUF file, a folder, or org/name[:variant].")
    ],
    destination: Annotated[
        Path, typer.Argument(help="A new folder; of GGUF, a file that ends in .gguf.")
    ],
    format: Annotated[
        str, typer.Option("--format", "-f", help="What to write; --list-formats tells of each.")
    ],
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help="Of what is not quantized: float32, bfloat16 or float16. [as it is]"
        ),
    ] = None,
    dense: Annotated[
        list[str] | None,
        typer.Option(
            "--dense",
            help="A layer to dequantize: its name, re: and a pattern, or Embedding; repeatable.",
        ),
    ] = None,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Allow numbers to be rounded to what the format holds.")
    ] = False,
    list_formats: Annotated[
        bool,
        typer.Option(
            "--list-formats",
            help="Show the formats and what they hold.",
            callback=_list_formats,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Write a model in another format. No number changes unless that is allowed."""
    import qjax
    from qjax.checkpoint import saver

    params = qjax.load(source)
    saved = saver.save(params, destination, format, dtype=dtype, dense=dense or (), lossy=lossy)
    typer.echo("\n".join(report(saved, params.summary().total)))


def report(saved: Saved, source: Use) -> list[str]:
    """The lines to print; `source` is what the model took before."""
    before = f"{source.stored / 1e6:,.1f} MB" if source.stored else "unknown"
    lines = [
        f"wrote         {saved.folder} ({saved.method})",
        f"parameters    {saved.weights:,}",
        f"size          {saved.nbytes / 1e6:,.1f} MB, {saved.bits_per_weight:.2f} bits each; "
        f"the source's: {before}",
        f"exact         {saved.exact} tensors mean the same numbers as before",
    ]
    if saved.rounded:
        largest = sorted(saved.rounded.items(), key=lambda entry: -entry[1])
        lines.append(
            f"rounded       {len(largest)} tensors, numbers by at most {largest[0][1]:.1e} of "
            "themselves:"
        )
        lines += [f"{'':14}{name} {change:.1e}" for name, change in largest[:_SHOWN]]
        lines += [f"{'':14}..."] if len(largest) > _SHOWN else []
    return lines


command = convert
