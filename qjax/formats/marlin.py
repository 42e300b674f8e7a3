"""Marlin checkpoints: symmetric integers already laid out for the Marlin kernels of NVIDIA GPUs.

The order of codes is that in which a warp loads tiles of 16 x 16 for the tensor cores (Frantar et
al., arXiv 2408.11743); here it is undone. Three kinds of names mean two layouts:

  B, s                           dense, 4 bits (AutoGPTQ's "marlin")
  B_24, s, B_meta                2:4 sparse, 4 or 8 bits ("marlin_24")
  weight_packed, scale_packed, meta   the same sparse layout in compressed-tensors ("marlin-24")

No kernel here is sparse, so a 2:4 weight becomes a dense one of its own width in which pruned codes
mean 0. That takes 4/3 of the bytes of a sparse 4-bit layer, and 8/5 of those of an 8-bit one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import numpy as np

from pallas_kernels import codes
from qjax.errors import UnsupportedError
from qjax.formats import weights
from qjax.formats.base import (
    PLAIN,
    Arrays,
    Checkpoint,
    Keys,
    Layer,
    QuantizationConfig,
    Stored,
    expect,
    fault,
)
from qjax.formats.gptq import HISTORY
from qjax.qarray import QArray
from qjax.registry import register_quantization_config

_TILE = 16
# Columns of scales are shuffled in runs of these.
_SCALES_GROUPED = np.arange(64).reshape(8, 8).T.reshape(-1)
_SCALES_SINGLE = (2 * np.arange(4)[:, None] + [0, 1, 8, 9, 16, 17, 24, 25]).reshape(-1)
_SCALES_SPARSE = (8 * np.arange(8)[:, None] + [0, 4, 1, 5, 2, 6, 3, 7]).reshape(-1)

_COMPRESSED = ("weight_packed", "scale_packed", "meta")  # names of compressed-tensors


@register_quantization_config("marlin")
@dataclass(frozen=True)
class Marlin(QuantizationConfig):
    """Settings of one checkpoint; `group_size` is -1 where a scale serves a whole row."""

    bits: int
    group_size: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any], checkpoint: Checkpoint) -> Self:
        keys = Keys(config, checkpoint.file)
        keys.ignore(*HISTORY)
        bits = keys.choice("bits", (4, 8), 4)
        size = weights.require_group_size(keys, keys.get("group_size", int, -1))
        for name, value in (("sym", True), ("desc_act", False)):
            if keys.get(name, bool, value) != value:
                raise UnsupportedError(
                    f"{checkpoint.file}: {name} {not value} has no layout in Marlin, but {value}"
                )
        if keys.section("dynamic").values:
            raise UnsupportedError(f"{checkpoint.file}: Marlin has no `dynamic` settings of layers")
        keys.done()
        return cls(bits, size)

    def layer(self, module: str, stored: Stored, shape: tuple[int, ...]) -> Layer | None:
        if "B_24" in stored:
            names = ("B_24", "s", "B_meta")
            return sparse(module, stored, shape, self.bits, self.group_size, names)
        if "B" in stored:
            return _dense(module, stored, shape, self.bits, self.group_size)
        return None


def _dense(
    module: str, stored: Stored, shape: tuple[int, ...], bits: int, group_size: int
) -> Layer:
    n, k = shape[-2:]
    size = _check(module, stored, (n, k), bits, group_size, ("B", "s"), k)

    def decode(arrays: Arrays) -> QArray:
        values = _untile(arrays["B"], k, n, bits, _order(bits)).T
        single = size == k
        scale = _unshuffle(arrays["s"], _SCALES_SINGLE if single else _SCALES_GROUPED)
        return _weight(values, scale, (n, k), bits, size)

    return Layer(("B", "s"), decode, ("workspace",))


def sparse(
    module: str,
    stored: Stored,
    shape: tuple[int, ...],
    bits: int,
    group_size: int,
    names: tuple[str, str, str] = _COMPRESSED,
) -> Layer:
    """Plans a 2:4 sparse layer.

    Args:
      names: suffixes of the kept codes, int32 [K / 32, 16 * N * bits / 32]; of the scales
        [G, N]; and of the positions of what is kept, int16 [K / 32, 2 * N].

    Raises:
      CheckpointError: a tensor is missing, or of a wrong shape.
      UnsupportedError: another width than 4 or 8 bits.
    """
    n, k = shape[-2:]
    if bits not in (4, 8):
        raise UnsupportedError(f"{module}: 2:4 sparse weights have 4 or 8 bits, not {bits}")
    size = _check(module, stored, (n, k), bits, group_size, names[:2], k // 2)
    # compressed-tensors tells grouped scales by the number of kept inputs, not by that of all.
    single = size >= (k // 2 if names == _COMPRESSED else k)
    meta = expect(module, stored, names[2], ("i16", "u16"), (k // 32, 2 * n))

    def decode(arrays: Arrays) -> QArray:
        kept = _untile(arrays[names[0]], k // 2, n, bits, _order_sparse(bits)).T
        places = _places(np.ascontiguousarray(arrays[names[2]]), n, k)
        if (places[..., 0] >= places[..., 1]).any():
            raise fault(meta, "does not name two of every four columns in rising order")
        values = np.full((n, k // 4, 4), 1 << (bits - 1), np.uint8)
        np.put_along_axis(values, places, kept.reshape(n, k // 4, 2), -1)
        scale = arrays[names[1]]
        scale = scale if single else _unshuffle(scale, _SCALES_SPARSE)
        return _weight(values.reshape(n, k), scale, (n, k), bits, size)

    return Layer(names, decode, ("workspace",))


def _check(
    module: str,
    stored: Stored,
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    names: tuple[str, ...],
    rows: int,
) -> int:
    """Holds codes and scales against the weight's shape; the group size.

    Args:
      names: suffixes of codes and scales.
      rows: inputs whose codes are stored.
    """
    n, k = shape
    size = min(weights.columns(group_size, k), k)
    record = expect(module, stored, names[0], ("i32", "u32"))
    if n % 64 or rows % _TILE or k % size:
        raise fault(record, f"{shape} weights in groups of {size} are not tiles of 64 x {_TILE}")
    words = (rows // _TILE, n * _TILE * bits // 32)
    expect(module, stored, names[0], ("i32", "u32"), words)
    expect(module, stored, names[1], PLAIN, (k // size, n))
    return size


def _weight(
    values: np.ndarray, scale: np.ndarray, shape: tuple[int, int], bits: int, size: int
) -> QArray:
    packed = codes.pack(np.ascontiguousarray(values), bits)
    scale = np.ascontiguousarray(scale.T)
    return weights.coded(packed, f"uint{bits}b{1 << (bits - 1)}", shape, scale, (1, size))


def _untile(words: np.ndarray, rows: int, columns: int, bits: int, order: np.ndarray) -> np.ndarray:
    """Codes uint8 [rows, columns] from words of which each run of 1024 codes was shuffled."""
    stream = np.ascontiguousarray(words).view(np.uint8)
    shuffled = codes.unpack(stream, bits, columns * _TILE, np).reshape(-1, len(order))
    values = np.empty_like(shuffled)
    values[:, order] = shuffled
    tiles = values.reshape(rows // _TILE, columns // _TILE, _TILE, _TILE)
    return tiles.transpose(0, 2, 1, 3).reshape(rows, columns)


def _unshuffle(scale: np.ndarray, order: np.ndarray) -> np.ndarray:
    shuffled = scale.reshape(-1, len(order))
    values = np.empty_like(shuffled)
    values[:, order] = shuffled
    return values.reshape(scale.shape)


@cache
def _order(bits: int) -> np.ndarray:
    """int64 [1024]: which codes of four 16 x 16 tiles side by side follow each other."""
    thread = np.arange(32)
    # A thread holds rows 2t, 2t + 1, 2t + 8, 2t + 9 of a column and of the one 8 further.
    row = (2 * (thread % 4))[:, None] + [0, 1, 8, 9]
    column = (thread // 4)[:, None, None] + np.array([0, 8])[:, None]
    code = _TILE * row[:, None, :] + column
    four = code.reshape(32, 1, 8) + 256 * np.arange(4)[:, None]
    return _interleave(four.reshape(-1), bits)


@cache
def _order_sparse(bits: int) -> np.ndarray:
    """int64 [1024]: the same for the kept half of 2:4 sparse weights."""
    thread = np.arange(32)
    row = (2 * (thread % 4))[:, None] + [0, 1, 8, 9]
    column = 256 * (thread // 8) + 8 * (thread // 4 % 2)
    code = _TILE * row[:, None, :] + column[:, None, None] + np.array([0, 4])[:, None]
    four = code.reshape(32, 1, 8) + np.arange(4)[:, None]
    return _interleave(four.reshape(-1), bits)


def _interleave(order: np.ndarray, bits: int) -> np.ndarray:
    """Codes of one word, in the order in which the kernel takes them out."""
    places = [0, 2, 4, 6, 1, 3, 5, 7] if bits == 4 else [0, 2, 1, 3]
    return order.reshape(-1, len(places))[:, places].reshape(-1)


def _places(meta: np.ndarray, n: int, k: int) -> np.ndarray:
    """Which two of every four columns are kept: int64 [N, K / 4, 2].

    A 16-bit word has four pairs of positions, 2 bits each. Words are stored as CUTLASS wants them:
    of row 64 g + 8 a + 4 b + 2 c + d, word 2 h + e lies at (h, g, c, a, d, e, b).
    """
    bits = meta.view(np.uint16).reshape(k // 32, n // 64, 2, 8, 2, 2, 2)
    words = bits.transpose(1, 3, 6, 2, 4, 0, 5).reshape(n, k // 16)
    pairs = (words[..., None] >> np.arange(0, 16, 4, dtype=np.uint16)) & 15
    return np.stack([pairs & 3, pairs >> 2], -1).reshape(n, k // 4, 2).astype(np.int64)
