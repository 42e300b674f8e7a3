import ml_dtypes
import numpy as np
import pytest

from qjax.errors import CheckpointError, UnsupportedError
from tests.formats.stored import (
    MODULE,
    decoded,
    planned,
    quantization,
    record,
    round_trip,
    weight_of,
    words,
)

N, K = 16, 64


def config(weights, inputs=None, **more):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "config_groups": {"g": group}, **more}


def integers(bits, rows, columns, seed=0):
    """Signed values and zero points, scales for groups of (rows, columns), and the weight."""
    rng = np.random.default_rng(seed)
    half = 1 << (bits - 1)
    values = rng.integers(-half, half, (N, K))
    shape = (N // rows, K // columns)
    zero = rng.integers(-half, half, shape)
    scale = rng.uniform(0.5, 2, shape).astype(np.float32)

    def spread(array):
        return array.repeat(rows, 0).repeat(columns, 1).astype(np.float64)

    return values, zero, scale, (values - spread(zero)) * spread(scale)


def along_rows(matrix, bits):
    """Words along the first axis."""
    return np.ascontiguousarray(words(np.ascontiguousarray(matrix.T), bits).T)


def packed(bits, values, zero, scale):
    half = 1 << (bits - 1)
    return {
        "weight_packed": words(values + half, bits),
        "weight_scale": scale,
        "weight_shape": np.array([N, K]),
        "weight_zero_point": along_rows(zero + half, bits),
    }


def test_one_word():
    """-8 to -1 are the word 76543210, 0 to 7 are FEDCBA98."""
    tensors = {
        "weight_packed": np.array([[0x76543210, 0xFEDCBA98]], np.uint32).view(np.int32),
        "weight_scale": np.ones((1, 1), np.float32),
        "weight_shape": np.array([1, 16]),
    }
    settings = config({"num_bits": 4, "strategy": "channel"})
    found = decoded(settings, tensors, (1, 16))
    np.testing.assert_array_equal(weight_of(found)[0], np.arange(-8, 8))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [16, 64])
def test_packed_with_zero_points(bits, size):
    values, zero, scale, weight = integers(bits, 1, size)
    args = {"num_bits": bits, "strategy": "group", "group_size": size, "symmetric": False}
    found = round_trip(
        config(args, format="pack-quantized"), packed(bits, values, zero, scale), (N, K)
    )
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-6)


def test_one_zero_point_of_a_whole_tensor_is_not_packed():
    values, zero, scale, weight = integers(4, N, K)
    tensors = packed(4, values, zero, scale) | {
        "weight_scale": scale.reshape(1),
        "weight_zero_point": zero.reshape(1).astype(np.int8),
    }
    args = {"num_bits": 4, "strategy": "tensor", "symmetric": False}
    found = round_trip(config(args, format="pack-quantized"), tensors, (N, K))
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-6)


@pytest.mark.parametrize("layout", ["int-quantized", "naive-quantized"])
@pytest.mark.parametrize("place", ["global", "group"])
def test_fewer_bits_in_a_byte_each(layout, place):
    values, zero, scale, weight = integers(4, 1, 32)
    tensors = {
        "weight": values.astype(np.int8),
        "weight_scale": scale,
        "weight_zero_point": zero.astype(np.int8),
    }
    args = {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}
    settings = config(args, format=layout if place == "global" else "mixed-precision")
    if place == "group":
        settings["config_groups"]["g"]["format"] = layout
    found = round_trip(settings, tensors, (N, K))
    assert found.qtype == "uint4"
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-6)


def test_zero_points_of_floats_count():
    rng = np.random.default_rng(0)
    values = rng.normal(0, 50, (N, K)).astype(ml_dtypes.float8_e4m3fn)
    zero = rng.normal(0, 20, (N, 1)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.5, 2, (N, 1)).astype(np.float32)
    tensors = {"weight": values, "weight_scale": scale, "weight_zero_point": zero}
    args = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": False}
    found = round_trip(config(args, format="float-quantized"), tensors, (N, K))
    wanted = (values.astype(np.float64) - zero.astype(np.float64)) * scale
    np.testing.assert_allclose(weight_of(found), wanted, rtol=1e-6)


def byte_tensors(**more):
    return {
        "weight": np.ones((N, K), np.int8),
        "weight_scale": np.ones((N, 1), np.float32),
    } | more


@pytest.mark.parametrize(
    ("args", "tensors", "told"),
    [
        ({"symmetric": False}, byte_tensors(), "weight_zero_point"),
        (
            {"symmetric": False},
            byte_tensors(weight_zero_point=np.zeros((N, 2), np.int8)),
            "weight_zero_point",
        ),
        ({"type": "float"}, byte_tensors(), "holds integers"),
        ({"strategy": "tensor"}, byte_tensors(), "'tensor' excludes"),
        (
            {"strategy": "group", "group_size": 32},
            byte_tensors(),
            "weight_scale",
        ),
        ({"num_bits": 4}, byte_tensors(weight=np.full((N, K), 8, np.int8)), "4 bits cannot"),
    ],
)
def test_what_contradicts_itself(args, tensors, told):
    settings = config({"num_bits": 8, "strategy": "channel"} | args)
    with pytest.raises(CheckpointError, match=told):
        decoded(settings, tensors, (N, K))


@pytest.mark.parametrize(
    ("scheme", "cache"),
    [
        (None, None),
        ({"num_bits": 8, "type": "float"}, "fp8_e4m3"),
        ({"num_bits": 8, "type": "float", "strategy": "attn_head"}, "fp8_e4m3"),
        ({"num_bits": 8, "type": "float", "dynamic": True}, "dynamic float8"),
        ({"num_bits": 8, "type": "int"}, "int8"),
        ({"num_bits": 8, "type": "int", "symmetric": False}, "asymmetric int8"),
    ],
)
def test_cache(scheme, cache):
    settings = config({"num_bits": 8, "strategy": "channel"}, kv_cache_scheme=scheme)
    assert quantization(settings).cache == cache


def test_rounded_queries_are_told():
    settings = config(None, {"num_bits": 8, "type": "float"})
    assert "queries" in quantization(settings).cache


@pytest.mark.parametrize("method", ["compressed-tensors", "sparseml"])
def test_first_releases_put_both_configs_one_level_lower(method):
    inner = config({"num_bits": 8, "strategy": "channel"}, format="int-quantized", version="0.3")
    inner |= {"quant_method": method, "sparsity_config": {"format": "dense"}}
    settings = {"quant_method": method, "quantization_config": inner, "sparsity_config": None}
    assert quantization(settings).schemes == quantization(inner).schemes
    assert decoded(settings, byte_tensors(), (N, K)).qtype == "int8"


def rotated(kind="hadamard", location="input", **more):
    apply = {"targets": ["Linear"], "location": location, "inverse": False, "ignore": []}
    group = {"type": kind, "apply": [apply], "head_dim": None, "randomize": False} | more
    return config(
        {"num_bits": 8, "strategy": "channel"},
        transform_config={"config_groups": {"R4": group}},
    )


def test_a_matrix_that_is_stored_for_run_time():
    """SpinQuant's R4, as LLM Compressor 0.14 stores it beside the first layer alone."""
    tensors = byte_tensors()
    matrix = {"R4_input.weight": np.ones((K, K))}
    assert decoded(rotated(), tensors | matrix, (N, K)).hadamard == (K, 0)
    assert decoded(rotated(), tensors, (N, K)).hadamard == (K, 0)
    assert decoded(rotated(head_dim=32), tensors, (N, K)).hadamard == (32, 0)
    embedding = planned(rotated(), {"weight": np.ones((N, K), np.float32)}, (N, K), "embed_tokens")
    assert embedding is None


@pytest.mark.parametrize(
    ("kind", "location", "more"),
    [
        ("random-hadamard", "input", {}),
        ("random-matrix", "output", {}),
        ("hadamard", "q_attn", {}),
        ("hadamard", "input", {"randomize": True}),
        ("hadamard", "input", {"head_dim": 24}),
    ],
)
def test_transforms_that_are_refused(kind, location, more):
    with pytest.raises(UnsupportedError, match="transform_config"):
        planned(rotated(kind, location, **more), byte_tensors(), (N, K))


def test_a_bias_is_not_rotated():
    settings = rotated(location="output")
    tensors = byte_tensors()
    assert decoded(settings, tensors, (N, K)).hadamard == (0, N)
    method = quantization(settings, tensors | {"bias": np.ones(N, np.float32)})
    with pytest.raises(UnsupportedError, match="bias"):
        method.layer(MODULE, {s: record(f"{MODULE}.{s}", a) for s, a in tensors.items()}, (N, K))


@pytest.mark.parametrize("layout", ["pack-quantized", "int-quantized"])
@pytest.mark.parametrize("bits", [4, 8])
def test_columns_in_any_order(layout, bits):
    rng = np.random.default_rng(0)
    values, _, scale, _ = integers(bits, 1, 16)
    g_idx = rng.permutation(np.arange(K) // 16).astype(np.int32)
    tensors = {"weight_scale": scale, "weight_g_idx": g_idx}
    if layout == "int-quantized":
        tensors["weight"] = values.astype(np.int8)
    else:
        tensors["weight_packed"] = words(values + (1 << (bits - 1)), bits)
        tensors["weight_shape"] = np.array([N, K])
    args = {"num_bits": bits, "strategy": "group", "group_size": 16, "actorder": "group"}
    found = round_trip(config(args, format=layout), tensors, (N, K))
    np.testing.assert_allclose(weight_of(found), values * scale[:, g_idx], rtol=1e-6)
    del tensors["weight_g_idx"]
    with pytest.raises(CheckpointError, match="weight_g_idx"):
        decoded(config(args, format=layout), tensors, (N, K))


def test_symmetric_codes_may_have_zero_points_of_0():
    values, zero, scale, _ = integers(4, 1, K)
    tensors = packed(4, values, zero, scale)
    settings = config({"num_bits": 4, "strategy": "channel"})
    tensors["weight_zero_point"] = np.zeros((N, 1), np.int8)
    found = decoded(settings, tensors, (N, K))
    assert found.zero_point is None
    np.testing.assert_allclose(weight_of(found), values * scale.astype(np.float64), rtol=1e-6)
    tensors["weight_zero_point"][3] = 1
    with pytest.raises(CheckpointError, match="is not 0, the config says symmetric"):
        decoded(settings, tensors, (N, K))


def test_divisor_of_nvfp4_survives():
    """The stored number divides; its reciprocal is computed with, also once it was saved."""
    rng = np.random.default_rng(0)
    args = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    packed_ = rng.integers(0, 256, (N, K // 2)).astype(np.uint8)
    scale = rng.uniform(1, 400, (N, K // 16)).astype(ml_dtypes.float8_e4m3fn)
    method = quantization(config(args))
    for divisor in rng.uniform(1, 9000, 300).astype(np.float32):
        tensors = {"weight_packed": packed_, "weight_scale": scale}
        tensors["weight_global_scale"] = np.array([divisor])
        found = decoded(config(args), tensors, (N, K))
        assert found.aux["global_scale"] == np.float32(1) / divisor
        back = method.encode(MODULE, found)["weight_global_scale"]
        assert np.float32(1) / back == found.aux["global_scale"]
        np.testing.assert_allclose(back, divisor, rtol=2e-7)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_weights_that_are_not_compressed_yet(bits, symmetric):
    """Beside their scales: rounded as they are read, in the steps of the tool."""
    values, zero, scale, _ = integers(bits, 1, 32)
    zero = zero * (not symmetric)
    rng = np.random.default_rng(1)
    scale = np.exp2(np.round(np.log2(scale))).astype(np.float32)  # exact in every step
    spread = scale.repeat(32, 1).astype(np.float64)
    near = values - zero.repeat(32, 1) + rng.choice([-0.25, 0, 0.25], values.shape)
    tensors = {"weight": (near * spread).astype(np.float32), "weight_scale": scale}
    tensors |= {"weight_zero_point": zero.astype(np.int8)}
    args = {"num_bits": bits, "strategy": "group", "group_size": 32, "symmetric": symmetric}
    settings = config(args, format="dense", quantization_status="frozen")
    found = decoded(settings, tensors, (N, K))
    wanted = (values - zero.repeat(32, 1)) * spread
    np.testing.assert_array_equal(weight_of(found), wanted)
    with pytest.raises(UnsupportedError, match="save with a quantization_config"):
        quantization(settings).encode(MODULE, found)


def test_floats_that_are_not_compressed_yet():
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 1, (N, K)).astype(np.float32)
    weight[0, 0] = 500.0  # beyond the largest
    tensors = {"weight": weight, "weight_scale": np.full(1, 0.5, np.float32)}
    found = decoded(config({"num_bits": 8, "type": "float"}), tensors, (N, K))
    wanted = np.clip(weight * 2, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) / 2
    np.testing.assert_array_equal(weight_of(found), wanted)
    args = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    tensors["weight_scale"] = np.ones((N, 2), np.float32)
    with pytest.raises(UnsupportedError, match="save_compressed=True"):
        decoded(config(args), tensors, (N, K))
