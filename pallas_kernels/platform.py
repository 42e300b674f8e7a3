"""What the kernels run on. Asked while tracing: the answer is baked into the program."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import jax


def device_kind() -> str:
    """Kind of the device that jax puts arrays on by default: "cpu", "gpu" or "tpu"."""
    device = jax.config.jax_default_device
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
