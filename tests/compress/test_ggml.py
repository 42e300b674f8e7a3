"""Making GGUF's block types: layouts against decoders, errors against ggml's own."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from pallas_kernels import dispatch, unpack
from qjax.compress.algorithms.ggml import MADE, quantize
from qjax.errors import UnsupportedError
from qjax.qtypes import QTYPES

GOLDEN = Path(__file__).parents[1] / "golden"
QUANTIZED = [qtype for qtype in MADE if qtype not in ("f32", "f16", "bf16")]


@cache
def golden():
    with np.load(GOLDEN / "gguf_quants.npz") as file:
        return dict(file)


def decoded(raw, qtype):
    return unpack.dequantize(raw, qtype, np).astype(np.float64)


@pytest.mark.parametrize("qtype", QUANTIZED)
def test_error_is_no_more_than_that_of_ggml(qtype):
    w, importance = golden()["w"], golden()["importance"]
    for key, given in (("plain", None), ("importance", importance)):
        if f"{qtype}/{key}" not in golden():
            continue
        weights = np.ones(w.shape[1]) if given is None else given.astype(np.float64)
        ours, theirs = (
            (weights * np.square(decoded(raw, qtype) - w)).sum()
            for raw in (quantize(w, qtype, given), golden()[f"{qtype}/{key}"])
        )
        assert ours <= theirs * (1 + 1e-6)


@pytest.mark.parametrize("qtype", QUANTIZED)
def test_what_a_type_can_hold_is_held(qtype):
    """Blocks that ggml made are numbers of the type: made again, hardly anything is lost."""
    values = decoded(golden()[f"{qtype}/importance"], qtype).astype(np.float32)
    again = decoded(quantize(values, qtype), qtype)
    lost = np.square(again - values).sum() / np.square(values).sum()
    assert lost < {"q2_k": 3e-3, "q3_k": 1e-3}.get(qtype, 3e-4)


@pytest.mark.parametrize("qtype", QUANTIZED)
def test_odd_blocks(qtype):
    """Of nothing, of one number, of one sign, of three values, very small and very large."""
    rng = np.random.default_rng(5)
    w = rng.standard_normal((16, 512)).astype(np.float32)
    w[0], w[1] = 0, 0.3
    w[2], w[2, 7] = 0, -5
    w[3] = rng.integers(-1, 2, 512) * 0.05
    w[4], w[5], w[6] = w[4] * 1e-30, w[5] * 1e-6, w[6] * 1e4
    values = decoded(quantize(w, qtype), qtype)
    assert np.isfinite(values).all()
    assert not values[0].any()
    error = np.square(values - w).sum(1) / np.maximum(np.square(w.astype(np.float64)).sum(1), 1e-99)
    assert error.max() <= 1
    if qtype in ("q4_0", "q5_0", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "tq1_0", "tq2_0"):
        assert error[2] < 1e-5
        assert error[3] < 1e-5


@pytest.mark.parametrize("qtype", ["f32", "f16", "bf16"])
def test_plain(qtype):
    with np.load(GOLDEN / "gguf_blocks.npz") as file:
        raw, values = file[f"{qtype}/raw"], file[f"{qtype}/values"]
    np.testing.assert_array_equal(quantize(values, qtype), raw)


def test_experts_have_importances_of_their_own():
    w = golden()["w"].reshape(2, 8, 512)
    importance = np.stack([golden()["importance"], golden()["importance"][::-1]])
    both = quantize(w, "q4_0", importance)
    assert both.shape == (2, 8, QTYPES["q4_0"].row_bytes(512))
    for expert in range(2):
        alone = quantize(w[expert], "q4_0", importance[expert])
        np.testing.assert_array_equal(both[expert], alone)


@pytest.mark.parametrize("name", ["xla", "ref"])
def test_a_named_implementation_searches(name):
    with dispatch.use(name):
        quantize(golden()["w"][:2, :256], "iq3_xxs")
    assert dispatch.chosen()["nearest iq3_xxs"][0] == name


def test_a_coarser_grid_stays_on_it():
    """Numbers of q4_1 in q5_1, whose steps are halves of theirs."""
    values = decoded(golden()["q4_1/plain"], "q4_1").astype(np.float32)
    again = decoded(quantize(values, "q5_1"), "q5_1")
    assert np.square(again - values).sum() < 1e-6 * np.square(values).sum()


def test_columns_of_no_importance():
    w = golden()["w"][:8]
    importance = np.zeros(512)
    importance[::2] = 1
    raw = quantize(w, "q4_0", importance)
    counted = np.square(decoded(raw, "q4_0") - w)[:, ::2].sum()
    assert counted < np.square(decoded(quantize(w, "q4_0"), "q4_0") - w)[:, ::2].sum()
    np.testing.assert_array_equal(quantize(w, "q4_0", np.zeros(512)), quantize(w, "q4_0"))


@pytest.mark.parametrize(
    ("change", "qtype", "message"),
    [
        ({}, "q9_9", "these can: f32"),
        ({"w": np.zeros((2, 576))}, "q4_k", "rows of 576 are not whole blocks of 256"),
        ({"w": np.full((1, 256), np.nan)}, "q4_k", "not finite"),
        ({"w": np.full((1, 256), 1e5)}, "q8_0", "too large for float16"),
        ({"importance": np.ones(3)}, "q4_k", "shape"),
        ({"importance": -np.ones(256)}, "q4_k", "negative"),
    ],
)
def test_refusals(change, qtype, message):
    arguments = {"w": np.zeros((1, 256)), "importance": None} | change
    with pytest.raises((ValueError, UnsupportedError), match=message):
        quantize(arguments["w"], qtype, arguments["importance"])
