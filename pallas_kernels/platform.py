"""What the kernels run on. Asked while tracing: the answer is baked into the program."""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import jax

from pallas_kernels import dispatch


@dataclass(frozen=True)
class Device:
    """What kernels choose by.

    Attributes:
      kind: "cpu", "gpu" or "tpu".
      name: as its maker calls it, "NVIDIA H100 80GB HBM3" or "TPU v6e"; empty where unknown.
    """

    kind: str
    name: str = ""


_assumed: ContextVar[Device | None] = ContextVar("assumed_device", default=None)


@contextmanager
def assume(kind: str | None, name: str = "") -> Iterator[None]:
    """Has implementations answer, while they are traced, as on such a `Device`; None lifts it. To
    ask what would run elsewhere, or to compile for it: what is traced so cannot be run here.
    """
    token = _assumed.set(None if kind is None else Device(kind, name))
    try:
        yield
    finally:
        _assumed.reset(token)


def device() -> Device:
    """The device that jax puts arrays on by default."""
    if (assumed := _assumed.get()) is not None:
        return assumed
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(default, str):
        return Device(default)
    if default is None:
        default = jax.devices()[0]
    kind = "gpu" if default.platform in ("cuda", "rocm") else default.platform
    return Device(kind, default.device_kind if kind != "cpu" else cpu_model())


def device_kind() -> str:
    """Kind of that device: "cpu", "gpu" or "tpu"."""
    return device().kind


def compute_capability() -> tuple[int, int] | None:
    """Of the NVIDIA GPU that jax uses here; None where it uses another device."""
    text = str(getattr(jax.devices()[0], "compute_capability", ""))
    major, _, minor = text.partition(".")
    return (int(major), int(minor or 0)) if major.isdigit() else None


def interprets(kind: str) -> bool:
    """Whether a Pallas kernel for devices of this kind is to be interpreted: on a CPU, for somebody
    who named its implementation.

    Raises:
      NotImplementedError: this device is of another kind, and nobody did.
    """
    here = device_kind()
    if here == kind:
        return False
    if here == "cpu" and dispatch.named() is not None:
        return True
    raise NotImplementedError(f"a kernel for a {kind}, and this is a {here}")


@functools.cache
def cpu_features() -> frozenset[str]:
    """Instruction set extensions of the processor as Linux names them; empty where unknown."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    return frozenset(lines[0].split(":", 1)[1].split()) if lines else frozenset()


@functools.cache
def cpu_model() -> str:
    """Name of the processor, for reports and cache keys."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = [
        line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")
    ]
    return names[0] if names else platform.machine()
