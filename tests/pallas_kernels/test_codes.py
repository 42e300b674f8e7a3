"""Codes: packing against the bit streams of the formats' documents, values against ml_dtypes."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import codes


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (2, [0xE4E4E4E4] * 2),
        (3, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
        (4, [0x76543210, 0xFEDCBA98, 0x76543210, 0xFEDCBA98]),
        (5, [0x8A418820, 0xC5A92839, 0xCA307B9A, 0x38BDAB49, 0xFFBBCDEB]),
        (6, [0x440C2040, 0xA2481C61, 0x3CE34C2C, 0x544D2450, 0xA6585D65, 0x7DE75C6D]),
        (7, [0x40608080, 0x880E1828, 0x68C16284, 0x88901E38, 0x58A94264, 0x668C982E, 0x3E78E9C3]),
    ],
)
def test_streams_of_bits(xp, bits, words):
    """32 codes that count up, in little-endian words."""
    counted = np.arange(32) % (1 << bits)
    stream = np.array(words, "<u4").view(np.uint8)
    np.testing.assert_array_equal(codes.pack(counted, bits), stream)
    np.testing.assert_array_equal(codes.unpack(xp.asarray(stream), bits, 32, xp), counted)


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 1 << 30))
def test_packing_is_undone(bits, eights, seed):
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, 1 << bits, (2, 8 * eights))
    if bits in (9, 10, 11):
        return
    packed = codes.pack(drawn, bits)
    assert packed.shape == (2, eights * bits)
    np.testing.assert_array_equal(codes.unpack(packed, bits, 8 * eights, np), drawn)


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize(
    ("qtype", "dtype"),
    [
        ("fp4_e2m1", ml_dtypes.float4_e2m1fn),
        ("fp6_e2m3", ml_dtypes.float6_e2m3fn),
        ("fp6_e3m2", ml_dtypes.float6_e3m2fn),
        ("fp8_e4m3", ml_dtypes.float8_e4m3fn),
        ("fp8_e5m2", ml_dtypes.float8_e5m2),
    ],
)
def test_small_floats(xp, qtype, dtype):
    bits = codes.CODES[qtype].bits
    patterns = np.arange(1 << bits)
    expected = patterns.astype(np.uint8).view(dtype).astype(np.float32)
    stream = xp.asarray(codes.pack(patterns, bits))
    np.testing.assert_array_equal(codes.values(stream, qtype, 1 << bits, xp=xp), expected)


def test_fp12():
    """E7M4, bias 63: one, its neighbours, the largest and the smallest number."""
    patterns = np.array([63 << 4, (63 << 4) + 1, (62 << 4) + 15, 0x7FF, 0x001, 0xBF0])
    expected = [1, 1 + 1 / 16, 1 - 1 / 32, 2.0**64 * (2 - 1 / 16), 2.0 ** (-62 - 4), -1]
    stream = codes.pack(patterns, 12)
    np.testing.assert_array_equal(codes.values(stream, "fp12_e7m4", 6, xp=np), expected)


@pytest.mark.parametrize("group", [(1, 32), (1, 64), (4, 32), (3, 48), (40, 64), (40, 16)])
@pytest.mark.parametrize("qtype", ["uint4", "uint4b8", "uint3b4", "int8", "uint5", "fp8_e4m3"])
def test_groups(qtype, group):
    """Scales and zero points reach the rows and columns of their group; the last may be partial."""
    n, k = 40, 64
    rng = np.random.default_rng(1)
    code = codes.CODES[qtype]
    drawn = rng.integers(0, 120 if code.kind == "float" else 1 << code.bits, (n, k))
    shape = (-(-n // group[0]), -(-k // group[1]))
    scale = rng.random(shape).astype(ml_dtypes.bfloat16)
    zero = rng.integers(0, 8, shape).astype(np.uint8) if qtype in ("uint4", "uint5") else None
    got = {
        xp: codes.dequantize(
            xp.asarray(codes.pack(drawn, code.bits)), qtype, (n, k), group, xp.asarray(scale),
            zero if zero is None else xp.asarray(zero), xp=xp,
        )
        for xp in (np, jnp)
    }  # fmt: skip
    if code.kind == "float":
        value = drawn.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    elif code.kind == "int":
        value = drawn.astype(np.uint8).view(np.int8).astype(np.float32)
    else:
        value = (drawn - code.zero).astype(np.float32)
    for i in range(n):
        for j in range(k):
            at = i // group[0], j // group[1]
            offset = 0 if zero is None else zero[at]
            expected = (value[i, j] - np.float32(offset)) * scale[at].astype(np.float32)
            assert got[np][i, j] == expected
    np.testing.assert_array_equal(got[np], got[jnp])


@pytest.mark.parametrize("qtype", ["fp8_e4m3", "fp8_e5m2", "uint8", "fp4_e2m1"])
def test_codes_that_are_not_finite(qtype):
    kinds = {"fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2}
    for code in range(256):
        qvalue = np.zeros((3, 5), np.uint8)
        qvalue[1, 2] = code
        wanted = qtype not in kinds or np.isfinite(np.uint8(code).view(kinds[qtype]))
        assert codes.is_finite(qvalue, qtype) == wanted


def test_two_of_every_four():
    """Kept codes first, the places of each pair behind: here 3 and 12 (less 8) in columns 1 and 3,
    then 15 and 0 in columns 0 and 2."""
    row = np.array([[0xC3, 0x0F, 0b1000_1101]], np.uint8)
    expected = [[0, -5, 0, 4, 7, 0, -8, 0]]
    for xp in (np, jnp):
        found = codes.values(xp.asarray(row), "sparse24_uint4b8", 8, xp=xp)
        np.testing.assert_array_equal(found, expected)
    row = np.array([[131, 12, 255, 0, 0b1000_1101]], np.uint8)
    expected = [[0, 3, 0, -116, 127, 0, -128, 0]]
    for xp in (np, jnp):
        found = codes.values(xp.asarray(row), "sparse24_uint8b128", 8, xp=xp)
        np.testing.assert_array_equal(found, expected)
