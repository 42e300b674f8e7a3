from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qjax.errors import CheckpointError, UnsupportedError
from qjax.formats import online
from qjax.parts import read
from tests.formats.stored import MODULE, decoded, planned, quantization, weight_of

CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic"}
E4M3 = ml_dtypes.float8_e4m3fn


def codes(*shape, dtype=E4M3):
    values = np.random.default_rng(0).uniform(-400, 400, shape)
    return values.astype(dtype)


def spread(scale, rows, columns, shape):
    """Scales of blocks as one for each weight, float64."""
    every = np.asarray(scale, np.float64).repeat(rows, -2).repeat(columns, -1)
    return every[..., : shape[-2], : shape[-1]]


@pytest.mark.parametrize("dtype", [E4M3, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (16,), (16, 1)])
def test_scale_of_the_weight_or_of_rows(shape, dtype):
    tensors = {"weight": codes(16, 32, dtype=dtype)}
    scale = np.random.default_rng(1).uniform(0.1, 1, shape).astype(np.float32)
    tensors["weight_scale"] = scale
    found = decoded(CONFIG, tensors, (16, 32))
    assert found.group == ((16, 32) if scale.size == 1 else (1, 32))
    assert (found.act.strategy, found.act.dynamic) == ("token", True)
    weight = tensors["weight"].astype(np.float64) * scale.astype(np.float64).reshape(-1, 1)
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-6)


@pytest.mark.parametrize("block", [(64, 64), (32, 128), (128, 32), (48, 80)])
def test_blocks(block):
    """The last of them may be partial."""
    grid = (-(-96 // block[0]), -(-192 // block[1]))
    scale = np.random.default_rng(1).uniform(0.1, 1, grid).astype(np.float32)
    tensors = {"weight": codes(96, 192), "weight_scale_inv": scale}
    config = CONFIG | {"weight_block_size": list(block)}
    found = decoded(config, tensors, (96, 192))
    assert found.group == block
    assert (found.act.strategy, found.act.group_size) == ("group", block[1])
    wanted = tensors["weight"].astype(np.float64) * spread(scale, block[0], block[1], (96, 192))
    np.testing.assert_allclose(weight_of(found), wanted, rtol=1e-6)
    written = quantization(config).encode(MODULE, found)
    for suffix, array in written.items():
        np.testing.assert_array_equal(array, tensors[suffix], suffix)


def test_scales_that_are_powers_of_two():
    scale = np.array([[0.5, 2.0], [1.0, 0.25]]).astype(ml_dtypes.float8_e8m0fnu)
    tensors = {"weight": codes(64, 64), "weight_scale_inv": scale}
    config = CONFIG | {"weight_block_size": [32, 32], "scale_fmt": "ue8m0"}
    found = decoded(config, tensors, (64, 64))
    assert found.act.scale == "e8m0_ceil"
    wanted = tensors["weight"].astype(np.float64) * spread(scale, 32, 32, (64, 64))
    np.testing.assert_array_equal(weight_of(found), wanted)


def test_a_weight_inside_of_one_block():
    """Its inputs are rounded as those of other weights with blocks, and it is written so."""
    tensors = {"weight": codes(64, 96), "weight_scale_inv": np.full((1, 1), 0.5, np.float32)}
    config = CONFIG | {"weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    found = decoded(config, tensors, (64, 96))
    assert (found.act.strategy, found.act.group_size) == ("group", 128)
    assert found.act.scale == "e8m0_ceil"
    np.testing.assert_array_equal(weight_of(found), tensors["weight"].astype(np.float64) / 2)
    written = quantization(config).encode(MODULE, found)
    assert {name: array.shape for name, array in written.items()} == {
        "weight": (64, 96),
        "weight_scale_inv": (1, 1),
    }


@pytest.mark.parametrize("name", ["input_scale", "activation_scale"])
@pytest.mark.parametrize("blocks", [False, True])
def test_scales_of_inputs(name, blocks):
    """vLLM's name and that of transformers, which also has them beside blocks."""
    tensors = {"weight": codes(64, 64), name: np.array([0.02], np.float32)}
    if blocks:
        tensors["weight_scale_inv"] = np.ones((2, 2), np.float32)
    else:
        tensors["weight_scale"] = np.ones((), np.float32)
    config = CONFIG | {"activation_scheme": "static"}
    config |= {"weight_block_size": [32, 32]} if blocks else {}
    found = decoded(config, tensors, (64, 64))
    assert (found.act.strategy, found.act.dynamic) == ("tensor", False)
    assert found.aux["act_scale"].tolist() == [[np.float32(0.02)]]
    del tensors[name]
    with pytest.raises(CheckpointError, match="input_scale: missing"):
        planned(config, tensors, (64, 64))


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 1)])
def test_stacked_experts(shape):
    scale = np.arange(1, 5, dtype=np.float32).reshape(shape)
    tensors = {"weight": codes(4, 16, 32), "weight_scale": scale, "input_scale": scale}
    config = CONFIG | {"activation_scheme": "static"}
    found = decoded(config, tensors, (4, 16, 32))
    assert found.aux["act_scale"].ravel().tolist() == [1, 2, 3, 4]
    wanted = tensors["weight"].astype(np.float64) * np.arange(1, 5)[:, None, None]
    np.testing.assert_array_equal(weight_of(found), wanted)


@pytest.mark.parametrize("suffix", ["weight_scale", "input_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (16,)])
def test_stacked_experts_have_scales_of_their_own(suffix, shape):
    scale = np.ones(4, np.float32)
    tensors = {"weight": codes(4, 16, 32), "weight_scale": scale, "input_scale": scale}
    tensors[suffix] = np.ones(shape, np.float32)
    with pytest.raises(CheckpointError, match=suffix):
        planned(CONFIG | {"activation_scheme": "static"}, tensors, (4, 16, 32))


def test_fbgemm():
    tensors = {"weight": codes(16, 32), "weight_scale": np.full((16, 1), 0.5, np.float32)}
    found = decoded(
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, tensors, (16, 32)
    )
    assert (found.act.strategy, found.act.upper_bound) == ("token", 1200.0)
    np.testing.assert_array_equal(weight_of(found), tensors["weight"].astype(np.float64) / 2)


@pytest.mark.parametrize("shape", [(), (16,), (2, 2)])
def test_scales_that_are_divided_by(shape):
    """GPTQModel's method fp8, which rounds no inputs."""
    scale = np.exp2(np.arange(1, 1 + np.prod(shape, dtype=int))).astype(np.float32).reshape(shape)
    config = {"quant_method": "fp8", "weight_scale_semantics": "inverse", "bits": 8}
    config |= {"method": "fp8", "format": "float8_e4m3fn", "group_size": -1, "meta": {}}
    config |= {"weight_block_size": [8, 16]} if len(shape) == 2 else {}
    tensors = {"weight": codes(16, 32), "weight_scale_inv": scale}
    found = decoded(config, tensors, (16, 32))
    assert found.act is None
    each = spread(scale, 8, 16, (16, 32)) if len(shape) == 2 else scale.reshape(-1, 1)
    np.testing.assert_array_equal(weight_of(found), tensors["weight"].astype(np.float64) / each)
    for suffix, array in quantization(config).encode(MODULE, found).items():
        np.testing.assert_array_equal(array, tensors[suffix], suffix)
    with pytest.raises(UnsupportedError, match="weight_scale_semantics"):
        quantization(config | {"weight_scale_semantics": "other"})


def test_plain_layers():
    """Those that no block divides are left alone; transformers writes scales that mean nothing."""
    plain: dict[str, Any] = {"weight": np.ones((16, 32), np.float16)}
    config = CONFIG | {"weight_block_size": [128, 128]}
    assert planned(config, plain, (16, 32)) is None
    plain["weight_scale_inv"] = np.zeros((1, 1), np.float32)
    np.testing.assert_array_equal(weight_of(decoded(config, plain, (16, 32))), plain["weight"])


def test_rounded_as_it_is_read():
    """One scale for the weight, absmax / 448; rows of zeros stay zeros."""
    dense = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    dense[3] = 0
    found = read(online.per_tensor(dense, None))
    scale = np.float32(np.abs(dense).max()) / np.float32(448)
    assert found.scale.tolist() == [[scale]]
    wanted = (dense / scale).astype(E4M3).astype(np.float64) * np.float64(scale)
    np.testing.assert_allclose(weight_of(found), wanted, rtol=1e-6)
    assert not weight_of(read(online.per_tensor(np.zeros((2, 2)), None))).any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"activation_scheme": "other"}, UnsupportedError, "activation_scheme"),
        ({"weight_block_size": [128]}, CheckpointError, "weight_block_size"),
        ({"scale_fmt": "e8"}, UnsupportedError, "scale_fmt"),
        ({"fmt": "e5m2"}, UnsupportedError, "fmt"),
        ({"expert_dtype": "fp4"}, UnsupportedError, "expert_dtype"),
        ({"new_key": 1}, UnsupportedError, "new_key"),
    ],
)
def test_settings_that_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        quantization(CONFIG | change)


@pytest.mark.parametrize(
    ("suffix", "array"),
    [
        ("weight", np.zeros((16, 16), E4M3)),
        ("weight", np.zeros((16, 32), np.int8)),
        ("weight_scale", np.ones((8, 3), np.float32)),
        ("weight_scale", np.ones((), np.int32)),
    ],
)
def test_tensors_that_do_not_fit(suffix, array):
    tensors = {"weight": codes(16, 32), "weight_scale": np.ones((), np.float32)}
    with pytest.raises(CheckpointError, match=suffix):
        planned(CONFIG, tensors | {suffix: array}, (16, 32))


def test_layers_that_are_excluded():
    tensors = {"weight": codes(16, 32), "weight_scale": np.ones((), np.float32)}
    for key in ("ignored_layers", "modules_to_not_convert"):
        with pytest.raises(CheckpointError, match="excludes"):
            planned(CONFIG | {key: ["mlp.up_proj"]}, tensors, (16, 32))
