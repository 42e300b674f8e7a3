import ml_dtypes
import numpy as np
import pytest

from qjax.errors import CheckpointError, UnsupportedError
from tests.formats.stored import MODULE, decoded, quantization, round_trip, weight_of, words

N, K = 16, 64
ONE = np.array(0.5, np.float32)


def config(algorithm, **more):
    return {"quant_method": "modelopt", "quant_algo": algorithm, **more}


def nvfp4(size):
    rng = np.random.default_rng(0)
    values = rng.normal(0, 2, (N, K)).astype(ml_dtypes.float4_e2m1fn)
    scale = rng.uniform(1, 100, (N, K // size)).astype(ml_dtypes.float8_e4m3fn)
    tensors = {
        "weight": words(values.view(np.uint8), 4, 8).view(np.uint8),
        "weight_scale": scale,
        "weight_scale_2": np.array(0.25, np.float32),
    }
    spread = scale.astype(np.float64).repeat(size, 1)
    return tensors, values.astype(np.float64) * spread * 0.25


@pytest.mark.parametrize(
    ("algorithm", "size", "dtype", "key"),
    [
        ("NVFP4", 16, "fp4_e2m1", "act_global_scale"),
        ("NVFP4_AWQ", 16, "fp4_e2m1", "act_global_scale"),
        ("W4A8_NVFP4_FP8", 32, "fp8_e4m3", "act_scale"),
    ],
)
def test_nvfp4_with_inputs(algorithm, size, dtype, key):
    tensors, weight = nvfp4(size)
    found = round_trip(config(algorithm), tensors | {"input_scale": ONE}, (N, K))
    np.testing.assert_array_equal(weight_of(found), weight)
    assert found.act.dtype == dtype
    assert found.aux[key] == 0.5


@pytest.mark.parametrize("size", [16, 32])
def test_nvfp4_weights_alone(size):
    tensors, weight = nvfp4(size)
    found = round_trip(config("W4A16_NVFP4", group_size=size), tensors, (N, K))
    np.testing.assert_array_equal(weight_of(found), weight)
    assert found.act is None


@pytest.mark.parametrize(
    ("algorithm", "dtype", "strategy"),
    [("mxfp4", "fp4_e2m1", "group"), ("W4A8_MXFP4_FP8", "fp8_e4m3", "tensor")],
)
def test_mxfp4(algorithm, dtype, strategy):
    rng = np.random.default_rng(0)
    values = rng.normal(0, 2, (N, K)).astype(ml_dtypes.float4_e2m1fn)
    exponents = rng.integers(120, 130, (N, K // 32)).astype(np.uint8)
    stream = words(values.view(np.uint8), 4, 8).view(np.uint8)
    found = round_trip(config(algorithm), {"weight": stream, "weight_scale": exponents}, (N, K))
    powers = np.exp2(exponents.astype(np.float64) - 127).repeat(32, 1)
    np.testing.assert_array_equal(weight_of(found), values.astype(np.float64) * powers)
    assert (found.act.dtype, found.act.strategy, found.act.dynamic) == (dtype, strategy, True)


def test_int4_of_neighbouring_outputs():
    """Of two outputs a byte, the even one in the low half."""
    rng = np.random.default_rng(0)
    values = rng.integers(-8, 8, (N, K))
    scale = rng.uniform(0.5, 2, (N, 2)).astype(np.float32)
    pre = rng.uniform(0.5, 2, K).astype(np.float32)
    packed = ((values[0::2] & 15) | (values[1::2] & 15) << 4).astype(np.uint8)
    tensors = {"weight": packed, "weight_scale": scale, "pre_quant_scale": pre}
    found = round_trip(config("W4A16_AWQ"), tensors, (N, K))
    np.testing.assert_allclose(weight_of(found), values * scale.repeat(32, 1), rtol=1e-6)
    np.testing.assert_array_equal(found.aux["act_pre_scale"][0], pre)


def test_int8_with_static_inputs():
    """SmoothQuant's exports hold one scale of the inputs of each layer."""
    rng = np.random.default_rng(0)
    values = rng.integers(-127, 128, (N, K)).astype(np.int8)
    scale = rng.uniform(0.5, 2, N).astype(np.float32)
    tensors = {"weight": values, "weight_scale": scale, "input_scale": ONE}
    found = round_trip(config("W8A8_SQ_PER_CHANNEL"), tensors, (N, K))
    np.testing.assert_allclose(weight_of(found), values * scale[:, None], rtol=1e-6)
    assert (found.act.dtype, found.act.dynamic) == ("int8", False)
    assert found.aux["act_scale"] == 0.5
    del tensors["input_scale"]
    assert round_trip(config("W8A16"), tensors, (N, K)).act is None
    with pytest.raises(CheckpointError, match="input_scale"):
        decoded(config("W8A8_SQ_PER_CHANNEL"), tensors, (N, K))


def test_blocks_of_floats():
    rng = np.random.default_rng(0)
    values = rng.normal(0, 50, (256, 128)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.5, 2, (2, 1, 1, 1)).astype(np.float32)
    tensors = {"weight": values, "weight_scale": scale}
    found = decoded(config("FP8_PB_WO"), tensors, (256, 128))
    wanted = values.astype(np.float64) * scale.reshape(2, 1).repeat(128, 0)
    np.testing.assert_allclose(weight_of(found), wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("cache", "known"),
    [
        ({"kv_cache_quant_algo": "FP8"}, "fp8_e4m3"),
        ({"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}, "fp8_e4m3"),
        ({"kv_cache_scheme": "NVFP4"}, "NVFP4"),
        ({"kv_cache_quant_algo": None}, None),
    ],
)
def test_cache(cache, known):
    assert quantization(config("FP8", **cache)).cache == known


def test_the_cache_alone():
    method = quantization(config(None, kv_cache_quant_algo="FP8"))
    assert not method.quantizes_weights
    with pytest.raises(UnsupportedError, match="quant_algo"):
        quantization(config(None))


@pytest.mark.parametrize("pattern", [MODULE, "*up_proj", "model.layers.0.mlp", "*.mlp*"])
def test_excluded(pattern):
    tensors, _ = nvfp4(16)
    settings = config("W4A16_NVFP4", exclude_modules=[pattern])
    with pytest.raises(CheckpointError, match="excludes this module"):
        decoded(settings, tensors, (N, K))


def test_mixed_precision_and_the_side_file():
    layers = {MODULE: {"quant_algo": "W4A16_NVFP4", "group_size": 16}}
    inner = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    settings = {"quant_method": "modelopt", "producer": {"name": "modelopt"}, "quantization": inner}
    tensors, weight = nvfp4(16)
    np.testing.assert_array_equal(weight_of(decoded(settings, tensors, (N, K))), weight)
    with pytest.raises(CheckpointError, match="excludes this module"):
        decoded(settings, tensors, (N, K), module="model.layers.1.mlp.up_proj")


@pytest.mark.parametrize(
    ("algorithm", "told"), [("FP8", "FP8 does not mean"), ("W4A16_AWQ", "W4A16_AWQ does not mean")]
)
def test_what_contradicts_the_tensors(algorithm, told):
    with pytest.raises(CheckpointError, match=told):
        decoded(config(algorithm), nvfp4(16)[0], (N, K))
