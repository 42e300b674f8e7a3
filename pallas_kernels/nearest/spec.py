"""What is found, and the tables that the search of a grid reads."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from pallas_kernels.iq_grids import grid

# A packed entry: its digits, which say which level each of its numbers is, in the lower bits; above
# them, which entry of the grid it is.
DIGITS_BITS = 16


class Found(NamedTuple):
    """Entries of a grid.

    Attributes:
      values: float32 [..., size], the numbers of each entry.
      distance: float32 [...], from what it is nearest to.
      index: int32 [...], which entry it is.
    """

    values: Any
    distance: Any
    index: Any


class Candidates(NamedTuple):
    """The entries of a grid next to every point of the lattice that its levels span, or all.

    Attributes:
      levels: float32 [up to 16], the numbers that occur in the grid, in order.
      table: int32 packed entries: [levels ** size, near], where the first number of a point is the
        lowest digit of its index; or [1, all of them].
    """

    levels: np.ndarray
    table: np.ndarray


def digit_bits(size: int) -> int:
    """Of a packed entry of `size` numbers."""
    return DIGITS_BITS // size


def edges(levels: np.ndarray) -> np.ndarray:
    """Halfway between one level and the next."""
    return (levels[1:] + levels[:-1]) / 2


@cache
def candidates(name: str, near: int | None) -> Candidates:
    """Of a grid of `pallas_kernels.iq_grids`: so many for each point, or all for all."""
    entries = grid(name).astype(np.float32)
    count, size = entries.shape
    levels = np.unique(entries)
    assert len(levels) <= 1 << digit_bits(size)
    digits = np.searchsorted(levels, entries) << (digit_bits(size) * np.arange(size))
    packed = (digits.sum(-1) | np.arange(count) << DIGITS_BITS).astype(np.int32)
    if near is None:
        return Candidates(levels, packed[None])
    place = len(levels) ** np.arange(size)
    points = levels[np.arange(len(levels) ** size)[:, None] // place % len(levels)]
    distance = (entries * entries).sum(-1) - 2 * points @ entries.T
    nearest = np.argpartition(distance, min(near, count - 1), axis=-1)[:, :near]
    return Candidates(levels, packed[nearest])
