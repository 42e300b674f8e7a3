"""Weights that are rounded as they are read: a few rows at a time, what all at once would give."""

import numpy as np
import pytest

from qjax.formats import online
from qjax.formats.base import Layer
from qjax.formats.deepspeedfp import round_to
from qjax.formats.experts_int8 import per_channel
from tests.formats.stored import whole


@pytest.mark.parametrize("lead", [(), (2,)])
def test_rows_apart(lead):
    dense = np.random.default_rng(0).normal(size=(*lead, 24, 64)).astype(np.float16)
    layer = Layer(("weight",), lambda arrays: online.by_rows(arrays["weight"], per_channel))
    found = whole(layer, {"weight": dense})
    largest = np.abs(dense.astype(np.float64)).max(-1, keepdims=True)
    np.testing.assert_allclose(found.scale, largest / 127, rtol=1e-6)
    values = found.qvalue.view(np.int8) * np.asarray(found.scale, np.float64)
    assert (np.abs(values - dense) <= found.scale * 0.501).all()


def test_rows_that_share_a_scale():
    dense = np.random.default_rng(0).normal(size=(24, 64)).astype(np.float16)
    for group, times, rows in (((4, 64), 1, 4), ((1, 32), 1, 1), ((1, 64), 3, 3)):
        layer = Layer(
            ("weight",),
            lambda arrays, group=group, times=times, rows=rows: online.by_rows(
                arrays["weight"], lambda some: round_to(some, "fp4_e2m1", group, times), rows
            ),
        )
        found, at_once = whole(layer, {"weight": dense}), round_to(dense, "fp4_e2m1", group, times)
        np.testing.assert_array_equal(found.qvalue, at_once.qvalue)
        np.testing.assert_array_equal(found.scale, at_once.scale)


@pytest.mark.parametrize("lead", [(), (2,)])
def test_one_scale(lead):
    dense = np.random.default_rng(0).normal(size=(*lead, 24, 64)).astype(np.float16)
    layer = Layer(("weight",), lambda arrays: online.per_tensor(arrays["weight"], None))
    found = whole(layer, {"weight": dense})
    largest = np.abs(dense.astype(np.float64)).max((-2, -1), keepdims=True)
    np.testing.assert_allclose(found.scale, largest / 448, rtol=1e-6)
    values = np.asarray(found.dequantize(), np.float64)
    assert (np.abs(values - dense) <= np.maximum(np.abs(dense) / 16, found.scale * 2**-9)).all()
