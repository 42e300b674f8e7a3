"""`jax.jit` for programs that are large products of float32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")

# XLA would compile and time dozens of Triton kernels for each float32 product. (On an NVIDIA H200
# the statistics of a decoder layer of 576 columns took 14 s to compile so, and 1.4 s without, its
# outputs 5.9 and 0.9 s; to run, 2.4 and 2.7 ms, and 1.7 and 1.2.)
_GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def exact_jit(**settings: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: `jax.jit` with these settings, which on a GPU does not look for kernels of its
    own. Not for functions that run inside other programs, which have no options of their own."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        plain = jax.jit(function, **settings)
        on_gpu = jax.jit(function, **settings, compiler_options=_GPU_OPTIONS)

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            chosen = on_gpu if jax.default_backend() == "gpu" else plain
            return chosen(*args, **kwargs)

        return run

    return decorate
