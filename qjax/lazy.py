"""Arrays of a weight on the host that are made when they are read, and only what is left of them.

Between the file and the device a weight is taken apart several times: by the format that decodes
it, out of a joined layer, into the order of another convention, into the pieces of a mesh. Each
step only says which rows and columns remain; these are then read, and nothing else is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import Any

import numpy as np

Along = range | np.ndarray
Index = slice | np.ndarray
Key = Index | EllipsisType


@dataclass(frozen=True, eq=False)
class LazyArray:
    """An array whose values are made when numpy asks for them (`np.asarray`).

    It is indexed by slices and by arrays of positions, one to an axis, and gives what numpy would.

    Attributes:
      read: makes a block of it, of one slice (start and stop alone) for each axis.
      whole: shape that `read` makes blocks of.
      dtype: of its values.
      units: blocks begin, and end but for the last, at multiples of these, in the last two axes.
      left: what remains of each axis of `whole`, in order.
    """

    read: Callable[..., Any]
    whole: tuple[int, ...]
    dtype: np.dtype
    units: tuple[int, int] = (1, 1)
    left: tuple[Along, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", np.dtype(self.dtype))
        if not self.left:
            object.__setattr__(self, "left", tuple(map(range, self.whole)))

    @classmethod
    def of(cls, array: Any) -> LazyArray:
        """An array of at least two axes that is there already; itself, if it is lazy."""
        if isinstance(array, cls):
            return array
        return cls(lambda *index: array[index], array.shape, array.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(len, self.left))

    @property
    def ndim(self) -> int:
        return len(self.whole)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self.left[0])

    def __getitem__(self, key: Key | tuple[Key, ...]) -> LazyArray:
        keys = list(key) if isinstance(key, tuple) else [key]
        rest = slice(None)
        at = next((i for i, each in enumerate(keys) if each is Ellipsis), len(keys))
        keys[at : at + 1] = [rest] * (self.ndim - len(keys) + (at < len(keys)))
        left = tuple(_taken(here, key) for here, key in zip(self.left, keys, strict=True))
        return replace(self, left=left)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        units = (*(1 for _ in self.whole[:-2]), *self.units)
        spans = [
            _span(here, unit, length)
            for here, unit, length in zip(self.left, units, self.whole, strict=True)
        ]
        block = np.asarray(self.read(*spans))
        for axis, (here, span) in enumerate(zip(self.left, spans, strict=True)):
            inside = _less(here, span.start)
            block = block[(slice(None),) * axis + (inside,)]
        return np.array(block, dtype, copy=copy)


def _taken(here: Along, key: Any) -> Along:
    """What an index leaves of an axis."""
    if isinstance(key, slice):
        return here[key]
    positions = np.asarray(key)
    if positions.ndim != 1 or positions.dtype.kind not in "iu":
        raise TypeError(f"a lazy array is indexed by slices and positions, not by {key!r:.80}")
    return np.asarray(here)[positions]


def _span(here: Along, unit: int, length: int) -> slice:
    """The shortest slice of whole units that these positions lie in."""
    if len(here) == 0:
        return slice(0, 0)
    low, high = int(np.min(here)), int(np.max(here)) + 1
    return slice(low // unit * unit, min(-(-high // unit) * unit, length))


def _less(here: Along, start: int) -> Index:
    if isinstance(here, range) and here.step == 1:
        return slice(here.start - start, here.stop - start)
    return np.asarray(here) - start


def stack(arrays: Sequence[Any]) -> Any:
    """Arrays of one shape, some of them lazy, with a new axis before the others.

    Raises ValueError where shapes differ.
    """
    first = arrays[0]
    alike = {(tuple(array.shape), array.dtype) for array in arrays}
    if not isinstance(first, LazyArray) or len(alike) > 1:
        return np.stack(arrays)

    def read(those: slice, *index: slice) -> np.ndarray:
        return np.stack([np.asarray(array[index]) for array in arrays[those]])

    return LazyArray(read, (len(arrays), *first.shape), first.dtype)


def as_bytes(array: Any) -> Any:
    """The bytes of an array, its rows contiguous: uint8 [..., row_bytes]; a view where they are."""
    if isinstance(array, LazyArray):
        size = array.dtype.itemsize

        def read(*index: slice) -> np.ndarray:
            *before, inside = index
            columns = slice(inside.start // size, inside.stop // size)
            return np.ascontiguousarray(array[(*before, columns)]).view(np.uint8)

        *before, last = array.shape
        return LazyArray(read, (*before, last * size), np.dtype(np.uint8), (1, size))
    contiguous = array if array.flags.c_contiguous else np.ascontiguousarray(array)
    return contiguous.view(np.uint8)
