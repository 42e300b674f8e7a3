"""GGUF's MXFP4 and NVFP4 against the `gguf` package, as one weight and as stacked experts; what is
refused."""

from dataclasses import dataclass

import numpy as np
import pytest

from qjax.errors import CheckpointError, UnsupportedError
from qjax.formats.gguf import GGUF
from qjax.qarray import QArray
from tests.formats.stored import whole


@dataclass(frozen=True)
class Tensor:
    """A record of a file's header."""

    qtype: str
    shape: tuple[int, ...]
    name: str = "blk.0.ffn_up.weight"
    file: str = "model.gguf"
    offset: int = 64


@pytest.fixture(scope="module")
def blocks(golden):
    """qtype -> (raw uint8 [blocks, bytes], float32 [blocks, elements]); see make_gguf_blocks.py."""
    with np.load(golden / "gguf_blocks.npz") as file:
        return {name: (file[f"{name}/raw"], file[f"{name}/values"]) for name in ("mxfp4", "nvfp4")}


def read(qtype, raw, shape, scale=None):
    stored = {"weight": Tensor(qtype, shape)}
    arrays = {"weight": raw}
    if scale is not None:
        stored |= {
            "scale": Tensor("f32", scale.shape, "blk.0.ffn_up.scale"),
            "input_scale": Tensor("f32", scale.shape, "blk.0.ffn_up.input_scale"),
        }
        arrays["scale"] = scale
    layer = GGUF().layer("model.layers.0.mlp.up_proj", stored, shape)
    assert layer.reads == tuple(arrays)
    return whole(layer, arrays)


@pytest.mark.parametrize("experts", [(), (2,)])
@pytest.mark.parametrize("qtype", ["mxfp4", "nvfp4"])
def test_fp4_blocks(blocks, qtype, experts):
    raw, values = (array[:16].reshape(*experts, 4, -1) for array in blocks[qtype])
    weight = read(qtype, raw, values.shape)
    assert weight.qtype == "fp4_e2m1"
    assert weight.nbytes == raw.nbytes
    np.testing.assert_array_equal(weight.dequantize(), values)
    np.testing.assert_array_equal(GGUF().encode("up_proj", weight)["weight"], raw)


@pytest.mark.parametrize("scale", [[0.37], [0.37, 0.0021]])
def test_scale_of_the_tensor(blocks, scale):
    scale = np.array(scale, np.float32)
    experts = (2,) if len(scale) == 2 else ()
    raw, values = (array[:16].reshape(*experts, 4, -1) for array in blocks["nvfp4"])
    weight = read("nvfp4", raw, values.shape, scale)
    wanted = values.astype(np.float64) * scale.reshape(*experts, 1, 1)
    np.testing.assert_allclose(weight.dequantize(), wanted, rtol=3e-7, atol=0)
    tensors = GGUF().encode("up_proj", weight)
    np.testing.assert_array_equal(tensors["weight"], raw)
    np.testing.assert_array_equal(tensors["scale"], scale)


def test_scale_that_would_be_nan_is_zero(blocks):
    """As in ggml: ggml_ue4m3_to_fp32."""
    raw = blocks["nvfp4"][0][:1].copy()
    raw[0, 1] = 0x7F
    decoded = np.asarray(read("nvfp4", raw, (1, 64)).dequantize())
    np.testing.assert_array_equal(decoded[0, 16:32], np.zeros(16))
    np.testing.assert_array_equal(
        np.delete(decoded, np.s_[16:32]), np.delete(blocks["nvfp4"][1][:1], np.s_[16:32])
    )


def test_negative_scale(blocks):
    raw = blocks["nvfp4"][0][:1].copy()
    raw[0, 2] |= 0x80
    with pytest.raises(CheckpointError, match=r"ffn_up.weight.* sign bit"):
        read("nvfp4", raw, (1, 64))


@pytest.mark.parametrize("qtype", ["i8", "i16", "i32", "i64", "f64", "q8_1", "q8_k"])
def test_types_that_no_weight_has(qtype):
    with pytest.raises(UnsupportedError, match=rf"ffn_up.weight: type {qtype} is not supported"):
        read(qtype, np.zeros((2, 64), np.uint8), (2, 64))


def test_wrong_shapes(blocks):
    stored = {"weight": Tensor("nvfp4", (4, 64)), "scale": Tensor("f32", (4,))}
    with pytest.raises(CheckpointError, match=r"has shape \(4,\), .* \(1,\)"):
        GGUF().layer("up_proj", stored, (4, 64))
    with pytest.raises(CheckpointError, match=r"has shape \(4, 64\), .* \(8, 64\)"):
        GGUF().layer("up_proj", stored, (8, 64))


def test_weights_without_a_type():
    codes = np.zeros((2, 32), np.uint8)
    weight = QArray(codes, "fp8_e4m3", (2, 32), np.ones((2, 1), np.float32), group=(1, 32))
    with pytest.raises(UnsupportedError, match="up_proj: no type of GGUF holds fp8_e4m3"):
        GGUF().encode("up_proj", weight)
