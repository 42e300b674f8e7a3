"""What there is to run on: named, or found on this machine."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

import jax

from pallas_kernels import platform
from qjax import host_memory
from qjax.bench import bandwidth
from qjax.bench.clock import Timing
from qjax.bench.device import limits
from qjax.errors import RequestError
from qjax.planning.devices import DEVICES, NETWORK_LATENCY, Device, device
from qjax.recommend.figures import speeds_of

# Compute capabilities, by NVIDIA's list (developer.nvidia.com/cuda-gpus).
CAPABILITIES = {
    "A100-40GB": (8, 0),
    "A100-80GB": (8, 0),
    "L4": (8, 9),
    "L40S": (8, 9),
    "RTX-4090": (8, 9),
    "H100": (9, 0),
    "H200": (9, 0),
    "B200": (10, 0),
}
_GENERATIONS = ((10, 0, "Blackwell"), (9, 0, "Hopper"), (8, 9, "Ada"), (8, 0, "Ampere"),
                (7, 5, "Turing"), (0, 0, "older"))  # fmt: skip
# As jax calls them.
_TPU_KINDS = {
    "TPU v5 lite": "TPU-v5e",
    "TPU v5": "TPU-v5p",
    "TPU v6 lite": "TPU-v6e",
    "TPU7x": "TPU-v7",
}


@dataclass(frozen=True)
class Hardware:
    """Attributes:
    device: figures of one.
    count: how many.
    architecture: "Hopper", "Ampere", "CDNA3", "TPU", "CPU" ...: what shares measured figures.
    multiplies: of "int8", "fp8" and "fp4" those that its units multiply as they are.
    capability: compute capability of an NVIDIA GPU.
    reached: whether bandwidth and products were measured, and not published.
    notes: sentences: where figures come from.
    """

    device: Device
    count: int
    architecture: str
    multiplies: frozenset[str]
    capability: tuple[int, int] | None = None
    reached: bool = False
    notes: tuple[str, ...] = ()


def named(name: str, count: int, memory: int | None = None) -> Hardware:
    """A device of `qjax.planning.devices`, or "cpu": this machine's processor.

    Raises:
      RequestError: there is none of this name.
    """
    if name.lower() == "cpu":
        return _with_memory(_cpu(count), memory)
    try:
        found = device(name)
    except RequestError as error:
        raise RequestError(f"{error} This machine's processor is cpu.") from None
    return _with_memory(_hardware(found, count), memory)


def detected(count: int | None = None, memory: int | None = None) -> Hardware:
    """What jax finds here.

    Raises:
      RequestError: it has fewer devices, or none whose figures are known.
    """
    kind = platform.device_kind()
    if kind == "cpu":
        return _with_memory(_cpu(count or 1), memory)
    here = jax.devices()
    if count is not None and count > len(here):
        raise RequestError(
            f"devices must be in [1, {len(here)}] here, got {count}; name the device"
        )
    found = lookup(here[0].device_kind)
    if found is None:
        known = ", ".join(each.name for each in DEVICES)
        raise RequestError(
            f"figures of {here[0].device_kind!r} are not in the table: name the device that is "
            f"nearest to it, of {known}"
        )
    stats = here[0].memory_stats() or {}
    notes = ()
    if "bytes_limit" in stats:
        found = replace(found, memory=float(stats["bytes_limit"]))
        notes = ("memory is what jax may take of the device now",)
    whole = _hardware(found, count or len(here), platform.compute_capability())
    return _with_memory(replace(whole, notes=notes), memory)


def lookup(kind: str) -> Device | None:
    """The table's entry for a device as its maker calls it ("NVIDIA H100 80GB HBM3"), or None."""
    plain = _plain(kind)
    if "a100" in plain and "40gb" in plain:
        return device("A100-40GB")
    kinds = {_plain(kind): name for kind, name in _TPU_KINDS.items()}
    if plain in kinds:
        return device(kinds[plain])
    found = [
        (len(_plain(name)), each)
        for each in DEVICES
        for name in (each.name, *each.aliases)
        if _plain(name) in plain
    ]
    return max(found, key=lambda match: match[0])[1] if found else None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def measured(found: Hardware) -> Hardware:
    """With the bandwidth of this machine, taken now; of a GPU or TPU also its bfloat16 products.

    Raises:
      RequestError: the device is of another kind than those here.
    """
    here = platform.device_kind()
    if found.device.kind != here:
        raise RequestError(f"measure takes figures of this machine, a {here}: leave out the device")
    if here == "cpu":
        own = replace(found.device, bandwidth=bandwidth.of_host())
    else:
        took = limits(Timing())
        own = replace(found.device, bandwidth=took.bandwidth, peak=took.peaks["bfloat16"])
    kept = tuple(note for note in found.notes if not note.startswith("bandwidth"))
    note = f"bandwidth measured here just now: {own.bandwidth / 1e9:,.1f} GB/s"
    return replace(found, device=own, reached=True, notes=(*kept, note))


def _hardware(found: Device, count: int, capability: tuple[int, int] | None = None) -> Hardware:
    capability = capability or CAPABILITIES.get(found.name)
    return Hardware(found, count, *abilities(found, capability), capability)


def abilities(
    found: Device, capability: tuple[int, int] | None = None
) -> tuple[str, frozenset[str]]:
    """Its architecture, and what its units multiply.

    By vLLM's pages "Quantization" and "INT8 W8A8" (no INT8 on Blackwell), LLM Compressor's
    "Choosing the right compression scheme", and Google's page of each TPU.
    """
    if found.kind == "tpu":
        return found.name, frozenset({"fp8"} if found.name == "TPU-v7" else {"int8"})
    if found.kind == "cpu":
        return "CPU", frozenset({"int8"})
    capability = capability or CAPABILITIES.get(found.name)
    if capability is None:
        return ("CDNA3" if found.name == "MI300X" else found.name), frozenset({"fp8"})
    name = next(name for *least, name in _GENERATIONS if capability >= tuple(least))
    can = {"int8"} if (7, 5) <= capability < (10, 0) else set()
    can |= {"fp8"} if capability >= (8, 9) else set()
    can |= {"fp4"} if capability >= (10, 0) else set()
    return name, frozenset(can)


def _with_memory(found: Hardware, memory: int | None) -> Hardware:
    if memory is None:
        return found
    notes = tuple(note for note in found.notes if not note.startswith("memory"))
    return replace(found, device=replace(found.device, memory=float(memory)), notes=notes)


def _cpu(count: int) -> Hardware:
    if count != 1:
        raise RequestError(f"devices of a CPU must be 1, got {count}: its cores share the work")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = speeds_of("CPU")
    assert limit is not None
    peak = limit.peak / limit.processors * (cores or 1)
    name = platform.cpu_model()
    free = host_memory.available()
    if free is None:  # all that there is
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    here = Device(
        *("CPU", "cpu", float(free), limit.bandwidth, peak, limit.bandwidth),
        *(NETWORK_LATENCY, 1, limit.bandwidth),
    )
    notes = (
        f"memory is what is free now ({name}, {cores} cores)",
        f"bandwidth and products a core are those of {limit.name}, where kernels were measured: "
        "measuring this machine takes its own bandwidth",
    )
    return Hardware(here, 1, *abilities(here), None, True, notes)
