"""`qjax methods`: which quantization methods there are, and what runs them on which hardware."""

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qjax.cli.support import Kind

# What may be asked about beside this machine: name, and kind of device as the kernels know it.
HARDWARE = {
    "x86-64": "cpu",
    "Arm": "cpu",
    "NVIDIA GPU": "gpu",
    "AMD GPU": "gpu",
    "TPU": "tpu",
}
_KERNELS = {
    "native": "C++ kernel",
    "triton": "Pallas (Triton)",
    "mosaic_gpu": "Pallas (Mosaic GPU)",
    "tpu": "Pallas (TPU)",
    "xla": "XLA",
    "ref": "reference",
}


class Format(StrEnum):
    md = "md"
    json = "json"


def methods(
    everywhere: Annotated[
        bool, typer.Option("--all", help="Also other hardware than this machine.")
    ] = False,
    support: Annotated[
        bool, typer.Option("--support", help="Which methods are loaded, run and saved instead.")
    ] = False,
    output: Annotated[Format, typer.Option("--format", help="md or json.")] = Format.md,
) -> None:
    """Show the quantization methods, and what runs each kind of weight here."""
    from qjax.cli import support as table

    if support:
        typer.echo("\n".join(table.support_table()))
        return
    rows = list(entries(everywhere))
    if output is Format.json:
        typer.echo(json.dumps(rows, indent=2))
        return
    hardware = list(rows[0]["runs"])
    typer.echo(f"| method | weights | {' | '.join(hardware)} |")
    typer.echo("| --- | --- |" + " --- |" * len(hardware))
    for row in rows:
        cells = " | ".join(str(row["runs"][name]) for name in hardware)
        typer.echo(f"| {row['method']} | {row['weights']} | {cells} |")


def entries(everywhere: bool) -> list[dict]:
    """One a method and kind of weight, with what runs it by hardware."""
    from pallas_kernels import platform
    from qjax.cli import support as table

    here = this_machine()
    hardware: dict[str, str] = {here: platform.device_kind()}
    if everywhere:
        hardware |= HARDWARE
    answers: dict[tuple, str] = {}
    rows = []
    for method in table.methods():
        for kind in method.kinds:
            runs = {}
            for name, device in hardware.items():
                key = (kind.spec, kind.act, device)
                if key not in answers:
                    answers[key] = what_runs(kind, device)
                runs[name] = answers[key]
            rows.append({"method": method.name, "weights": kind.label, "runs": runs})
    return rows


def this_machine() -> str:
    from pallas_kernels import native, platform

    kind = platform.device_kind()
    if kind != "cpu":
        import jax

        return f"here ({jax.devices()[0].device_kind})"
    library, isa = native.library()
    return f"here (CPU, {isa})" if library else "here (CPU, no C++ kernels)"


def what_runs(kind: "Kind", device: str) -> str:
    """The implementation, and who rounds the inputs where the method has them rounded."""
    from pallas_kernels.matmul.supports import supports

    try:
        found = supports(kind.spec, kind.act, device)
    except NotImplementedError:
        return "not run"
    name = _KERNELS.get(found.implementation, found.implementation)
    if found.treats_inputs is None:
        return name
    return f"{name}, rounds inputs" if found.treats_inputs else f"{name}, inputs emulated"


command = methods
