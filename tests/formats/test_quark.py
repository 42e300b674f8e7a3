import ml_dtypes
import numpy as np
import pytest

from qjax.errors import CheckpointError, UnsupportedError
from tests.formats.stored import MODULE, decoded, quantization, round_trip, weight_of, words

N, K = 16, 64
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which of eight columns lies in which nibble of a word


def config(weight, inputs=None, **more):
    everywhere = {"weight": weight, "input_tensors": inputs}
    return {"quant_method": "quark", "global_quant_config": everywhere, **more}


def grouped(dtype, size=32, symmetric=True):
    return {
        "dtype": dtype,
        "qscheme": "per_group",
        "group_size": size,
        "symmetric": symmetric,
        "ch_axis": -1,
    }


def in_order(matrix, order):
    """Eight 4-bit values a word along the last axis."""
    if order == "reorder":
        runs = matrix.reshape(*matrix.shape[:-1], -1, 8)[..., AWQ_ORDER]
        matrix = runs.reshape(matrix.shape)
    return words(np.atleast_2d(matrix & 15), 4).reshape(*matrix.shape[:-1], -1)


@pytest.mark.parametrize("order", ["order", "reorder"])
@pytest.mark.parametrize("dtype", ["int4", "uint4"])
@pytest.mark.parametrize("scheme", ["per_group", "per_channel"])
def test_four_bits(order, dtype, scheme):
    """In groups the matrix lies transposed; zero points are packed along N either way."""
    rng = np.random.default_rng(0)
    low = -8 if dtype == "int4" else 0
    size = 32 if scheme == "per_group" else K
    values = rng.integers(low, low + 16, (N, K))
    zero = rng.integers(low, low + 16, (N, K // size))
    scale = rng.uniform(0.5, 2, zero.shape).astype(np.float32)
    weight = (values - zero.repeat(size, 1)) * scale.astype(np.float64).repeat(size, 1)
    if scheme == "per_group":
        values, scale, zero = values.T, np.ascontiguousarray(scale.T), zero.T
    else:
        scale, zero = scale[:, 0], zero[:, 0]
    tensors = {
        "weight": in_order(values, order),
        "weight_scale": scale,
        "weight_zero_point": in_order(zero, order),
    }
    args = grouped(dtype, size, symmetric=False) | {"qscheme": scheme}
    found = round_trip(config(args, export={"pack_method": order}), tensors, (N, K))
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-6)


def test_two_and_three_bits():
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.5, 2, (K // 32, N)).astype(np.float32)
    spread = scale.T.astype(np.float64).repeat(32, 1)
    three = rng.integers(-4, 4, (K, N))
    stream = words(three & 7, 3, 8).view(np.uint8)
    found = decoded(config(grouped("int3")), {"weight": stream, "weight_scale": scale}, (N, K))
    np.testing.assert_allclose(weight_of(found), three.T * spread, rtol=1e-6)
    two = rng.integers(0, 4, (K, N))  # the first of four in the highest bits
    fours = two.reshape(K, -1, 4)
    packed = (fours * [64, 16, 4, 1]).sum(-1).astype(np.uint8)
    found = decoded(config(grouped("uint2")), {"weight": packed, "weight_scale": scale}, (N, K))
    np.testing.assert_allclose(weight_of(found), two.T * spread, rtol=1e-6)
    settings = config(grouped("int2"))
    signed = rng.integers(-2, 2, (K, N)).astype(np.int8)
    found = decoded(settings, {"weight": signed, "weight_scale": scale}, (N, K))
    np.testing.assert_allclose(weight_of(found), signed.T * spread, rtol=1e-6)
    np.testing.assert_array_equal(quantization(settings).encode(MODULE, found)["weight"], signed)


@pytest.mark.parametrize(
    ("dtype", "element", "top"),
    [("fp4", ml_dtypes.float4_e2m1fn, 4), ("fp6_e2m3", ml_dtypes.float6_e2m3fn, 6)],
)
def test_mx(dtype, element, top):
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, (N, K)).astype(element)
    exponents = rng.integers(120, 130, (N, K // 32)).astype(np.uint8)
    stream = words(values.view(np.uint8), top, 8).view(np.uint8)
    args = grouped(dtype) | {"scale_format": "e8m0"}
    found = round_trip(config(args), {"weight": stream, "weight_scale": exponents}, (N, K))
    powers = np.exp2(exponents.astype(np.float64) - 127).repeat(32, 1)
    np.testing.assert_array_equal(weight_of(found), values.astype(np.float64) * powers)


def test_nvfp4():
    rng = np.random.default_rng(0)
    values = rng.normal(0, 2, (N, K)).astype(ml_dtypes.float4_e2m1fn)
    scale = rng.uniform(1, 100, (N, K // 16)).astype(ml_dtypes.float8_e4m3fn)
    tensors = {
        "weight": words(values.view(np.uint8), 4, 8).view(np.uint8),
        "weight_scale": scale,
        "weight_scale_2": np.array(0.25, np.float32),
    }
    second = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_scale_quant": True}
    found = round_trip(config([grouped("fp4", 16), second]), tensors, (N, K))
    wanted = values.astype(np.float64) * scale.astype(np.float64).repeat(16, 1) * 0.25
    np.testing.assert_array_equal(weight_of(found), wanted)


@pytest.mark.parametrize("shape", [(), (N,)])
def test_bytes_and_static_inputs(shape):
    rng = np.random.default_rng(0)
    values = rng.integers(-128, 128, (N, K)).astype(np.int8)
    scale = rng.uniform(0.5, 2, shape).astype(np.float32)
    zero = rng.integers(1, 9, shape).astype(np.int8)
    tensors = {
        "weight": values,
        "weight_scale": scale,
        "weight_zero_point": zero,
        "input_scale": np.array(0.5, np.float32),
        "input_zero_point": np.array(-3, np.int8),
    }
    args = {"dtype": "int8", "qscheme": "per_channel" if shape else "per_tensor"}
    inputs = {"dtype": "int8", "qscheme": "per_tensor", "symmetric": False}
    found = round_trip(config(args, inputs), tensors, (N, K))
    rows = scale.reshape(-1, 1).astype(np.float64)
    wanted = (values - zero.reshape(-1, 1).astype(np.float64)) * rows
    np.testing.assert_allclose(weight_of(found), wanted, rtol=1e-6)
    assert found.aux["act_scale"] == 0.5
    assert found.aux["act_zero_point"] == -3


def test_patterns_of_layers_win():
    settings = config(grouped("int4"), layer_quant_config={"*up_proj": {"weight": None}})
    tensors = {"weight": np.zeros((K, N // 8), np.int32), "weight_scale": np.ones((2, N), "f4")}
    with pytest.raises(CheckpointError, match="excludes this module"):
        decoded(settings, tensors, (N, K))
    found = decoded(settings, tensors, (N, K), module="model.layers.0.mlp.down_proj")
    assert found.qtype == "uint4b8"
    with pytest.raises(UnsupportedError, match="leaves it alone"):
        quantization(settings).encode(MODULE, found)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"weight": np.zeros((N, K // 8), np.int32)}, CheckpointError, "weight"),
        ({"weight_scale": np.ones((N, 2), "f4")}, CheckpointError, "weight_scale"),
        ({"weight_zero_point": np.zeros((2, 3), np.int32)}, CheckpointError, "zero_point"),
    ],
)
def test_what_contradicts_itself(change, error, told):
    tensors = {"weight": np.zeros((K, N // 8), np.int32), "weight_scale": np.ones((2, N), "f4")}
    with pytest.raises(error, match=told):
        decoded(config(grouped("int4")), tensors | change, (N, K))


def test_cache():
    def of(dtype):
        return {"*k_proj": {"output_tensors": {"dtype": dtype, "qscheme": "per_tensor"}}}

    assert quantization(config(grouped("int4"))).cache is None
    for dtype in ("fp8_e4m3", "int8"):
        settings = config(grouped("int4"), kv_cache_quant_config=of(dtype))
        assert quantization(settings).cache == dtype


@pytest.mark.parametrize("order", ["order", "reorder"])
def test_four_bits_of_eight(order):
    """The scheme "int4_fp8": both scales multiply; those of the integers have names in "_2"."""
    rng = np.random.default_rng(0)
    values = rng.integers(-8, 8, (N, K))
    scale = rng.uniform(20, 50, N).astype(np.float32)
    tensors = {
        "weight": in_order(values, order),
        "weight_scale": np.array(0.25, np.float32),
        "weight_scale_2": scale,
        "weight_zero_point_2": in_order(np.zeros((1, N), int), order)[0],
    }
    both = [
        {"dtype": "fp8_e4m3", "qscheme": "per_tensor"},
        {"dtype": "int4", "qscheme": "per_channel", "ch_axis": 0},
    ]
    settings = config(both, export={"pack_method": order})
    found = decoded(settings, tensors, (N, K))
    wanted = values * scale.astype(np.float64)[:, None] / 4
    np.testing.assert_allclose(weight_of(found), wanted, rtol=1e-6)
    with pytest.raises(UnsupportedError, match="has no layout for uint4b8"):
        quantization(settings).encode(MODULE, found)
    del tensors["weight_scale_2"]
    with pytest.raises(CheckpointError, match="weight_scale"):
        decoded(settings, tensors, (N, K))
