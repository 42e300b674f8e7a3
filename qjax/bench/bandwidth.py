"""The bandwidth of memory, which limits decoding: what reading much of it comes to."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import platform
from qjax.bench import clock
from qjax.bench.clock import Timing

SHAPE = (1 << 16, 1 << 12)  # of float32, well beyond the caches of an accelerator


def memory_bandwidth() -> float:
    """bytes/s: of a CPU now, since other programs share its memory; of an accelerator once."""
    return of_host() if platform.device_kind() == "cpu" else _of_this_device()


def of_host(nbytes: int = 1 << 28, repeats: int = 5) -> float:
    """The most bytes/s that reading `nbytes` of memory has come to, with all cores."""
    threads = os.cpu_count() or 1
    parts = np.array_split(np.ones(nbytes // 4, np.float32), threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            start = time.perf_counter()
            list(pool.map(np.dot, parts, parts))  # of what numpy has, this reads fastest
            best = max(best, nbytes / (time.perf_counter() - start))
    return best


def of_device(shape: tuple[int, int], timing: Timing) -> float:
    """bytes/s of sums of rows of float32 of this shape, by XLA."""

    def call(x: jax.Array, w: jax.Array, state: None) -> tuple[jax.Array, None]:
        return w.sum(1) + x, state

    arrays = [jnp.ones(shape, jnp.float32) for _ in range(2)]
    operands = jnp.zeros(shape[:1]), arrays, [None] * 2
    nbytes = arrays[0].nbytes
    program = clock.program(call, *operands, nbytes / 3e12, timing)
    return nbytes / clock.seconds(program, *operands, timing)


@cache
def _of_this_device() -> float:
    return of_device(SHAPE, Timing())
