import ml_dtypes
import numpy as np
import pytest

from qjax.errors import CheckpointError, UnsupportedError
from tests.formats.stored import decoded, planned, quantization, weight_of, words

CONFIG = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False}
CONFIG |= {"data_type": "int", "packing_format": "auto_round:auto_gptq"}

MX = {"data_type": "mx_fp", "sym": True, "packing_format": "auto_round:llm_compressor"}
MX |= {"act_bits": 4, "act_data_type": "mx_fp", "act_dynamic": True, "act_sym": True}


def layer(bits, n, k, size, offset):
    """Tensors in GPTQ's layout, without g_idx, and the float64 weight that they mean."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 1 << bits, (n, k))
    zero = rng.integers(1, 1 << bits, (n, k // size))
    scale = rng.uniform(0.5, 2, (n, k // size)).astype(np.float16)
    tensors = {
        "qweight": np.ascontiguousarray(words(codes, bits).T),
        "qzeros": words((zero - offset).T, bits),
        "scales": np.ascontiguousarray(scale.T),
    }
    return tensors, (codes - zero.repeat(size, 1)) * scale.astype(np.float64).repeat(size, 1)


@pytest.mark.parametrize(
    ("packing", "offset"),
    [
        ("auto_round:auto_gptq", 1),
        ("auto_round:gptq", 1),
        ("auto_round", 0),
        ("auto_round:gptqmodel", 0),
    ],
)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_gptq_layouts(bits, packing, offset):
    """5, 6 and 7 bits are one stream here, not planes."""
    tensors, weight = layer(bits, 32, 64, 32, offset)
    config = CONFIG | {"bits": bits, "packing_format": packing}
    np.testing.assert_allclose(weight_of(decoded(config, tensors, (32, 64))), weight, rtol=1e-6)


# What AutoRound 0.16 packs 32 codes 0, 1, 2 ... into.
STREAMS = {
    3: "88FAC688 C688FAC6 FAC688FA",
    5: "8A418820 C5A92839 CA307B9A 38BDAB49 FFBBCDEB",
    6: "440C2040 A2481C61 3CE34C2C 544D2450 A6585D65 7DE75C6D",
    7: "40608080 880E1828 68C16284 88901E38 58A94264 668C982E 3E78E9C3",
}


@pytest.mark.parametrize("bits", STREAMS)
def test_words_of_odd_widths(bits):
    row = np.array([int(word, 16) for word in STREAMS[bits].split()], np.uint32).view(np.int32)
    tensors = {
        "qweight": np.repeat(row[:, None], 32, 1),
        "qzeros": row[None],
        "scales": np.ones((1, 32), np.float16),
    }
    config = CONFIG | {"bits": bits, "packing_format": "auto_round"}
    codes = np.arange(32) % (1 << bits)
    found = weight_of(decoded(config, tensors, (32, 32)))
    np.testing.assert_array_equal(found, codes[None] - codes[:, None])


def test_awq_layout_of_odd_widths():
    """Codes of 8 columns are interleaved as at 4 bits, then packed as one stream."""
    rng = np.random.default_rng(0)
    codes, zero = rng.integers(0, 32, (32, 64)), rng.integers(0, 32, (32, 2))
    order = np.arange(32).reshape(4, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)
    tensors = {
        "qweight": words(codes.T[:, order], 5),
        "qzeros": words(zero.T[:, order], 5),
        "scales": np.ones((2, 32), np.float16),
    }
    config = CONFIG | {"bits": 5, "packing_format": "auto_round:auto_awq"}
    found = weight_of(decoded(config, tensors, (32, 64)))
    np.testing.assert_array_equal(found, codes - zero.repeat(32, 1))


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj", r".*layers\.0\..*up_proj"])
def test_settings_of_single_layers(name):
    tensors, weight = layer(8, 32, 128, 64, 1)
    config = CONFIG | {"extra_config": {name: {"bits": 8, "group_size": 64}}}
    np.testing.assert_allclose(weight_of(decoded(config, tensors, (32, 128))), weight, rtol=1e-6)
    with pytest.raises(CheckpointError, match="qweight"):
        planned(config, tensors, (32, 128), "model.layers.1.mlp.up_proj")
    config = CONFIG | {"extra_config": {name: {"bits": 16}}}
    with pytest.raises(CheckpointError, match="16 bits"):
        planned(config, tensors, (32, 128))
    assert planned(config, {"weight": np.zeros((32, 128), np.float16)}, (32, 128)) is None


def mx(data_type, n, k):
    rng = np.random.default_rng(0)
    exponents = rng.integers(120, 130, (n, k // 32)).astype(np.uint8)
    scale = np.exp2(exponents.astype(np.float64) - 127).repeat(32, 1)
    if data_type == "mxfp8":
        values = rng.normal(size=(n, k)).astype(ml_dtypes.float8_e4m3fn)
        return {"weight": values, "weight_scale": exponents}, values.astype(np.float64) * scale
    codes = rng.integers(0, 256, (n, k // 2)).astype(np.uint8)
    pairs = np.stack([codes & 15, codes >> 4], -1).reshape(n, k)
    values = pairs.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    return {"weight_packed": codes, "weight_scale": exponents}, values * scale


def test_mxfp4_and_mxfp8_in_one_checkpoint():
    config = CONFIG | MX
    config |= {
        "extra_config": {
            "model.layers.0.mlp.down_proj": {"bits": 8, "act_bits": 8},
            "lm_head": {"bits": 16, "data_type": "float", "act_bits": 16},
        }
    }
    for name, kind in (("up_proj", "mxfp4"), ("down_proj", "mxfp8")):
        tensors, weight = mx(kind, 8, 64)
        found = decoded(config, tensors, (8, 64), f"model.layers.0.mlp.{name}")
        assert found.act.dtype == {"mxfp4": "fp4_e2m1", "mxfp8": "fp8_e4m3"}[kind]
        np.testing.assert_allclose(weight_of(found), weight, rtol=1e-6)


def test_blocks_of_8_bit_floats():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(256, 128)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.5, 2, (2, 1)).astype(np.float32)
    config = CONFIG | {"bits": 8, "group_size": [128, 128], "data_type": "fp", "sym": True}
    config |= {"packing_format": "auto_round:fp8", "act_bits": 8, "act_data_type": "fp"}
    tensors = {"weight": values, "weight_scale_inv": scale}
    weight = values.astype(np.float64) * scale.astype(np.float64).repeat(128, 0)
    found = decoded(config, tensors, (256, 128))
    assert found.group == (128, 128)
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-6)


def test_8_bit_floats_without_rounded_inputs():
    """The packing that the tool writes for FPW8A16 is the default one."""
    values = np.random.default_rng(0).normal(size=(32, 64)).astype(ml_dtypes.float8_e4m3fn)
    config = CONFIG | {"bits": 8, "group_size": 0, "data_type": "fp", "sym": True}
    tensors = {"weight": values, "weight_scale": np.full(1, 0.5, ml_dtypes.bfloat16)}
    found = decoded(config, tensors, (32, 64))
    assert found.act is None
    np.testing.assert_array_equal(weight_of(found), values.astype(np.float64) / 2)


@pytest.mark.parametrize(("kind", "scale"), [("mx_fp", "e8m0"), ("mx_fp_rceil", "e8m0_ceil")])
def test_scales_of_mx_activations(kind, scale):
    found = decoded(CONFIG | MX | {"act_data_type": kind}, mx("mxfp4", 8, 64)[0], (8, 64))
    assert found.act.scale == scale


# Keys that AutoRound 0.15 writes into its own config, and into those of GPTQ and AWQ.
WRITTEN = {
    "autoround_version": "0.15.1",
    "enable_quanted_input": False,
    "data_type": "int",
    "static_attention_granularity": "tensor",
    "static_kv_granularity": "tensor",
    "rotation_config": None,
    "bits": 4,
    "group_size": 32,
}


@pytest.mark.parametrize("method", ["auto-round", "gptq", "awq"])
def test_how_the_tool_worked_says_nothing(method):
    quantization(WRITTEN | {"quant_method": method})
    with pytest.raises(UnsupportedError, match="rotation_config"):
        quantization(WRITTEN | {"quant_method": method, "rotation_config": {"size": 32}})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"packing_format": "auto_round:mlx"}, UnsupportedError, "mlx"),
        ({"new_key": 1}, UnsupportedError, "new_key"),
        ({"bits": "4"}, CheckpointError, "bits"),
        ({"group_size": 0}, CheckpointError, "group_size"),
        ({"act_bits": 8}, UnsupportedError, "activation"),
        (MX | {"bits": -5}, UnsupportedError, "-5 bits"),
        (MX | {"data_type": "fp"}, UnsupportedError, "'fp'"),
        (MX | {"act_data_type": "mx_fp4_rceil_v2"}, UnsupportedError, "rceil_v2"),
        ({"extra_config": {"a": {"new_key": 1}}}, UnsupportedError, "new_key"),
        ({"extra_config": {"a": {"bits": "8"}}}, CheckpointError, "extra_config.a.bits"),
    ],
)
def test_settings_that_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        quantization(CONFIG | change)
