"""Marlin checkpoints: symmetric integers already laid out for the Marlin kernels of NVIDIA GPUs.

The order of codes is that in which a warp loads tiles of 16 x 16 for the tensor cores (Frantar et
al., arXiv 2408.11743); here it is undone. Three kinds of names mean two layouts:

  B, s                           dense, 4 bits (AutoGPTQ's "marlin")
  B_24, s, B_meta                2:4 sparse, 4 or 8 bits ("marlin_24")
  weight_packed, scale_packed, meta   the same sparse layout in compressed-tensors ("marlin-24")

A 2:4 weight stays as small as it is stored: two codes of every four columns, and which they are.
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
from qjax.formats.history import HISTORY
from qjax.lazy import LazyArray
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
    values: Mapping[str, Any]

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
        return cls(bits, size, config)

    def layer(self, module: str, stored: Stored, shape: tuple[int, ...]) -> Layer | None:
        if "B_24" in stored:
            names = ("B_24", "s", "B_meta")
            return sparse(module, stored, shape, self.bits, self.group_size, names)
        if "B" in stored:
            return _dense(module, stored, shape, self.bits, self.group_size)
        return None

    def to_config(self) -> dict[str, Any]:
        return dict(self.values)

    def encode(self, module: str, weight: QArray) -> dict[str, np.ndarray]:
        (n, k), bits = weight.shape, self.bits
        size, qtype = min(weights.columns(self.group_size, k), k), f"uint{bits}b{1 << (bits - 1)}"
        names = {qtype, f"sparse24_{qtype}"}
        if weight.qtype not in names or weight.zero_point is not None or weight.aux:
            raise UnsupportedError(
                f"{module}: Marlin of {bits} bits has no layout for {weight.qtype} weights, but "
                f"for {qtype} without zero points"
            )
        sparse = weight.qtype != qtype
        rows = k // 2 if sparse else k
        if weight.group != (1, size) or weight.qvalue.ndim != 2 or n % 64 or rows % _TILE:
            raise UnsupportedError(
                f"{module}: {(n, k)} weights in groups of {weight.group} are not tiles of 64 x "
                f"{_TILE} in groups of {(1, size)}"
            )
        return _encode_sparse(weight, bits) if sparse else _encode_dense(weight, bits)


def _dense(
    module: str, stored: Stored, shape: tuple[int, ...], bits: int, group_size: int
) -> Layer:
    n, k = shape[-2:]
    size = _check(module, stored, (n, k), bits, group_size, ("B", "s"), k)

    def decode(arrays: Arrays) -> QArray:
        def values(rows: slice, columns: slice) -> np.ndarray:
            tiles = slice(columns.start // _TILE, columns.stop // _TILE)
            words = arrays["B"][tiles, _words(rows, bits)]
            return _untile(words, columns.stop - columns.start, bits, _order(bits)).T

        packed = weights.repacked((n, k), bits, values, rows=64, columns=_TILE)
        scale = _scales(arrays["s"], _scales_order(size, k))
        return weights.coded(packed, f"uint{bits}b{1 << (bits - 1)}", (n, k), scale, (1, size))

    return Layer(("B", "s"), decode, ("workspace",))


def _encode_dense(weight: QArray, bits: int) -> dict[str, np.ndarray]:
    k = weight.shape[1]
    assert weight.group is not None
    values = codes.unpack(np.asarray(weight.qvalue), bits, k, np)
    scale = np.ascontiguousarray(np.asarray(weight.scale).T)
    return {
        "B": _tile(values.T, bits, _order(bits)),
        "s": _shuffle(scale, _scales_order(weight.group[1], k)),
    }


def _encode_sparse(weight: QArray, bits: int) -> dict[str, np.ndarray]:
    n, k = weight.shape
    assert weight.group is not None
    raw, split = np.asarray(weight.qvalue), k // 2 * bits // 8
    kept = codes.unpack(raw[:, :split], bits, k // 2, np)
    scale = np.ascontiguousarray(np.asarray(weight.scale).T)
    return {
        "B_24": _tile(kept.T, bits, _order_sparse(bits)),
        "s": scale if weight.group[1] == k else _shuffle(scale, _SCALES_SPARSE),
        "B_meta": _meta(np.ascontiguousarray(raw[:, split:]).view(np.uint16), n, k),
    }


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
    qtype = f"sparse24_uint{bits}b{1 << (bits - 1)}"

    def decode(arrays: Arrays) -> QArray:
        def read(rows: slice, _: slice) -> np.ndarray:
            words = arrays[names[0]][:, _words(rows, bits)]
            kept = _untile(words, k // 2, bits, _order_sparse(bits)).T
            count = rows.stop - rows.start
            some = arrays[names[2]][:, 2 * rows.start : 2 * rows.stop]
            places = _places(np.ascontiguousarray(some), count, k)
            if (places[..., 0] >= places[..., 1]).any():
                raise fault(meta, "does not name two of every four columns in rising order")
            parts = [codes.pack(kept, bits), codes.pack(places.reshape(count, k // 2), 2)]
            return np.concatenate(parts, axis=1)

        row = codes.row_bytes(qtype, k)
        packed = LazyArray(read, (n, row), np.dtype(np.uint8), (64, row))
        scale = _scales(arrays[names[1]], np.arange(64) if single else _SCALES_SPARSE)
        return weights.coded(packed, qtype, (n, k), scale, (1, size))

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


def _scales_order(size: int, k: int) -> np.ndarray:
    return _SCALES_SINGLE if size == k else _SCALES_GROUPED


def _words(outputs: slice, bits: int) -> slice:
    """Where the words of some outputs, runs of 64, lie in a row of tiles."""
    return slice(outputs.start * _TILE * bits // 32, outputs.stop * _TILE * bits // 32)


def _untile(words: np.ndarray, rows: int, bits: int, order: np.ndarray) -> np.ndarray:
    """Codes uint8 [rows, columns] from words of which each run of 1024 codes was shuffled."""
    stream = np.ascontiguousarray(words).view(np.uint8)
    columns = 8 * stream.shape[1] // bits // _TILE
    shuffled = codes.unpack(stream, bits, columns * _TILE, np).reshape(-1, len(order))
    values = np.empty_like(shuffled)
    values[:, order] = shuffled
    tiles = values.reshape(rows // _TILE, columns // _TILE, _TILE, _TILE)
    return tiles.transpose(0, 2, 1, 3).reshape(rows, columns)


def _tile(values: np.ndarray, bits: int, order: np.ndarray) -> np.ndarray:
    """What `_untile` undoes: int32 [rows / 16, columns * bits / 2]."""
    rows, columns = values.shape
    tiles = values.reshape(rows // _TILE, _TILE, columns // _TILE, _TILE).transpose(0, 2, 1, 3)
    shuffled = tiles.reshape(-1, len(order))[:, order].reshape(rows // _TILE, -1)
    return np.ascontiguousarray(codes.pack(shuffled, bits)).view(np.int32)


def _shuffle(scale: np.ndarray, order: np.ndarray) -> np.ndarray:
    return scale.reshape(-1, len(order))[:, order].reshape(scale.shape)


def _scales(scale: np.ndarray, order: np.ndarray) -> LazyArray:
    """Scales [G, N], shuffled in runs, in order for each output."""

    def read(outputs: slice, groups: slice) -> np.ndarray:
        some = np.asarray(scale[groups, outputs])
        shuffled = some.reshape(-1, len(order))
        values = np.empty_like(shuffled)
        values[:, order] = shuffled
        return values.reshape(some.shape).T

    return LazyArray(read, scale.shape[::-1], scale.dtype, (64, 1))


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
    words = bits.transpose(1, 3, 6, 2, 4, 0, 5).reshape(n, k // 16)  # see `_meta`
    pairs = (words[..., None] >> np.arange(0, 16, 4, dtype=np.uint16)) & 15
    return np.stack([pairs & 3, pairs >> 2], -1).reshape(n, k // 4, 2).astype(np.int64)


def _meta(words: np.ndarray, n: int, k: int) -> np.ndarray:
    """int16 [K / 32, 2 N] of words uint16 [N, K / 16] with four pairs of positions each, in the
    order that `_places` undoes."""
    bits = words.reshape(n // 64, 8, 2, 2, 2, k // 32, 2)
    return bits.transpose(5, 0, 3, 1, 4, 6, 2).reshape(k // 32, 2 * n).view(np.int16)
