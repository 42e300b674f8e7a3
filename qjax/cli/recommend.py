"""`qjax recommend`: which quantization, cache and split to take, and the commands for it."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qjax.cli import sizes
from qjax.cli.options import DEFAULT_MODEL

if TYPE_CHECKING:
    from qjax.recommend import Option, Recommendation

_HARDWARE, _WORK = "Hardware", "Work"


class Goal(StrEnum):
    latency = "latency"
    throughput = "throughput"
    size = "size"


def recommend(
    model: Annotated[
        str,
        typer.Argument(
            help="A built-in name, a GGUF file, a folder, a config.json, or org/name[:variant]."
        ),
    ] = DEFAULT_MODEL,
    goal: Annotated[
        Goal,
        typer.Option(
            "--goal",
            help="The least time for a token, the most tokens a second, or the least memory.",
            rich_help_panel=_WORK,
        ),
    ] = Goal.latency,
    max_model_len: Annotated[
        str | None,
        typer.Option(
            "--max-model-len",
            help="Most tokens of a sequence, half of them prompt: 32k. Default: 4096, or the "
            "model's limit.",
            rich_help_panel=_WORK,
        ),
    ] = None,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(
            "--max-num-seqs",
            help="Sequences at a time. Default: 32 for throughput, otherwise 1.",
            min=1,
            rich_help_panel=_WORK,
        ),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance",
            help="Most KL divergence, nats a token; inf allows what was not measured.",
            min=0,
            rich_help_panel=_WORK,
        ),
    ] = 0.1,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            help="An accelerator (H100, L4, TPU-v6e ...) or cpu. Default: what is here.",
            rich_help_panel=_HARDWARE,
        ),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option("--devices", help="So many.", min=1, rich_help_panel=_HARDWARE),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", help="Of each device: 80GiB.", rich_help_panel=_HARDWARE),
    ] = None,
    gpu_memory_utilization: Annotated[
        float,
        typer.Option(
            "--gpu-memory-utilization",
            help="The share of memory that may be used.",
            rich_help_panel=_HARDWARE,
        ),
    ] = 0.9,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Take this machine's bandwidth first.", rich_help_panel=_HARDWARE
        ),
    ] = False,
    results: Annotated[
        Path | None,
        typer.Option(
            "--results",
            help="Go by this file of `python -m qjax.bench kernels --json` on such a device.",
            rich_help_panel=_HARDWARE,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Recommend a quantization, a cache and a split for a model on this or other hardware."""
    length = None if max_model_len is None else sizes.tokens(max_model_len, "--max-model-len")
    nbytes = None if memory is None else sizes.nbytes(memory, "--memory")
    if device is not None and device.lower() != "cpu":
        from qjax.planning import devices as table

        table.device(device)  # before jax is imported

    from qjax.recommend import recommend

    found = recommend(
        model,
        goal=goal.value,
        device=device,
        devices=devices,
        memory=nbytes,
        max_model_len=length,
        max_num_seqs=max_num_seqs,
        tolerance=tolerance,
        measure=measure,
        results=results,
        gpu_memory_utilization=gpu_memory_utilization,
    )
    typer.echo(json.dumps(fields(found), indent=2) if as_json else "\n".join(report(found)))
    if found.best is None:
        raise typer.Exit(1)


def fields(found: "Recommendation") -> dict:
    """What a recommendation holds, as JSON has it."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        if isinstance(value, frozenset):
            return sorted(value)
        return None if isinstance(value, float) and not math.isfinite(value) else value

    shown = asdict(found)
    speeds = shown.pop("speeds")
    shown["speeds_from"] = None if speeds is None else speeds["name"]
    whole = plain(shown)
    assert isinstance(whole, dict)
    return whole


def report(found: "Recommendation") -> Iterator[str]:
    """The lines to print."""
    from qjax.recommend import words

    hardware, device = found.hardware, found.hardware.device
    yield f"model         {found.model}"
    yield (
        f"hardware      {hardware.count} x {device.name}"
        f"{'' if hardware.architecture == device.name else f' ({hardware.architecture})'}, "
        f"{words.size(device.memory)} each, {device.bandwidth / 1e9:,.0f} GB/s"
    )
    yield (
        f"work          {found.max_num_seqs} sequences of {found.max_model_len:,} tokens, half of "
        f"them prompt; goal: {found.goal}, KL divergence of {found.tolerance:g} at most"
    )
    yield ""
    if found.best is None:
        assert found.closest is not None
        closest = found.closest
        yield (
            f"Nothing fits. Closest is {closest.name} with a cache in {closest.cache_dtype}: it "
            f"takes {words.size(closest.memory.total)} of {words.size(closest.memory.usable)} on "
            f"each device, {words.size(found.lacking)} too much."
        )
        if found.enough:
            yield f"It would fit on {found.enough} such devices."
        else:
            yield "Fewer or shorter sequences would help; more devices for a copy would not."
    else:
        yield f"take          {found.best.name}, cache in {found.best.cache_dtype}"
        yield from (f"  - {reason}" for reason in found.best.reasons)
        yield ""
        yield from (f"  {command}" for command in found.best.commands)
        yield ""
        yield from _table((found.best, *found.runners_up))
    if found.left_out:
        yield ""
        yield "left out"
        yield from (f"  {name}: {why}" for name, why in found.left_out)
    yield ""
    yield from (f"note: {note}" for note in found.notes)


def _table(options: "tuple[Option, ...]") -> Iterator[str]:
    from qjax.recommend.words import size

    rows = [
        (
            *("", "weights", "cache", "each device", "ms a token", "prompt, s", "tokens/s"),
            *("with prompts", "KL", "split"),
        )
    ]
    for each in options:
        rows.append(
            (
                f"{each.name}, {each.cache_dtype}",
                size(each.weights),
                size(each.memory.cache),
                size(each.memory.total),
                f"{each.step_seconds * 1e3:.2f}",
                f"{each.first_token_seconds:.3f}",
                f"{each.tokens_per_second:,.0f}",
                f"{each.total_tokens_per_second:,.0f}",
                "?" if each.divergence is None else f"{each.divergence:.4f}",
                each.split.flags.replace("--tensor-parallel-size", "-tp"),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        yield "  ".join([*cells, row[-1]]).rstrip()


command = recommend
