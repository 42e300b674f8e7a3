"""`qjax plan`: what a model takes on devices that are not here."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from qjax.cli import processes, sizes
from qjax.cli.options import KVCacheDtype, KVCacheSkipLayers, Numerics, NumericsOption

if TYPE_CHECKING:
    from qjax.planning import Plan
    from qjax.planning.collectives import Collective
    from qjax.planning.devices import Device
    from qjax.planning.memory import Memory
    from qjax.planning.planner import Outcome
    from qjax.planning.roofline import Speed

_FIGURES = "Figures of a device"


def plan(
    source: Annotated[
        str, typer.Argument(help="A built-in name, a GGUF file, a folder, or org/name[:variant].")
    ],
    scheme: Annotated[
        str | None,
        typer.Option(
            "--scheme",
            help="As if quantized so (W4A16, Q4_K_M, UNQUANTIZED ...), by its config alone.",
        ),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(
            "--devices",
            help="So many; the best split is proposed.",
            rich_help_panel=processes.PANEL,
        ),
    ] = None,
    tensor_parallel_size: processes.TensorParallelSize = None,
    data_parallel_size: Annotated[
        int | None,
        typer.Option("--data-parallel-size", help="Copies.", rich_help_panel=processes.PANEL),
    ] = None,
    enable_expert_parallel: processes.EnableExpertParallel = False,
    all_reduce: processes.AllReduce = "float32",
    device: Annotated[
        str | None,
        typer.Option(
            "--device", help="An accelerator: H100, L4, TPU-v6e, ...", rich_help_panel=_FIGURES
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", help="Of each device: 80GiB.", rich_help_panel=_FIGURES),
    ] = None,
    bandwidth: Annotated[
        str | None,
        typer.Option(
            "--bandwidth", help="Of its memory, bytes/s: 3.35TB.", rich_help_panel=_FIGURES
        ),
    ] = None,
    peak: Annotated[
        str | None,
        typer.Option(
            "--peak", help="Of bfloat16 products, operations/s: 989t.", rich_help_panel=_FIGURES
        ),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(
            "--link", help="Between devices, bytes/s one way: 450GB.", rich_help_panel=_FIGURES
        ),
    ] = None,
    latency: Annotated[
        float | None,
        typer.Option(
            "--latency",
            help="Of a small collective, in microseconds.",
            min=0,
            rich_help_panel=_FIGURES,
        ),
    ] = None,
    max_model_len: Annotated[
        str | None,
        typer.Option("--max-model-len", help="Most tokens of prompt and output: 32k."),
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option("--max-num-seqs", help="Most sequences at a time.", min=1)
    ] = 32,
    max_num_batched_tokens: Annotated[
        int, typer.Option("--max-num-batched-tokens", help="Most tokens of a step.", min=1)
    ] = 2048,
    kv_cache_dtype: KVCacheDtype = "auto",
    kv_cache_dtype_skip_layers: KVCacheSkipLayers = None,
    numerics: NumericsOption = Numerics.fast,
    gpu_memory_utilization: Annotated[
        float,
        typer.Option("--gpu-memory-utilization", help="The share of memory that may be used."),
    ] = 0.9,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what a model takes on devices that need not be here, and how fast it can be at best."""
    from qjax.planning import plan

    if devices is None and tensor_parallel_size is None and data_parallel_size is None:
        tensor_parallel_size = 1
    found = plan(
        source,
        devices=devices,
        tensor_parallel_size=tensor_parallel_size,
        data_parallel_size=data_parallel_size,
        enable_expert_parallel=enable_expert_parallel,
        device=_device(device, memory, bandwidth, peak, link, latency),
        memory=None if memory is None else sizes.nbytes(memory, "--memory"),
        max_model_len=(
            None if max_model_len is None else sizes.tokens(max_model_len, "--max-model-len")
        ),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_dtype_skip_layers=kv_cache_dtype_skip_layers or (),
        numerics=numerics.value,
        gpu_memory_utilization=gpu_memory_utilization,
        scheme=scheme,
        all_reduce=all_reduce,
    )
    typer.echo(json.dumps(_fields(found), indent=2) if as_json else "\n".join(report(found)))


def _device(
    name: str | None,
    memory: str | None,
    bandwidth: str | None,
    peak: str | None,
    link: str | None,
    latency: float | None,
) -> "Device | None":
    """The named accelerator with figures of one's own, or one made of these; None without any."""
    from qjax.errors import RequestError
    from qjax.planning.devices import NETWORK_LATENCY, Device, device

    texts = {"memory": memory, "bandwidth": bandwidth, "peak": peak, "link": link}
    own: dict[str, float] = {
        key: sizes.nbytes(text, f"--{key}") for key, text in texts.items() if text is not None
    }
    if latency is not None:
        own["latency"] = latency * 1e-6
    if name is not None:
        return replace(device(name), **own)
    if not own.keys() - {"memory"}:
        return None
    if missing := texts.keys() - own.keys():
        raise RequestError(
            f"figures of a device of one's own: --{' and --'.join(sorted(missing))} too, or "
            "--device"
        )
    return Device(
        "own figures",
        "gpu",
        memory=own["memory"],
        bandwidth=own["bandwidth"],
        peak=own["peak"],
        link=own["link"],
        latency=own.get("latency", NETWORK_LATENCY),
        group=1 << 30,
        network=own["link"],
    )


def _fields(found: "Plan") -> dict:
    """What a plan holds, as JSON has it."""

    def outcome(each: "Outcome | None") -> dict | None:
        if each is None:
            return None
        fields = asdict(replace(each, load=None))
        del fields["load"]
        fields["split"] |= {"devices": each.split.devices, "flags": each.split.flags}
        fields["memory"] |= {"total": each.memory.total, "fits": each.memory.fits}
        for row, one in zip(fields["speeds"], each.speeds, strict=True):
            row |= {"seconds": one.seconds, "bound": one.bound}
        for row, one in zip(fields["collectives"], each.collectives, strict=True):
            row |= {"sent": one.moved(1)}
        return fields

    return {
        "source": found.source,
        "device": None if found.device is None else asdict(found.device),
        "outcome": outcome(found.outcome),
        "others": [outcome(each) for each in found.others],
        "refused": list(found.refused),
        "smallest": outcome(found.smallest),
    }


def report(found: "Plan") -> list[str]:
    """The lines to print."""
    best = found.outcome
    name = found.device.name if found.device else "devices"
    work, dtypes = best.workload, sorted(set(best.workload.cache_dtypes))
    lines = [
        f"source        {found.source}",
        f"devices       {best.split.devices} x {name}: {best.split.flags}",
        f"load          {work.max_num_seqs} sequences of {work.max_model_len:,} tokens for each "
        f"copy of the model, cache in {' and '.join(dtypes)}",
        "",
        *_memory(best.memory),
    ]
    if not best.memory.fits:
        least = found.smallest
        advice = "more devices for a copy do not help: fewer or shorter sequences would"
        if least:
            advice = f"it would fit on {least.split.devices}: {least.split.flags}"
        lines.append(f"{'':14}{advice}")
    if best.collectives:
        lines += ["", *_collectives(best.collectives)]
    if best.speeds:
        lines += ["", *map("  ".join, _table(best.speeds))]
    if found.others:
        lines += ["", "other splits of as many devices:"]
        lines += [f"  {_summary(each)}" for each in found.others]
    lines += [f"  not {each}" for each in found.refused]
    return lines + [line for each in best.warnings for line in ("", f"warning: {each}")]


def _memory(memory: "Memory") -> Iterator[str]:
    yield "bytes of each device"
    for name in ("weights", "cache", "workspace", "total"):
        yield f"  {name:<12}{getattr(memory, name) / 1e6:>14,.1f} MB"
    yield f"  {'usable':<12}{memory.usable / 1e6:>14,.1f} MB"
    verdict = "fits" if memory.fits else "does not fit"
    yield (
        f"{verdict:<14}room for {memory.max_num_seqs:,} sequences of this length, "
        f"{memory.max_tokens:,} tokens in all"
    )


def _collectives(found: "tuple[Collective, ...]") -> Iterator[str]:
    yield f"{'a decode step tells':<30}{'times':>6}{'bytes of each':>15}{'a device sends':>16}"
    for each in found:
        name = f"{each.kind}, {each.of}"
        sent = f"{each.nbytes:>15,}{each.moved(1):>16,.0f}"
        yield f"  {name:<28}{each.count:>6}{sent} a {each.per}"


def _table(speeds: "tuple[Speed, ...]") -> Iterator[tuple[str, ...]]:
    yield (
        f"{'at best':<8}",
        *(f"{'sequences':>9}", f"{'tokens':>7}", f"{'context':>8}"),
        *(f"{'ms':>9}", f"{'of it telling':>13}", f"{'tokens/s':>10}", "bound by"),
    )
    for each in speeds:
        yield (
            f"{each.phase:<8}",
            *(f"{each.sequences:>9}", f"{each.tokens:>7,}", f"{each.context:>8,}"),
            *(f"{each.seconds * 1e3:>9.3f}", f"{each.telling / each.seconds:>13.0%}"),
            *(f"{each.tokens_per_second:>10,.0f}", each.bound),
        )


def _summary(each: "Outcome") -> str:
    memory = each.memory
    verdict = "fits" if memory.fits else "does not fit"
    fast = f", {each.best_decode:,.0f} tokens/s at best" if each.speeds else ""
    return f"{each.split.flags}: {memory.total / 1e6:,.1f} MB, {verdict}{fast}"


command = plan
