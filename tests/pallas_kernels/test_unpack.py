"""The decoder against the `gguf` package: hashes of fixed blocks, random blocks bit for bit."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import unpack
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
