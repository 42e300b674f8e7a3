"""Arrays that are made when they are read, against numpy's."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.lazy import LazyArray, as_bytes, stack

WHOLE = np.arange(3 * 10 * 14, dtype=np.int16).reshape(3, 10, 14)


def blocks(units):
    """The array, made in blocks that begin at multiples of `units`."""

    def read(lead, rows, columns):
        for here, unit, length in zip((rows, columns), units, WHOLE.shape[1:], strict=True):
            assert here.start % unit == 0
            assert here.stop % unit == 0 or here.stop == length
        return WHOLE[lead, rows, columns]

    return LazyArray(read, WHOLE.shape, WHOLE.dtype, units)


def indices(length):
    """What an axis may be indexed by, and how much of it is left."""
    slices = st.slices(length).filter(lambda s: len(range(length)[s]) > 0)
    positions = st.lists(st.integers(0, length - 1), min_size=1, max_size=length)
    return st.one_of(slices, positions.map(np.array))


@given(
    st.sampled_from([(1, 1), (4, 1), (1, 8), (3, 5), (10, 14)]),
    st.sampled_from([0, 1, 2]),
    st.data(),
)
def test_it_is_indexed_as_an_array(units, axis, data):
    lazy, array = blocks(units), WHOLE
    for _ in range(2):
        key = data.draw(indices(array.shape[axis]))
        place = {0: (key,), 1: (..., key, slice(None)), 2: (..., key)}[axis]
        lazy, array = lazy[place], array[place]
        axis = (axis + 1) % 3
    assert (lazy.shape, lazy.ndim, lazy.nbytes) == (array.shape, array.ndim, array.nbytes)
    np.testing.assert_array_equal(np.asarray(lazy), array)
    np.testing.assert_array_equal(np.asarray(as_bytes(lazy)), as_bytes(array))


def test_only_what_is_left_is_made():
    asked = []

    def read(*index):
        asked.append(index)
        return WHOLE[0][index]

    some = LazyArray(read, WHOLE.shape[1:], WHOLE.dtype, (2, 7))[..., 3:5, :][..., np.array([9, 8])]
    assert not asked
    np.testing.assert_array_equal(np.asarray(some), WHOLE[0, 3:5, [9, 8]].T)
    assert asked == [(slice(2, 6), slice(7, 14))]


def test_stacked_ones_are_read_apart():
    asked = []

    def one(i):
        return LazyArray(lambda *index: asked.append(i) or WHOLE[i][index], (10, 14), WHOLE.dtype)

    np.testing.assert_array_equal(np.asarray(stack([one(0), one(1), one(2)])[1:]), WHOLE[1:])
    assert asked == [1, 2]
    with pytest.raises(ValueError, match="same shape"):
        stack([one(0), one(1)[:5]])


def test_other_indices_are_refused():
    keys: tuple[Any, ...] = (0, np.zeros((2, 2), int), np.zeros(3, bool))
    for key in keys:
        with pytest.raises(TypeError, match="slices and positions"):
            blocks((1, 1))[key]
