"""The "tile16" layout of the native CPU kernels: which weights have it, and how they get it.

16 rows lie side by side, codes and scales as the file has them (native/tile.h), so that `unprepare`
gives back the file's bytes. Scales and zero points of plain codes are arrays beside the tiles,
[panels, groups of columns, 16 rows]; those of groups of 16 rows or more stay as they are.
"""

from __future__ import annotations

import mmap
import re
import threading
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pallas_kernels import native
from pallas_kernels.matmul.spec import CANONICAL, WeightArrays, WeightSpec

LAYOUT = "tile16"
ROWS = 16

# Numbers of native/scales.h.
_ELEMENTS = {
    "float32": 1,
    "float16": 2,
    "bfloat16": 3,
    "float8_e4m3fn": 4,
    "float8_e8m0fnu": 5,
    "uint8": 6,
    "int8": 7,
}
_ROUNDED = {None: 0, "float16": 1, "bfloat16": 2}
# Numbers of native/tile.h: integers with zero points and in offset binary have 100 and 110 + bits.
_SIGNED, _SIGNED_WITH_ZERO = 120, 121
_FLOATS = {"fp4_e2m1": 130, "lookup4": 132, "fp8_e4m3": 140, "fp8_e5m2": 141}
_FP4_IN_HALF_UNITS = 131
_INTEGER = re.compile(r"uint(\d)(?:b(\d+))?")


@dataclass(frozen=True)
class Kind:
    """How a kernel reads a weight.

    Attributes:
      number: of the type of its tiles.
      flip: what its bytes are xored with to become signed.
      zero_shift: what is added to its zero points.
      offset: what the codes of an additive weight are too large by.
    """

    number: int
    flip: int = 0
    zero_shift: int = 0
    offset: int = 0


def kind_of(spec: WeightSpec) -> Kind:
    """How the native kernels read a weight of this description.

    Raises:
      NotImplementedError: they do not; the reason is the message.
    """
    if spec.is_blocks:
        if spec.qtype not in native.TYPE_IDS:
            raise NotImplementedError(f"no native kernel reads weights of type {spec.qtype}")
        native.provide_grid(spec.qtype)
        return Kind(native.TYPE_IDS[spec.qtype])
    kind = _kind_of_codes(spec)
    assert spec.group is not None
    (n, k), (rows, columns) = spec.shape, spec.group
    least = ROWS if kind.number == _FP4_IN_HALF_UNITS else 2 * ROWS
    if columns < k and columns % least:
        raise NotImplementedError(f"groups of {columns} columns, no multiple of {least}")
    if 1 < rows < n and rows % ROWS:
        raise NotImplementedError(f"groups of {rows} rows, no multiple of {ROWS}")
    for dtype in (spec.scale, spec.zero_point):
        if dtype is not None and dtype not in _ELEMENTS:
            raise NotImplementedError(f"scales or zero points of type {dtype}")
    return kind


def _kind_of_codes(spec: WeightSpec) -> Kind:
    zero = spec.zero_point is not None
    if spec.qtype == "int8":
        return Kind(_SIGNED_WITH_ZERO if zero else _SIGNED)
    if spec.qtype in _FLOATS and not zero:
        assert spec.group is not None
        if spec.qtype == "fp4_e2m1" and spec.group[1] < spec.shape[1] and spec.group[1] % 32:
            return Kind(_FP4_IN_HALF_UNITS)
        return Kind(_FLOATS[spec.qtype])
    match = _INTEGER.fullmatch(spec.qtype)
    bits = int(match[1]) if match else 0
    half = int(match[2] or 0) if match else 0
    if bits == 8 and (half or zero):
        # Bytes become signed: codes are then 128 smaller.
        shift = half - 128
        if not zero:
            return Kind(_SIGNED, 128)
        return Kind(_SIGNED_WITH_ZERO, 128, 0 if spec.additive else shift, shift)
    if 2 <= bits <= 6 and zero:
        return Kind(100 + bits, 0, 0 if spec.additive else half, half)
    if 2 <= bits <= 6 and half:
        return Kind(110 + bits)
    raise NotImplementedError(f"no native kernel reads weights of type {spec.qtype}")


def require(spec: WeightSpec) -> Kind:
    """How to read a tiled weight; refuses one that is not tiled for these kernels."""
    native.require()
    kind = kind_of(spec)
    if spec.layout != LAYOUT:
        raise NotImplementedError(f"a weight in the {spec.layout!r} layout, not {LAYOUT!r}")
    return kind


def beside(spec: WeightSpec, arrays: WeightArrays) -> list[int]:
    """What native/ffi.cc wants to know of the arrays beside the tiles, in its order."""
    kind = kind_of(spec)
    group = spec.group or (1, 1)
    columns = min(group[1], -(-spec.shape[1] // 32) * 32)
    return [
        _ELEMENTS[spec.scale] if spec.scale else 0,
        _ELEMENTS[spec.zero_point] if spec.zero_point else 0,
        arrays.global_scale is not None,
        arrays.codebook is not None,
        spec.additive + 2 * _ROUNDED[spec.rounded],
        kind.zero_shift,
        kind.offset,
        group[0],
        columns,
    ]


def given(arrays: WeightArrays) -> list[Any]:
    """The arrays that there are, in the order in which the kernels take them."""
    return [array for array in arrays if array is not None]


def prepare(spec: WeightSpec, arrays: WeightArrays) -> tuple[WeightSpec, WeightArrays] | None:
    """Tiles a canonical weight [..., N, K]; None where the native kernels do not take it, be it for
    a NaN among its codes.

    The bytes are in memory of their own, which jax takes over without a copy.
    """
    try:
        library = native.require()
        kind = kind_of(spec)
    except NotImplementedError:
        return None
    n, k = spec.shape
    raw = np.ascontiguousarray(arrays.qvalue)
    lead = raw.shape[:-2]
    size = library.qjax_tile_bytes(kind.number, n, k)
    count = int(np.prod(lead))
    tiles = _arena.take(count * size)
    for expert, rows in enumerate(raw.reshape(count, -1)):
        at = tiles.ctypes.data + expert * size
        if library.qjax_pack(kind.number, rows.ctypes.data, n, k, at, kind.flip):
            return None
    tiled = arrays._replace(
        qvalue=tiles.reshape(*lead, -(-n // ROWS), -1),
        scale=_side_by_side(arrays.scale, spec),
        zero_point=_side_by_side(arrays.zero_point, spec),
    )
    return replace(spec, layout=LAYOUT), tiled


def unprepare(spec: WeightSpec, arrays: WeightArrays) -> tuple[WeightSpec, WeightArrays]:
    """The canonical weight that `prepare` was given."""
    kind, (n, k) = require(spec), spec.shape
    canonical = replace(spec, layout=CANONICAL)
    tiles = np.ascontiguousarray(arrays.qvalue)
    lead = tiles.shape[:-2]
    raw = np.zeros((*lead, *canonical.canonical_shape), np.uint8)
    library = native.require()
    count = int(np.prod(lead))
    for rows, own in zip(raw.reshape(count, -1), tiles.reshape(count, -1), strict=True):
        library.qjax_unpack(kind.number, own.ctypes.data, n, k, rows.ctypes.data, kind.flip)
    return canonical, arrays._replace(
        qvalue=raw,
        scale=_one_below_the_other(arrays.scale, spec),
        zero_point=_one_below_the_other(arrays.zero_point, spec),
    )


def _is_tiled(array: Any, spec: WeightSpec) -> bool:
    return array is not None and spec.group is not None and spec.group[0] == 1


def _side_by_side(array: Any, spec: WeightSpec) -> Any:
    """[..., N, G] -> [..., panels, G, 16], where each row has scales of its own."""
    if not _is_tiled(array, spec):
        return array
    array = np.asarray(array)
    padded = np.pad(array, [(0, 0)] * (array.ndim - 2) + [(0, -spec.shape[0] % ROWS), (0, 0)])
    panels = padded.reshape(*array.shape[:-2], -1, ROWS, array.shape[-1]).swapaxes(-1, -2)
    own = _arena.take(panels.nbytes).view(array.dtype).reshape(panels.shape)
    own[...] = panels
    return own


def _one_below_the_other(array: Any, spec: WeightSpec) -> Any:
    if not _is_tiled(array, spec):
        return array
    array = np.asarray(array)
    rows = array.swapaxes(-1, -2).reshape(*array.shape[:-3], -1, array.shape[-2])
    return np.ascontiguousarray(rows[..., : spec.shape[0], :])


class _Arena:
    """Memory for tiles and scales, cut from large blocks that the system may back by huge pages.

    They are small and read once a step from end to end: with pages of 4 KiB the processor would
    spend its time on looking up addresses. A block lives as long as one of its tiles does.
    """

    BLOCK, ALIGNMENT = 1 << 25, 64

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._block = np.empty(0, np.uint8)

    def take(self, size: int) -> np.ndarray:
        """uint8 [size] at a multiple of 64 bytes, which lets jax take it over without a copy."""
        step = -(-size // self.ALIGNMENT) * self.ALIGNMENT
        with self._lock:
            if step > self._block.size:
                self._block = _huge(max(step, self.BLOCK))
            taken, self._block = self._block[:size], self._block[step:]
        return taken


def _huge(size: int, page: int = 1 << 21) -> np.ndarray:
    """Zeroed memory that starts at a huge page. What is not written to takes no memory."""
    memory = mmap.mmap(-1, size + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    block = np.frombuffer(memory, np.uint8)
    start = -block.ctypes.data % page
    return block[start : start + size]


_arena = _Arena()
