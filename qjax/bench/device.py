"""What a device gives: bandwidth of its memory and speed of its arithmetic, measured by XLA."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import platform
from qjax.bench import bandwidth, clock
from qjax.bench.clock import Timing

DTYPES = {"bfloat16": jnp.bfloat16, "int8": jnp.int8, "fp8_e4m3": jnp.float8_e4m3fn}
_LIBRARIES = ("qjax", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "numpy")


@dataclass(frozen=True)
class Limits:
    """bytes/s that reading memory has come to, and multiplications and additions/s by dtype."""

    bandwidth: float
    peaks: dict[str, float] = field(default_factory=dict)


def limits(timing: Timing, quick: bool = False) -> Limits:
    """Measures them; quickly, with operands too small for the fullest speed."""
    cpu = platform.device_kind() == "cpu"
    size = 512 if quick else 2048 if cpu else 8192
    guess = 2 * size**3 / (1e11 if cpu else 1e15)
    peaks = {name: _product(size, DTYPES[name], guess, timing) for name in DTYPES}
    if cpu:
        return Limits(bandwidth.of_host(1 << 26 if quick else 1 << 28), peaks)
    return Limits(bandwidth.of_device((256, 256) if quick else bandwidth.SHAPE, timing), peaks)


def _product(size: int, dtype: Any, guess: float, timing: Timing) -> float:
    """Of two square matrices; multiplications and additions a second. `guess`: seconds."""
    total = jnp.int32 if dtype == jnp.int8 else jnp.float32

    def square() -> jax.Array:
        drawn = jax.random.normal(jax.random.key(3), (size, size), jnp.float32)
        return jnp.clip(drawn * 4, -100, 100).astype(dtype)

    def call(x: jax.Array, w: jax.Array, state: None) -> tuple[jax.Array, None]:
        y = lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=total)
        return y, state

    operands = square(), [square(), square()], [None] * 2
    program = clock.program(call, *operands, guess, timing)
    return 2 * size**3 / clock.seconds(program, *operands, timing)


def description() -> dict[str, Any]:
    """The device, the versions that run on it, and the date."""
    device = jax.devices()[0]
    return {
        "device": platform.device().name,
        "kind": platform.device_kind(),
        "processors": os.cpu_count(),
        "platform_version": device.client.platform_version.splitlines()[0],
        "versions": {name: version for name in _LIBRARIES if (version := _version(name))},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
