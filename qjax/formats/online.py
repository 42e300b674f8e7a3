"""Weights of a full-precision checkpoint that are rounded as they are read.

No more is rounded than a device wants of a weight, and some rows at a time: what is held in float32
is small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import ml_dtypes
import numpy as np

from qjax.formats import weights
from qjax.lazy import LazyArray
from qjax.qarray import ActSpec, QArray


def rounded(module: str) -> bool:
    """Whether a layer is rounded when a full-precision checkpoint is quantized as it is read:
    linear layers are, but not embedding, head and routers.
    """
    return not module.endswith(("embed_tokens", "lm_head", ".gate", ".router", "_expert_gate"))


def by_rows(dense: np.ndarray, make: Callable[[np.ndarray], QArray], unit: int = 1) -> QArray:
    """A plain weight [..., N, K] in another type.

    Args:
      make: rounds some rows, which depend on no others.
      unit: it gets multiples of so many rows.
    """
    *lead, n, k = dense.shape
    first = make(np.zeros((*(1 for _ in lead), unit, k), dense.dtype))  # what it becomes
    tiles, columns = first.scale.shape[-2:]
    group = unit // tiles

    @lru_cache(maxsize=1)  # for the codes, and for their scales
    def made(*bounds: tuple[int, int]) -> tuple[np.ndarray, ...]:
        *before, rows = (slice(*each) for each in bounds)
        runs = weights.runs((*before, rows, slice(0, k)), unit)
        found = [make(np.asarray(dense[(*before, run)])) for run in runs]
        pairs = zip(*((weight.qvalue, weight.scale) for weight in found), strict=True)
        return tuple(np.concatenate(arrays, axis=-2) for arrays in pairs)

    def codes(*index: slice) -> np.ndarray:
        *rows, inside = index
        return made(*((s.start, s.stop) for s in rows))[0][..., inside]

    def scales(*index: slice) -> np.ndarray:
        *before, rows, inside = index
        there = *before, slice(rows.start * group, rows.stop * group)
        return made(*((s.start, s.stop) for s in there))[1][..., inside]

    row = first.qvalue.shape[-1]
    return replace(
        first,
        qvalue=LazyArray(codes, (*lead, n, row), np.dtype(np.uint8), (unit, 1)),
        scale=LazyArray(scales, (*lead, n // group, columns), first.scale.dtype, (tiles, 1)),
        shape=(n, k),
    )


def per_tensor(dense: np.ndarray, act: ActSpec | None) -> QArray:
    """A plain weight [..., N, K] in float8_e4m3 with one scale, absmax / 448."""
    *lead, n, k = dense.shape
    top = np.float32(weights.E4M3_MAX)

    @lru_cache(maxsize=1)
    def scale_of(*bounds: tuple[int, int]) -> np.ndarray:
        before = [slice(*each) for each in bounds]
        largest = np.zeros((*(s.stop - s.start for s in before), 1, 1), np.float32)
        for run in weights.runs((*before, slice(0, n), slice(0, k))):
            values = np.abs(np.asarray(dense[(*before, run)], np.float32))
            largest = np.maximum(largest, values.max((-2, -1), keepdims=True))
        return np.where(largest > 0, largest / top, np.float32(1))

    def scales(*index: slice) -> np.ndarray:
        return scale_of(*((s.start, s.stop) for s in index[:-2]))

    def codes(*index: slice) -> np.ndarray:
        *before, _, inside = index
        scale = scales(*index)
        found = []
        for run in weights.runs(index):
            values = np.asarray(dense[(*before, run, inside)], np.float32)
            found.append(np.clip(values / scale, -top, top).astype(ml_dtypes.float8_e4m3fn))
        return np.concatenate(found, axis=-2).view(np.uint8)

    packed = LazyArray(codes, (*lead, n, k), np.dtype(np.uint8))
    scale = LazyArray(scales, (*lead, 1, 1), np.dtype(np.float32))
    return QArray(packed, "fp8_e4m3", (n, k), scale, group=(n, k), act=act)
