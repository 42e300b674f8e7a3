"""`quantize`: a matrix as rows of blocks, a run of blocks at a time on all cores."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from threading import Lock

import jax
import ml_dtypes
import numpy as np

from pallas_kernels import dispatch
from qjax.compress.algorithms.ggml import few_values, grids, k_quants, simple
from qjax.errors import UnsupportedError
from qjax.qtypes import QTYPES

_ENCODERS: dict[str, Callable] = (
    simple.ENCODERS | k_quants.ENCODERS | few_values.ENCODERS | grids.ENCODERS
)
_PLAIN = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}

MADE = (*_PLAIN, *_ENCODERS)
"""The types that floats can be made into."""

_RUN = 1 << 16  # weights of one call
# Weights searched at once: what the search keeps of them stays in the caches of a core.
_AT_ONCE = 1 << 14
_AT_ONCE_GRID = (
    1 << 12
)  # of the types with grids, for each vector of which XLA keeps all candidates
# float16 holds the scales, and a block's largest magnitude is at least this many of them.
_LARGEST = 65504.0


def quantize(w: np.ndarray, qtype: str, importance: np.ndarray | None = None) -> np.ndarray:
    """Encodes a matrix, or one for each expert.

    Args:
      w: float [..., N, K].
      qtype: one of `MADE`.
      importance: float [K] or [..., K] (one for each expert): of each input column, at least 0;
        None takes all as equal.

    Returns:
      uint8 [..., N, row_bytes].

    Raises:
      UnsupportedError: the type is not made here, or K is no whole number of its blocks.
      ValueError: a weight is not finite or too large for float16, or the importance is negative,
        not finite, or of another length.
    """
    if qtype not in MADE:
        raise UnsupportedError(
            f"{qtype}: floats cannot be made into this type; these can: {', '.join(MADE)}"
        )
    kind = QTYPES[qtype]
    *leading, n, k = w.shape
    if k % kind.block_elements:
        raise UnsupportedError(
            f"{qtype}: rows of {k} are not whole blocks of {kind.block_elements}"
        )
    w = np.ascontiguousarray(w, np.float32)
    largest = np.abs(w).max(initial=0)
    if not np.isfinite(largest):
        raise ValueError(f"{qtype}: a weight is not finite")
    if largest > _LARGEST and qtype not in ("f32", "bf16"):
        raise ValueError(f"{qtype}: a weight of {largest:.6g} is too large for float16")
    if qtype in _PLAIN:
        return np.ascontiguousarray(w.astype(_PLAIN[qtype])).view(np.uint8)
    weights = _importance(importance, tuple(leading), k, qtype)
    elements = kind.block_elements
    blocks = w.reshape(-1, elements)
    weights = weights.reshape(-1, k // elements, elements)
    encoded = _encode(blocks, weights, n, qtype)
    return encoded.reshape(*leading, n, k // elements * kind.block_bytes)


def _importance(
    importance: np.ndarray | None, leading: tuple[int, ...], k: int, qtype: str
) -> np.ndarray:
    """float32 [matrices or 1, K], with mean 1; none is 0, so that no code is left to chance."""
    if importance is None:
        return np.ones((1, k), np.float32)
    importance = np.asarray(importance, np.float64)
    if importance.shape not in ((k,), (*leading, k)):
        raise ValueError(f"{qtype}: importance of shape {importance.shape} for {k} columns")
    if not np.isfinite(importance).all() or (importance < 0).any():
        raise ValueError(f"{qtype}: the importance of a column is negative or not finite")
    importance = importance.reshape(-1, k)
    mean = importance.mean(-1, keepdims=True)
    relative = np.where(mean > 0, importance / np.where(mean > 0, mean, 1), 1)
    return np.maximum(relative, 1e-6).astype(np.float32)


def compile_ahead(kinds: Iterable[tuple[str, tuple[int, ...]]]) -> None:
    """Has the programs for types and shapes [..., N, K] compiled, side by side, while other work
    goes on."""
    for qtype, shape in kinds:
        if qtype in _ENCODERS:
            elements = QTYPES[qtype].block_elements
            _program(qtype, _run(math.prod(shape[-2:]) // elements, elements))


def _run(count: int, elements: int) -> int:
    """How many blocks of a matrix are encoded by one call."""
    return min(_RUN // elements, 1 << (count - 1).bit_length())


def _program(qtype: str, count: int) -> Future[Callable]:
    """What encodes `count` blocks; compiled once for all who ask for the same kernels."""
    key = qtype, count, dispatch.named()
    with _ASKING:
        if key not in _PROGRAMS:
            _PROGRAMS[key] = _COMPILERS.submit(copy_context().run, _compiled, qtype, count)
        return _PROGRAMS[key]


_PROGRAMS: dict[tuple[str, int, str | None], Future[Callable]] = {}
_ASKING = Lock()
_COMPILERS = ThreadPoolExecutor(os.cpu_count() or 1, "qjax-compile")


def _compiled(qtype: str, count: int) -> Callable:
    """Encodes `count` blocks, some at a time."""
    most = _AT_ONCE_GRID if qtype in grids.ENCODERS else _AT_ONCE
    elements = QTYPES[qtype].block_elements
    each = min(count, most // elements)

    @jax.jit
    def encode(blocks: jax.Array, weights: jax.Array) -> jax.Array:
        runs = (a.reshape(-1, each, a.shape[-1]) for a in (blocks, weights))
        made = jax.lax.map(lambda run: _ENCODERS[qtype](*run), tuple(runs))
        return made.reshape(count, -1)

    encode(*np.zeros((2, count, elements), np.float32))  # compiles
    return encode


def _encode(blocks: np.ndarray, weights: np.ndarray, n: int, qtype: str) -> np.ndarray:
    """uint8 [all blocks, bytes] of blocks [all, elements]; weights [matrices or 1, blocks of a row,
    elements] go with each of n rows."""
    count, elements = blocks.shape
    run = _run(count, elements)
    program = _program(qtype, run).result()
    encoded = np.empty((count, QTYPES[qtype].block_bytes), np.uint8)
    per_row = weights.shape[1]

    def encode(start: int) -> None:
        stop = min(start + run, count)
        index = np.arange(start, start + run)
        matrix = np.minimum(index // (per_row * n), len(weights) - 1)
        part = blocks[start:stop]
        if stop - start < run:
            part = np.concatenate([part, np.zeros((run - len(part), elements), np.float32)])
        made = program(part, weights[matrix, index % per_row])
        encoded[start:stop] = np.asarray(made)[: stop - start]

    with ThreadPoolExecutor(os.cpu_count() or 1, "qjax-quantize") as pool:
        list(pool.map(encode, range(0, count, run)))
    return encoded
