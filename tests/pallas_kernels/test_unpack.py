"""The decoders against `gguf` and ggml: hashes of fixed blocks, random blocks bit for bit."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import unpack
from pallas_kernels.iq_grids import grid
from pallas_kernels.matmul import ref

# One block with bytes (73 i + 19) mod 256 and float16 fields set as listed, decoded by gguf 0.19:
# first values and the first 16 hex digits of the SHA-256 of all of them as little-endian float32.
FIXED = {
    "q4_0": ({0: 1.0}, [-3, 6, -1, -8, 1, -6], "52af0ebf807a319a"),
    "q4_1": ({0: 1.0, 2: 0.5}, [7.5, 0.5, 9.5, 2.5, 11.5, 4.5], "8c831b2629e1f0f8"),
    "q5_0": ({0: 1.0}, [9, -14, 11, -12, -3, 6], "cf39180dac3a0546"),
    "q5_1": ({0: 1.0, 2: 0.5}, [27.5, 20.5, 29.5, 6.5, 31.5, 24.5], "b408d367538c494e"),
    "q8_0": ({0: 1.0}, [-91, -18, 55, -128, -55, 18], "dbfb0939c48d9791"),
    "q2_k": ({80: 1.0, 82: 0.5}, [8.5, -0.5, 2.5, 5.5, 8.5, -0.5], "078b4aae90214453"),
    "q3_k": ({108: 1.0}, [57, -76, 19, -38, 57, -76], "4bf8b389f803a32d"),
    "q4_k": ({0: 1.0, 2: 0.5}, [151.5, 646.5, 261.5, 756.5, 371.5, -13.5], "8e00fcc780862926"),
    "q5_k": ({0: 1.0, 2: 0.5}, [1031.5, 646.5, 1141.5, 756.5, 1251.5, -13.5], "b87dec6af0e9d707"),
    "q6_k": ({208: 1.0}, [-855, 900, 495, -630, -1035, 1440], "0dac2ff12610a613"),
    "iq4_nl": ({0: 1.0}, [-35, 89, -10, -127, 13, -83], "ba3ec0b78757bb12"),
    "iq4_xs": ({0: 1.0}, [-342, 441, -621, 198, -1017, -9], "69cc609ab430546b"),
    "iq2_xxs": ({0: 1.0}, [-21, 21, 65.625, -21, 21, 112.875], "546df5ff940e9257"),
    "iq2_xs": ({0: 1.0}, [-11, -34.375, -34.375, 59.125, -34.375, -11], "377eeaeb97e154f7"),
    "iq2_s": ({0: 1.0}, [-84.375, 145.125, -27, 27, 27, 84.375], "dd0c916212c41962"),
    "iq3_xxs": ({0: 1.0}, [-25, 25, -275, 175, 25, -75], "a595cecbcdbec132"),
    "iq3_s": ({0: 1.0}, [-189, 135, -135, -297, 189, -297], "7dd0502e3e3f7872"),
    "iq1_s": ({0: 1.0}, [-0.875, 1.125, -0.875, 1.125, -0.875, -0.875], "07bece7679f0b30d"),
    "tq1_0": ({52: 1.0}, [-1, 0, 0, 1, -1, 0], "273a1d8c9e4f44c2"),
    "tq2_0": ({64: 1.0}, [2, -1, 0, 1, 2, -1], "de6ec88c1c2ef5eb"),
}


def decoders(qtype):
    traced = jax.jit(unpack.dequantize, static_argnums=1)
    return {
        "numpy": lambda raw: unpack.dequantize(raw, qtype, np),
        "jax": lambda raw: np.asarray(traced(raw, qtype)),
        "ref": lambda raw: np.asarray(jax.jit(ref.decode_blocks, static_argnums=1)(raw, qtype)),
    }


@pytest.mark.parametrize("qtype", FIXED)
def test_fixed_block(qtype):
    halves, first, digest = FIXED[qtype]
    block = (np.arange(unpack.BLOCKS[qtype][1]) * 73 + 19).astype(np.uint8)
    for offset, value in halves.items():
        block[offset : offset + 2] = np.array([value], "<f2").view(np.uint8)
    values = unpack.dequantize(block[None], qtype, np)[0]
    assert values[:6].tolist() == first
    assert hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()[:16] == digest


# SHA-256 of the grids of the `gguf` package, as int8 in the order of rows.
GRIDS = {
    "iq2_xxs": "05826b5d3e472a3a78f196be62ac78acf81df0f909626e12ab9fa2a5d490dd54",
    "iq2_xs": "06e47aaca60b4dc1d9b5a3f34540437058a6b142b4d7a59d5ded769b4d1bf1de",
    "iq2_s": "e1aa1473412b0552c2174c30ef22ab4073f6a181b85a17056e8249bd2932fd88",
    "iq3_xxs": "46e35f5a997efdee6c99ce57854c8a0d4f0ff8ca57e5e8a60c0793ea580acf5d",
    "iq3_s": "bd1af4945a1717c65610b0284e4628b9a1ba3b306fae3a06f6e5f597356e349f",
    "iq1": "07540ffc1aeaf6ad4d97e96b0fcc765aae39671d4ae4a27bbd0e796fde167c6a",
}


@pytest.mark.parametrize("name", GRIDS)
def test_grids(name):
    assert hashlib.sha256(grid(name).tobytes()).hexdigest() == GRIDS[name]


@pytest.mark.parametrize("qtype", unpack.BLOCKS)
def test_random_blocks(golden_blocks, qtype):
    raw, values = golden_blocks[qtype]
    for name, decode in decoders(qtype).items():
        decoded = decode(raw)
        assert decoded.dtype == np.float32
        np.testing.assert_array_equal(decoded, values, err_msg=name)


def test_rows_of_blocks_keep_leading_axes(golden_weight):
    raw, values = golden_weight("q6_k", 6, 512)
    decoded = unpack.dequantize(jnp.asarray(raw).reshape(2, 3, -1), "q6_k")
    np.testing.assert_array_equal(decoded, values.reshape(2, 3, 512))


def test_half_precision_edges():
    """Subnormals, negative zero and infinities survive the decoding of plain types."""
    halves = np.array([[6e-8, -6e-8, -0.0, np.inf, -np.inf, 65504]], np.float16)
    for xp in (np, jnp):
        decoded = np.asarray(unpack.dequantize(xp.asarray(halves.view(np.uint8)), "f16", xp))
        np.testing.assert_array_equal(decoded, halves.astype(np.float32))
        assert np.signbit(decoded[0, 2])


def test_row_bytes():
    assert unpack.row_bytes("q4_k", 512) == 288
    assert unpack.row_bytes("f16", 5) == 10
    with pytest.raises(ValueError, match="q4_k rows hold blocks of 256 elements: 300"):
        unpack.row_bytes("q4_k", 300)
