"""`qjax doctor`: what qjax found on this machine, what is wrong with it, and what to do."""

import json
from dataclasses import asdict
from typing import Annotated

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what qjax found on this machine, and what to do about faults; 1 where there are any."""
    from qjax import doctor

    found = doctor.examine(doctor.here())
    if as_json:
        typer.echo(json.dumps({**asdict(found), "faults": found.faults}, indent=2))
        raise typer.Exit(int(found.faults > 0))
    for name, value in found.facts:
        typer.echo(f"{name:<14}{value}")
    for op, name in found.kernels.items():
        typer.echo(f"{'kernel':<14}{op}: {name}")
    for each in found.findings:
        typer.echo(f"\n{'fault' if each.fault else 'note':<7}{each.name}: {each.what}.")
        typer.echo(f"{'':7}{each.do}.")
    typer.echo(
        f"\n{found.faults or 'No'} fault{'' if found.faults == 1 else 's'} found."
        + ("" if found.faults else " `qjax methods` shows what runs each kind of weight.")
    )
    raise typer.Exit(int(found.faults > 0))


command = doctor
