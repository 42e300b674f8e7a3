import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qjax.errors import CheckpointError, UnsupportedError
from qjax.formats.base import Checkpoint
from qjax.registry import quantization_config
from tests.formats.stored import MODULE, record, weight_of, whole

E4M3, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
DTYPE = {"_type": "torch.dtype"}
N, K = 160, 256


def planned(kind, tensors, data, shape=(N, K)):
    """A layer as TorchAO writes it: tensors "_weight_*", and a text in the header."""
    stored = {f"_weight_{name}": array for name, array in tensors.items()}
    records = {s: record(f"{MODULE}.{s}", array) for s, array in stored.items()}
    text = json.dumps({"_type": kind, "_data": data, "_tensor_data_names": list(tensors)})
    checkpoint = Checkpoint("config.json", {}, {f"{MODULE}.weight": text}, stored.__getitem__)
    method = quantization_config("torchao").from_config({"quant_method": "torchao"}, checkpoint)
    return method.layer(MODULE, records, shape), stored


def decoded(kind, tensors, data, shape=(N, K)):
    layer, stored = planned(kind, tensors, data, shape)
    assert {*layer.reads} == {*stored}
    return whole(layer, stored)


def dtype(name):
    return DTYPE | {"_data": name}


def random(low, high, shape, kind: Any = np.float32):
    return np.random.default_rng(0).uniform(low, high, shape).astype(kind)


def spread(scale, columns):
    return np.asarray(scale, np.float64).repeat(columns, -1)


@pytest.mark.parametrize("bits", range(1, 9))
def test_few_bits_in_a_byte_each(bits):
    half = 1 << (bits - 1)
    codes = np.random.default_rng(bits).integers(-half, half, (N, K)).astype(np.int8)
    zero = np.random.default_rng(1).integers(-half, half, (N, K // 32)).astype(np.int8)
    scale = random(0.1, 1, (N, K // 32), ml_dtypes.bfloat16)
    data = {"target_dtype": dtype(f"int{bits}"), "block_size": [1, 32]}
    for zeros in (zero, np.zeros_like(zero)):
        tensors = {"qdata": codes, "scale": scale, "zero_point": zeros}
        found = decoded("IntxUnpackedToInt8Tensor", tensors, data)
        assert found.qvalue.shape == (N, K * bits // 8)
        wanted = (codes.astype(np.float64) - spread(zeros, 32)) * spread(scale, 32)
        np.testing.assert_allclose(weight_of(found), wanted, rtol=1e-6)
        written(found, "IntxUnpackedToInt8Tensor", tensors)


def written(weight, kind, tensors):
    """What is written is what was read."""
    text = json.dumps({"_type": kind, "_data": {}})
    checkpoint = Checkpoint("config.json", {}, {f"{MODULE}.weight": text}, {}.__getitem__)
    method = quantization_config("torchao").from_config({"quant_method": "torchao"}, checkpoint)
    found = method.encode(MODULE, weight)
    assert found.keys() == {f"_weight_{name}" for name in tensors}
    for name, array in tensors.items():
        assert found[f"_weight_{name}"].dtype == array.dtype
        np.testing.assert_array_equal(found[f"_weight_{name}"], array, name)


def test_what_is_not_written():
    tensors = {"qdata": np.ones((N, K), np.int8), "scale": np.ones((N, 1), np.float32)}
    found = decoded("Int8Tensor", tensors, {"block_size": [1, K]})
    for kind in ("NVFP4Tensor", "Float8Tensor"):
        with pytest.raises(UnsupportedError, match=f"TorchAO.*{kind[:2]}|int8"):
            written(found, kind, tensors)


@pytest.mark.parametrize(("block", "shape"), [((1, K), (N, 1)), ((N, K), (1, 1)), ((N, K), ())])
@pytest.mark.parametrize("kind", ["Int8Tensor", "Float8Tensor"])
def test_eight_bits(kind, block, shape):
    values = random(-100, 100, (N, K), np.int8 if kind == "Int8Tensor" else E4M3)
    scale = random(0.1, 1, shape)
    found = decoded(kind, {"qdata": values, "scale": scale}, {"block_size": list(block)})
    assert (found.group, found.act) == (block, None)
    wanted = values.astype(np.float64) * np.asarray(scale, np.float64)
    np.testing.assert_allclose(weight_of(found), wanted, rtol=1e-6)
    tensors = {"qdata": values, "scale": scale.reshape(found.scale.shape)}
    if kind == "Int8Tensor":
        tensors["zero_point"] = np.zeros(found.scale.shape, np.int8)
    written(found, kind, tensors)


def test_int4():
    """Two signed values a byte, the even column low; W = q * scale + zero."""
    values = np.random.default_rng(0).integers(-8, 8, (N, K))
    packed = (values[:, ::2] & 15 | (values[:, 1::2] & 15) << 4).astype(np.uint8)
    scale, zero = random(0.1, 1, (2, K // 64, N))
    tensors = {"qdata": packed, "scale": scale, "zero_point": zero}
    found = decoded("Int4Tensor", tensors, {"block_size": [1, 64]})
    wanted = values * spread(scale.T, 64) + spread(zero.T, 64)
    np.testing.assert_allclose(weight_of(found), wanted, rtol=1e-5, atol=1e-6)


def swizzled(scale):
    """Scales [rows, columns] in tiles of 128 x 4: byte 16 (r % 32) + 4 (r // 32) + c of a tile."""
    rows, columns = scale.shape
    tiles = -(-rows // 128), -(-columns // 4)
    result = np.zeros((*tiles, 512), np.uint8)
    for row in range(rows):
        for column in range(columns):
            at = 16 * (row % 32) + 4 * (row % 128 // 32) + column % 4
            result[row // 128, column // 4, at] = scale.view(np.uint8)[row, column]
    return result.view(scale.dtype).reshape(32 * tiles[0], 16 * tiles[1])


FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.mark.parametrize("order", [np.asarray, swizzled])
@pytest.mark.parametrize("whole", [None, 0.125])
def test_nvfp4(whole, order):
    codes = np.random.default_rng(0).integers(0, 16, (N, K))
    scale = random(0.5, 4, (N, K // 16), E4M3)
    tensors = {
        "qdata": (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8),
        "scale": order(scale),
    }
    if whole:
        tensors["per_tensor_scale"] = np.float32(whole).reshape(())
    data = {"block_size": 16, "is_swizzled_scales": order is swizzled, "act_quant_kwargs": None}
    found = decoded("NVFP4Tensor", tensors, data)
    wanted = FP4[codes] * spread(scale, 16) * (whole or 1)
    np.testing.assert_allclose(weight_of(found), wanted, rtol=1e-6)


@pytest.mark.parametrize("order", [np.asarray, swizzled])
@pytest.mark.parametrize("element", ["float8_e4m3fn", "float4_e2m1fn_x2"])
def test_mx(element, order):
    scale = np.exp2(np.random.default_rng(1).integers(-6, 2, (N, K // 32))).astype(E8M0)
    if element == "float8_e4m3fn":
        qdata = random(-400, 400, (N, K), E4M3)
        values = qdata.astype(np.float64)
    else:
        codes = np.random.default_rng(0).integers(0, 16, (N, K))
        qdata, values = (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8), FP4[codes]
    data = {"elem_dtype": dtype(element), "block_size": 32, "is_swizzled_scales": order is swizzled}
    found = decoded("MXTensor", {"qdata": qdata, "scale": order(scale)}, data)
    np.testing.assert_array_equal(weight_of(found), values * spread(scale, 32))
    assert found.act is None


@pytest.mark.parametrize(
    ("mode", "wanted"), [("FLOOR", "e8m0"), ("RCEIL", "e8m0_ceil"), ("even", "e8m0_even")]
)
def test_activations_of_mx(mode, wanted):
    """The text of a header names a mode, a pickled file has its value."""
    kwargs = {"elem_dtype": dtype("float8_e4m3fn"), "block_size": 32}
    kwargs["scaling_mode"] = {"_type": "ScaleCalculationMode", "_data": mode}
    data = {
        "elem_dtype": dtype("float8_e4m3fn"),
        "block_size": 32,
        "act_quant_kwargs": {"_type": "QuantizeTensorToMXKwargs", "_data": kwargs},
    }
    tensors = {"qdata": np.ones((N, K), E4M3), "scale": np.ones((N, K // 32), E8M0)}
    act = decoded("MXTensor", tensors, data).act
    assert (act.dtype, act.strategy, act.group_size, act.scale) == (
        "fp8_e4m3",
        "group",
        32,
        wanted,
    )
    kwargs["scaling_mode"]["_data"] = "CEIL"
    with pytest.raises(UnsupportedError, match="CEIL"):
        planned("MXTensor", tensors, data)


@pytest.mark.parametrize("whole", [None, 0.25])
def test_activations_of_nvfp4(whole):
    kwargs = {"block_size": 16, "use_dynamic_per_tensor_scale": False}
    data = {"act_quant_kwargs": {"_type": "QuantizeTensorToNVFP4Kwargs", "_data": kwargs}}
    tensors = {"qdata": np.zeros((N, K // 2), np.uint8), "scale": np.ones((N, K // 16), E4M3)}
    if whole:
        tensors["act_per_tensor_scale"] = np.full((), whole, np.float32)
    found = decoded("NVFP4Tensor", tensors, data)
    assert (found.act.dtype, found.act.group_size, found.act.scale) == ("fp4_e2m1", 16, "fp8_e4m3")
    assert found.aux["act_global_scale"].tolist() == [[whole or 1]]
    kwargs["use_dynamic_per_tensor_scale"] = True
    with pytest.raises(UnsupportedError, match="use_dynamic_per_tensor_scale"):
        planned("NVFP4Tensor", tensors, data)


@pytest.mark.parametrize(
    ("kind", "granularity", "mapping", "wanted"),
    [
        ("Int8Tensor", "PerRow", "SYMMETRIC", ("int8", "token", True, 127.5)),
        ("Int8Tensor", "PerTensor", "ASYMMETRIC", ("int8", "tensor", False, None)),
        ("Float8Tensor", "PerRow", "SYMMETRIC", ("fp8_e4m3", "token", True, None)),
    ],
)
def test_activations_of_eight_bits(kind, granularity, mapping, wanted):
    kwargs = {"granularity": {"_type": granularity}, "mapping_type": {"_data": mapping}}
    data = {"block_size": [1, K], "act_quant_kwargs": {"_type": "Kwargs", "_data": kwargs}}
    values = np.ones((N, K), np.int8 if kind == "Int8Tensor" else E4M3)
    act = decoded(kind, {"qdata": values, "scale": np.ones((N, 1), np.float32)}, data).act
    assert (act.dtype, act.strategy, act.symmetric, act.divisor) == wanted


@pytest.mark.parametrize(
    ("kind", "tensors", "data", "error", "message"),
    [
        ("AffineQuantizedTensor", {}, {}, UnsupportedError, "AffineQuantizedTensor"),
        ("Int8Tensor", {}, {"block_size": None}, CheckpointError, "block_size"),
        ("Int8Tensor", {}, {"block_size": [0, K]}, CheckpointError, "block_size"),
        ("Int8Tensor", {"scale": np.ones(3)}, {"block_size": [1, K]}, CheckpointError, "scale"),
        ("IntxUnpackedToInt8Tensor", {}, {"target_dtype": dtype("int9")}, UnsupportedError, "int9"),
        ("NVFP4Tensor", {"scale": np.ones((N, 1), E4M3)}, {}, CheckpointError, "qdata"),
        (
            "NVFP4Tensor",
            {
                "qdata": np.zeros((N, K // 2), np.uint8),
                "scale": np.ones((N, K // 16), E4M3),
                "per_tensor_scale": np.ones(2, np.float32),
            },
            {},
            CheckpointError,
            "per_tensor_scale",
        ),
        (
            "NVFP4Tensor",
            {
                "qdata": np.zeros((N, K // 2), np.uint8),
                "scale": np.ones((N, K // 16), E4M3),
            },
            {"is_swizzled_scales": True},
            CheckpointError,
            "scale",
        ),
        ("MXTensor", {}, {"elem_dtype": dtype("fp6_e2m3")}, UnsupportedError, "fp6_e2m3"),
    ],
)
def test_what_is_refused(kind, tensors, data, error, message):
    tensors = {"qdata": np.zeros((N, K), np.int8), "scale": np.ones((N, 1), np.float32)} | tensors
    with pytest.raises(error, match=message):
        planned(kind, tensors, data)


def test_a_header_that_does_not_describe_a_weight():
    stored = {"_weight_qdata": record(f"{MODULE}._weight_qdata", np.zeros((N, K), np.int8))}
    for text in ({}, {f"{MODULE}.weight": "["}, {f"{MODULE}.weight": '{"_type": 1}'}):
        checkpoint = Checkpoint("config.json", {}, text, {}.__getitem__)
        method = quantization_config("torchao").from_config({}, checkpoint)
        with pytest.raises(CheckpointError, match="does not describe"):
            method.layer(MODULE, stored, (N, K))
    assert method.layer(MODULE, {"weight": record("w", np.zeros((N, K)))}, (N, K)) is None
