"""DeepSpeedFP: weights of a 16-bit checkpoint rounded to small floats as they are read.

Groups run over the flattened weight; each has a scale absmax / largest value. 8 bits are e4m3, 6
are e3m2, 4 are e2m1 and 12 are e7m4 (sign included). Unlike DeepSpeed, whose 8-bit type has no NaN
and reaches 480, the largest value of 8 bits is 448 here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Self

import numpy as np

from pallas_kernels import codes
from qjax.errors import UnsupportedError
from qjax.formats import online, weights
from qjax.formats.base import PLAIN, Checkpoint, Keys, Layer, QuantizationConfig, Stored, expect
from qjax.qarray import QArray
from qjax.registry import register_quantization_config

QTYPES = {4: "fp4_e2m1", 6: "fp6_e3m2", 8: "fp8_e4m3", 12: "fp12_e7m4"}


@register_quantization_config("deepspeedfp")
@dataclass(frozen=True)
class DeepSpeedFP(QuantizationConfig):
    """Settings: bits of a weight, and how many weights share a scale."""

    bits: int
    group_size: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any], checkpoint: Checkpoint) -> Self:
        keys = Keys(config, checkpoint.file)
        keys.ignore("quant_method")
        bits = keys.choice("bits", tuple(QTYPES), 8)
        size = keys.get("group_size", int, 512)
        if size < 1:
            raise keys.error("group_size", f"{size} is not above 0")
        keys.done()
        return cls(bits, size)

    def layer(self, module: str, stored: Stored, shape: tuple[int, ...]) -> Layer | None:
        record = expect(module, stored, "weight", PLAIN, shape)
        if not online.rounded(module):
            return None
        where, size = f"{record.file}, {module}, group_size", self.group_size
        group, times = weights.flat_group(where, shape, size)
        if shape[-2] * shape[-1] % size:
            raise UnsupportedError(f"{where}: {shape} weights are no whole number of {size}")
        qtype = QTYPES[self.bits]
        make = partial(round_to, qtype=qtype, group=group, times=times)
        rows = size // math.gcd(size, shape[-1])  # which are whole groups
        return Layer(("weight",), lambda arrays: online.by_rows(arrays["weight"], make, rows))


def round_to(dense: np.ndarray, qtype: str, group: tuple[int, int], times: int = 1) -> QArray:
    """A plain weight [..., N, K] in small floats with a scale for each group, or for as many as
    follow each other in the flattened weight.
    """
    values = np.asarray(dense, np.float32)
    runs = values.reshape(*values.shape[:-2], -1, times, group[0] * group[1])
    largest = np.abs(runs).max((-2, -1), keepdims=True)
    scale = np.where(largest > 0, largest / _magnitudes(qtype)[-1], 1).astype(np.float32)
    packed = codes.pack(
        nearest((runs / scale).reshape(values.shape), qtype), codes.CODES[qtype].bits
    )
    each = np.repeat(scale, times, axis=-2)
    return weights.coded(packed, qtype, values.shape, each, group)


@cache
def _magnitudes(qtype: str) -> np.ndarray:
    """The finite numbers of a type that are not below 0, in the order of their codes."""
    table = codes.table(qtype)
    positive = table[: len(table) // 2]
    return positive[np.isfinite(positive)]


def nearest(values: np.ndarray, qtype: str) -> np.ndarray:
    """The codes of the nearest numbers of a type; half way, of those with an even code."""
    positive = _magnitudes(qtype)
    if qtype in codes.ML_DTYPES:
        inside = np.clip(values, -positive[-1], positive[-1])
        return inside.astype(codes.ML_DTYPES[qtype]).view(np.uint8)
    magnitude = np.abs(values)
    high = np.clip(np.searchsorted(positive, magnitude), 1, len(positive) - 1)
    low_gap, high_gap = magnitude - positive[high - 1], positive[high] - magnitude
    up = (high_gap < low_gap) | ((high_gap == low_gap) & (high % 2 == 0))
    code = np.where(up, high, high - 1)
    code = np.where(magnitude >= positive[-1], len(positive) - 1, code)
    sign = 1 << (codes.CODES[qtype].bits - 1)
    return np.where(np.signbit(values), code | sign, code)
