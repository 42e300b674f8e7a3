import ml_dtypes
import numpy as np
import pytest

from qjax.errors import CheckpointError, UnsupportedError
from qjax.formats import deepspeedfp
from tests.formats.stored import MODULE, planned, quantization, weight_of, whole

CONFIG = {"quant_method": "deepspeedfp", "bits": 8, "group_size": 64}
SMALL = {
    4: (ml_dtypes.float4_e2m1fn, 6),
    6: (ml_dtypes.float6_e3m2fn, 28),
    8: (ml_dtypes.float8_e4m3fn, 448),
}


def rounded(dense, group, bits):
    """float64, from runs of the flattened weight that ml_dtypes rounds."""
    runs = dense.reshape(-1, group).astype(np.float32)
    dtype, largest = SMALL[bits]
    scale = np.abs(runs).max(1, keepdims=True) / np.float32(largest)
    return ((runs / scale).astype(dtype).astype(np.float64) * scale).reshape(dense.shape)


@pytest.mark.parametrize("group", [16, 64, 256])
@pytest.mark.parametrize("bits", SMALL)
def test_runs_of_the_flattened_weight(bits, group):
    dense = np.random.default_rng(bits).normal(size=(16, 64)).astype(np.float16)
    layer = planned(CONFIG | {"bits": bits, "group_size": group}, {"weight": dense}, (16, 64))
    found = whole(layer, {"weight": dense})
    assert found.group == ((1, group) if group <= 64 else (4, 64))
    np.testing.assert_allclose(weight_of(found), rounded(dense, group, bits), rtol=1e-6)


def test_runs_across_rows():
    """DeepSpeed's 512 in rows of 576: parts of 64, eight of which share a scale."""
    dense = np.random.default_rng(0).normal(size=(8, 576)).astype(np.float16)
    layer = planned(CONFIG | {"group_size": 512}, {"weight": dense}, (8, 576))
    found = whole(layer, {"weight": dense})
    assert found.group == (1, 64)
    np.testing.assert_allclose(weight_of(found), rounded(dense, 512, 8), rtol=1e-6)


def test_twelve_bits():
    """e7m4: a sign, 7 bits of exponent less 63, 4 of mantissa."""
    dense = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    layer = planned(CONFIG | {"bits": 12}, {"weight": dense}, (4, 64))
    found = weight_of(whole(layer, {"weight": dense}))
    largest = np.float32((2 - 2.0**-4) * 2.0**64)
    scale = (np.abs(dense).max(1, keepdims=True) / largest).astype(np.float64)
    step = np.exp2(np.floor(np.log2(np.abs(dense / scale))) - 4)
    np.testing.assert_allclose(found, np.round(dense / scale / step) * step * scale, rtol=1e-6)


@pytest.mark.parametrize("bits", [4, 6, 8, 12])
def test_every_code_and_every_tie(bits):
    """Each number of a type is its own nearest; half way it is the one with an even code."""
    qtype, sign = deepspeedfp.QTYPES[bits], 1 << (bits - 1)
    top = {4: 7, 6: 31, 8: 126, 12: 2047}[bits]
    exponent_bits = {4: 2, 6: 3, 8: 4, 12: 7}[bits]
    mantissa_bits = bits - 1 - exponent_bits
    codes = np.arange(top + 1)
    exponent, mantissa = codes >> mantissa_bits, codes % (1 << mantissa_bits) / 2.0**mantissa_bits
    values = np.exp2(np.maximum(exponent, 1) - (2.0 ** (exponent_bits - 1) - 1))
    values = (values * (mantissa + (exponent > 0))).astype(np.float32)
    np.testing.assert_array_equal(deepspeedfp.nearest(values, qtype), codes)
    np.testing.assert_array_equal(deepspeedfp.nearest(-values, qtype), codes | sign)
    ties = (values[:-1] + values[1:]) / 2
    even = codes[:-1] + codes[:-1] % 2
    np.testing.assert_array_equal(deepspeedfp.nearest(ties, qtype), even)
    np.testing.assert_array_equal(deepspeedfp.nearest(2 * values[-1:], qtype), top)


def test_zeros_stay_zeros():
    assert not weight_of(deepspeedfp.round_to(np.zeros((2, 64)), "fp6_e3m2", (1, 64))).any()


@pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head", "model.layers.0.mlp.gate"])
def test_layers_that_stay_plain(module):
    assert planned(CONFIG, {"weight": np.zeros((4, 64), np.float16)}, (4, 64), module) is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bits": 5}, UnsupportedError, "bits 5"),
        ({"group_size": 0}, CheckpointError, "group_size"),
        ({"new_key": 1}, UnsupportedError, "new_key"),
    ],
)
def test_settings_that_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        quantization(CONFIG | change)


def test_what_does_not_fit():
    with pytest.raises(UnsupportedError, match="two rows"):
        planned(CONFIG, {"weight": np.zeros((8, 72), np.float16)}, (8, 72))
    with pytest.raises(UnsupportedError, match="whole number"):
        planned(CONFIG, {"weight": np.zeros((3, 96), np.float16)}, (3, 96))
    with pytest.raises(CheckpointError, match="weight"):
        planned(CONFIG, {"weight": np.zeros((4, 64), np.int8)}, (4, 64))
    with pytest.raises(UnsupportedError, match="deepspeedfp"):
        quantization(CONFIG).encode(
            MODULE, deepspeedfp.round_to(np.ones((1, 64)), "fp8_e4m3", (1, 64))
        )
