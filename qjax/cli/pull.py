"""`qjax pull`: fetch a model ahead of time."""

from typing import Annotated

import typer


def pull(
    source: Annotated[str, typer.Argument(help="A built-in name, or org/name[:variant].")],
) -> None:
    """Download a model into the cache."""
    from qjax.checkpoint.source import resolve

    found = resolve(source)
    typer.echo(str(found.path))
    if found.license:
        typer.echo(f"license: {found.license}", err=True)


command = pull
