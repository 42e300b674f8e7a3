"""What the kernels run on. Asked while tracing: the answer is baked into the program."""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import jax

_assumed: ContextVar[str | None] = ContextVar("assumed_device", default=None)


@contextmanager
def assume(kind: str | None) -> Iterator[None]:
    """Has implementations answer, while they are traced, as on a device of this kind; None lifts
    it. To ask what would run elsewhere: what is traced so is not meant to be run.
    """
    token = _assumed.set(kind)
    try:
        yield
    finally:
        _assumed.reset(token)


def device_kind() -> str:
    """Kind of the device that jax puts arrays on by default: "cpu", "gpu" or "tpu"."""
    if (assumed := _assumed.get()) is not None:
        return assumed
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


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
