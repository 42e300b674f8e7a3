from dataclasses import replace

import numpy as np
import pytest

from qjax.errors import CheckpointError, UnsupportedError
from qjax.qarray import QArray
from tests.formats.stored import MODULE, decoded, planned, quantization, weight_of

BITS = {"8bit_u8": 8, "4bit_u8": 4, "3bit_32": 3, "2bit_u8": 2, "1bit_u8": 1}


def config(nbits=4, group_size: int | None = 64, axis=1, **more):
    params = {"nbits": nbits, "group_size": group_size, "axis": axis, "channel_wise": True}
    quant = {"weight_quant_params": params | more, "scale_quant_params": None}
    quant |= {"zero_quant_params": None, "offload_meta": False}
    return {"quant_method": "hqq", "quant_config": quant, "skip_modules": ["lm_head"]}


def packed(codes, packing):
    """Rows in equal parts, the first part in the highest bits of each word; rows of zeros fill up
    where 10 codes share 32 bits."""
    bits = BITS[packing]
    count = 10 if packing == "3bit_32" else 8 // bits
    codes = np.concatenate([codes, np.zeros((-len(codes) % count, codes.shape[1]), codes.dtype)])
    parts = codes.reshape(count, -1, codes.shape[1]).astype(np.int64)
    shifts = bits * np.arange(count - 1, -1, -1)
    word = np.bitwise_or.reduce(parts << shifts[:, None, None])
    return word.astype(np.int32 if packing == "3bit_32" else np.uint8)


def layer(packing, n, k, size, axis, nbits=None):
    """Tensors of a random layer as HQQ saves them, and the float64 weight that they mean."""
    rng = np.random.default_rng(0)
    bits = BITS[packing]
    shape = (n, k) if size is None else (n * k // size, size) if axis else (size, n * k // size)
    codes = rng.integers(0, 1 << bits, shape)
    line = (shape[0], 1) if axis else (1, shape[1])
    scale = rng.uniform(0.5, 2, line).astype(np.float32)
    zero = rng.uniform(0, 1 << bits, line).astype(np.float32)
    flags = {"channel_wise": 1, "encoded_state_dict": 1, "offload_meta": 0, "optimize": 1}
    flags |= {"quant_scale": 0, "quant_zero": 0, "round_zero": 0, "stores_quant_config": 1}
    tensors = {
        "W_q": packed(codes, packing),
        "scale": scale,
        "zero": zero,
        "shape": np.array([n, k]),
        "nbits": np.array(bits if nbits is None else nbits, np.int32),
        "axis": np.array(axis, np.int32),
        **{name: np.array(value, np.uint8) for name, value in flags.items()},
        "view_as_float": np.array(0, np.uint8),
        "packing": np.frombuffer(packing.encode(), np.uint8),
        "compute_dtype": np.frombuffer(b"torch.float32", np.uint8),
        "unpack_view_dtype": np.frombuffer(b"torch.uint8", np.uint8),
    }
    if size is not None:
        tensors["group_size"] = np.array(size, np.int32)
    weight = (codes - zero.astype(np.float64)) * scale
    return tensors, weight.reshape(n, k)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("packing", BITS)
def test_every_packing(packing, axis):
    tensors, weight = layer(packing, 128, 64, 32, axis)
    found = decoded(config(BITS[packing], 32, axis), tensors, (128, 64))
    assert found.group == ((1, 32) if axis else (32, 1))
    assert found.zero_point.dtype == np.float32
    assert ("output_perm" in found.aux) == (axis == 0)
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-5, atol=1e-6)
    method = quantization(config(BITS[packing], 32, axis))
    written = method.encode(MODULE, found)
    tensors["unpack_view_dtype"] = written["unpack_view_dtype"]
    assert written.keys() == tensors.keys()
    for suffix, array in written.items():
        assert array.dtype == tensors[suffix].dtype
        np.testing.assert_array_equal(array, tensors[suffix], suffix)
    assert quantization(method.to_config()).settings == method.settings


@pytest.mark.parametrize("axis", [0, 1])
def test_whole_rows_and_columns(axis):
    tensors, weight = layer("4bit_u8", 16, 64, None, axis)
    found = decoded(config(4, None, axis), tensors, (16, 64))
    assert found.group == ((1, 64) if axis else (16, 1))
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_group_that_is_a_whole_row_or_column(axis):
    """Where the config tells no size, HQQ stores the one that each layer had."""
    tensors, weight = layer("4bit_u8", 16, 64, (16, 64)[axis], axis)
    found = decoded(config(4, None, axis), tensors, (16, 64))
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-5, atol=1e-6)


def test_settings_of_scales_that_stayed_floats():
    tensors, weight = layer("4bit_u8", 16, 64, 32, 1)
    found = config(4, 32, 1)
    found["quant_config"]["scale_quant_params"] = {"nbits": 8, "group_size": 128}
    np.testing.assert_allclose(
        weight_of(decoded(found, tensors, (16, 64))), weight, rtol=1e-5, atol=1e-6
    )


def test_what_has_no_layout_is_not_written():
    tensors, _ = layer("4bit_u8", 128, 64, 32, 0)
    found = decoded(config(4, 32, 0), tensors, (128, 64))
    with pytest.raises(UnsupportedError, match="the config says"):
        quantization(config(4, 64, 0)).encode(MODULE, found)
    with pytest.raises(UnsupportedError, match="order"):
        quantization(config(4, 32, 0)).encode(MODULE, replace(found, aux={}))
    with pytest.raises(UnsupportedError, match="f16"):
        quantization(config()).encode(MODULE, QArray.from_dense(np.ones((4, 64), np.float16)))


def test_one_scale_for_the_weight():
    tensors, _ = layer("8bit_u8", 16, 64, None, 1)
    tensors["channel_wise"] = np.array(0, np.uint8)
    for suffix in ("scale", "zero"):
        tensors[suffix] = tensors[suffix][0].reshape(())
    found = decoded(config(8, None, 1), tensors, (16, 64))
    assert found.group == (16, 64)
    weight = (tensors["W_q"].astype(np.float64) - tensors["zero"]) * tensors["scale"]
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-5, atol=1e-6)


def test_words_that_are_shown_as_floats():
    tensors, weight = layer("4bit_u8", 16, 64, 32, 1)
    tensors["W_q"] = tensors["W_q"].view(np.float16)
    tensors["view_as_float"] = np.array(1, np.uint8)
    found = decoded(config(4, 32, 1), tensors, (16, 64))
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("start", "stop"), [(0, 64), (64, 128), (32, 36)])
def test_some_rows_of_interleaved_groups(start, stop):
    """A group takes one row of each run of 4: some runs of a joined layer are a layer again."""
    tensors, weight = layer("4bit_u8", 128, 64, 32, 0)
    found = decoded(config(4, 32, 0), tensors, (128, 64)).rows(slice(start, stop))
    assert found.group == ((stop - start) // 4, 1)
    np.testing.assert_allclose(weight_of(found), weight[start:stop], rtol=1e-5, atol=1e-6)


def test_rows_that_cut_a_run_are_refused():
    tensors, _ = layer("4bit_u8", 128, 64, 32, 0)
    found = decoded(config(4, 32, 0), tensors, (128, 64))
    with pytest.raises(UnsupportedError, match="unequal parts"):
        found.rows(slice(0, 30))


def test_settings_by_layer():
    """Hugging Face's config may name layers by the end of their names."""
    tensors, weight = layer("4bit_u8", 16, 64, 32, 1)
    params = {"nbits": 4, "group_size": 32, "axis": 1}
    by_layer = {"quant_method": "hqq", "quant_config": {"mlp.up_proj": params}}
    found = decoded(by_layer, tensors, (16, 64))
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-5, atol=1e-6)
    by_layer["quant_config"] = {"mlp.up_proj": params | {"nbits": 2}}
    with pytest.raises(CheckpointError, match="nbits=2"):
        planned(by_layer, tensors, (16, 64))


@pytest.mark.parametrize("change", [{"nbits": 8}, {"group_size": 32}, {"axis": 0}])
def test_config_and_tensors_disagree(change):
    tensors, _ = layer("4bit_u8", 64, 64, 64, 1)
    with pytest.raises(CheckpointError, match="but the config says"):
        planned(config(**change), tensors, (64, 64))


@pytest.mark.parametrize(
    ("suffix", "value", "error", "message"),
    [
        ("shape", np.array([64, 32]), CheckpointError, "shape"),
        ("quant_zero", np.array(1, np.uint8), UnsupportedError, "quant_zero"),
        ("packing", np.frombuffer(b"5bit_u8", np.uint8), UnsupportedError, "5bit_u8"),
        ("packing", np.frombuffer(b"2bit_u8", np.uint8), UnsupportedError, "2bit_u8"),
        ("scale", np.ones((2, 1), np.float32), CheckpointError, "scale"),
        ("W_q", np.zeros((8, 64), np.uint8), CheckpointError, "W_q"),
        ("nbits", np.zeros(1000, np.int32), CheckpointError, "nbits"),
    ],
)
def test_tensors_that_are_refused(suffix, value, error, message):
    tensors, _ = layer("4bit_u8", 64, 64, 64, 1)
    with pytest.raises(error, match=message):
        planned(config(), tensors | {suffix: value}, (64, 64))


@pytest.mark.parametrize("suffix", ["scale", "zero", "nbits", "axis", "packing", "shape"])
def test_missing_tensors(suffix):
    tensors, _ = layer("4bit_u8", 64, 64, 64, 1)
    del tensors[suffix]
    with pytest.raises(CheckpointError, match=f"{suffix}: missing"):
        planned(config(), tensors, (64, 64))


def test_groups_across_rows():
    """Groups of 64 in rows of 96 are taken in halves; parts of 8 would be too many."""
    tensors, weight = layer("4bit_u8", 64, 96, 64, 1)
    found = decoded(config(), tensors, (64, 96))
    assert found.group == (1, 32)
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-5, atol=1e-6)
    tensors, _ = layer("4bit_u8", 64, 72, 64, 1)
    with pytest.raises(UnsupportedError, match="two rows"):
        planned(config(), tensors, (64, 72))


def test_layers_that_are_skipped():
    tensors, _ = layer("4bit_u8", 64, 64, 64, 1)
    with pytest.raises(CheckpointError, match="skip_modules"):
        planned(config() | {"skip_modules": ["up_proj"]}, tensors, (64, 64))
    assert planned(config(), {"weight": np.zeros((64, 64), np.float32)}, (64, 64)) is None


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (config() | {"new_key": 1}, "new_key"),
        (config(new_key=1), "new_key"),
        (config(axis=2), "axis 2"),
    ],
)
def test_settings_that_are_refused(found, message):
    with pytest.raises(UnsupportedError, match=message):
        quantization(found, module=MODULE)
