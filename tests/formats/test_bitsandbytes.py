"""Weights that bitsandbytes quantized, and the values that it dequantizes them to."""

import json
from pathlib import Path

import numpy as np
import pytest

from qjax.errors import CheckpointError, UnsupportedError
from tests.formats.stored import MODULE, decoded, planned, quantization, record, weight_of, whole

FILE = Path(__file__).resolve().parent.parent / "golden" / "bitsandbytes.npz"
CASES = [f"{k}_{s}" for k in ("nf4", "fp4") for s in ("64_plain", "128_nested", "512_plain")]
SHAPE = (6, 256)
CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}


def tensors_of(case):
    with np.load(FILE) as file:
        parts = {k.removeprefix(case + "/"): file[k] for k in file.files if k.startswith(case)}
    return parts, parts.pop("dequantized", None)


def state_name(tensors):
    return next(name for name in tensors if "quant_state" in name)


@pytest.mark.parametrize("case", CASES)
def test_golden(case):
    tensors, wanted = tensors_of(case)
    weight = decoded(CONFIG, tensors, SHAPE)
    if wanted is None:  # blocks of two rows, by their definition
        pairs = np.stack([tensors["weight"] >> 4, tensors["weight"] & 15], 1).reshape(-1)
        values = tensors["weight.quant_map"][pairs].reshape(-1, 512)
        wanted = (values * tensors["weight.absmax"][:, None]).reshape(SHAPE)
    np.testing.assert_array_equal(weight_of(weight).astype(np.float32), wanted)
    with np.load(FILE) as file:
        assert np.abs(weight_of(weight) - file["original"]).mean() < 0.14


@pytest.mark.parametrize("dtype", ["int8", "int16", "float16", "float32", "float64"])
def test_storage_types(dtype):
    """The bytes are the same in whatever type they are stored."""
    tensors, wanted = tensors_of("nf4_64_plain")
    tensors["weight"] = tensors["weight"].reshape(-1).view(dtype).reshape(-1, 1)
    weight = decoded(CONFIG, tensors, SHAPE)
    np.testing.assert_array_equal(weight_of(weight).astype(np.float32), wanted)


@pytest.mark.parametrize("case", ["nf4_64_plain", "fp4_64_plain", "nf4_512_plain"])
def test_way_back(case):
    tensors, _ = tensors_of(case)
    config = CONFIG | {"bnb_4bit_quant_type": case[:3]}
    weight = decoded(config, tensors, SHAPE)
    method = quantization(config, tensors)
    written = method.encode("m", weight)
    assert written.keys() == tensors.keys()
    for name in tensors.keys() - {state_name(tensors)}:
        np.testing.assert_array_equal(written[name], tensors[name])
    state = json.loads(written[state_name(tensors)].tobytes())
    stored = json.loads(tensors[state_name(tensors)].tobytes())
    assert all(state[key] == stored[key] for key in ("quant_type", "blocksize", "shape", "dtype"))
    assert method.to_config() == config


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dequantized_in_half_precision(dtype):
    tensors, wanted = tensors_of("nf4_64_plain")
    state = json.loads(tensors[state_name(tensors)].tobytes()) | {"dtype": dtype}
    tensors[state_name(tensors)] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    weight = decoded(CONFIG, tensors, SHAPE)
    np.testing.assert_array_equal(
        np.asarray(weight.dequantize()), wanted.astype(dtype).astype(np.float32)
    )
    written = quantization(CONFIG, tensors).encode("m", weight)
    assert json.loads(written[state_name(written)].tobytes()) == state


@pytest.mark.parametrize("suffix", ["SCB", "weight.SCB"])
def test_int8(suffix):
    rng = np.random.default_rng(0)
    q = rng.integers(-127, 128, (8, 16)).astype(np.int8)
    scb = rng.uniform(0.5, 2, 8).astype(np.float32)
    tensors = {"weight": q, suffix: scb, "weight_format": np.zeros((), np.uint8)}
    weight = decoded(INT8, tensors, (8, 16))
    wanted = q.astype(np.float64) * scb[:, None] / 127
    np.testing.assert_allclose(weight_of(weight), wanted, rtol=3e-7)
    assert weight.act is not None
    assert (weight.act.dtype, weight.act.outliers) == ("int8", 6.0)
    plain = decoded(INT8 | {"llm_int8_threshold": 0.0}, tensors, (8, 16))
    assert plain.act is not None
    assert plain.act.outliers is None


def test_int8_of_another_layout():
    tensors = {"weight": np.ones((8, 16), np.int8), "SCB": np.ones(8, np.float32)}
    tensors["weight_format"] = np.array(2, np.uint8)
    with pytest.raises(UnsupportedError, match="row-major"):
        decoded(INT8, tensors, (8, 16))


def test_skipped_modules_are_plain():
    assert planned(CONFIG, {"weight": np.ones((8, 16), np.float16)}, (8, 16)) is None


def test_blocks_across_rows():
    """Rows of 96 in blocks of 64: some lie in two rows, and are taken in halves."""
    tensors, _ = tensors_of("nf4_64_plain")
    shape = tuple(json.loads(tensors[state_name(tensors)].tobytes())["shape"])
    wanted = weight_of(decoded(CONFIG, tensors, shape))
    state = json.loads(tensors[state_name(tensors)].tobytes()) | {"shape": [16, 96]}
    tensors[state_name(tensors)] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    found = decoded(CONFIG, tensors, (16, 96))
    assert found.group == (1, 32)
    np.testing.assert_array_equal(weight_of(found), wanted.reshape(16, 96))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"shape": [256, 6]}, "says shape"),
        ({"blocksize": 0}, "out of range"),
        ({"blocksize": 32}, "absmax"),
        ({"blocksize": "x"}, "is no quant_state"),
        ({"dtype": "int3"}, "is no quant_state"),
        ({"nested_blocksize": 256}, "absmax"),
        ({"nested_offset": float("nan")}, "out of range"),
    ],
)
def test_quant_state_that_contradicts(change, match):
    tensors, _ = tensors_of("nf4_64_plain")
    state = json.loads(tensors[state_name(tensors)].tobytes()) | change
    tensors[state_name(tensors)] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    with pytest.raises(CheckpointError, match=match):
        planned(CONFIG, tensors, SHAPE)


def test_unknown_key():
    with pytest.raises(UnsupportedError, match="unheard_of"):
        quantization(CONFIG | {"unheard_of": 1})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounded_as_it_is_read(dtype):
    """A full-precision weight becomes the bytes that the tool makes of it."""
    tensors, wanted = tensors_of("nf4_64_plain")
    with np.load(FILE) as file:
        dense = file["original"].astype(dtype)
    layer = quantization({}, method="bitsandbytes").layer(
        MODULE, {"weight": record(f"{MODULE}.weight", dense)}, SHAPE
    )
    weight = whole(layer, {"weight": dense})
    if dtype == "float32":
        np.testing.assert_array_equal(weight_of(weight), wanted)
        written = quantization({}, method="bitsandbytes").encode(MODULE, weight)
        assert written.keys() == tensors.keys()
        for name in tensors.keys() - {state_name(tensors)}:
            np.testing.assert_array_equal(written[name], tensors[name])
    else:  # its steps are at most 0.31 of the largest number of a block wide
        assert weight.rounded == "bfloat16"
        blocks = dense.astype(np.float64).reshape(-1, 64)
        errors = np.abs(weight_of(weight).reshape(-1, 64) - blocks)
        assert (errors <= 0.16 * np.abs(blocks).max(1, keepdims=True)).all()


def test_what_is_not_rounded():
    method = quantization({}, method="bitsandbytes")
    stored = {"weight": record("w", np.zeros((8, 96), np.float16))}
    assert method.layer("lm_head", stored, (8, 96)) is None
    with pytest.raises(CheckpointError, match="rows of 96, which blocks of 64 do not fill"):
        method.layer(MODULE, stored, (8, 96))
