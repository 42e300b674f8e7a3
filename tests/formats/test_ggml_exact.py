"""Integer codes as blocks of ggml: the same numbers, in the smallest type that has them."""

import numpy as np
import pytest

from pallas_kernels import codes, unpack
from qjax.formats.ggml_exact import as_blocks
from qjax.qarray import QArray

RNG = np.random.default_rng(3)
N, K = 8, 128


def weight(qtype, group=(1, 32), zero=None, dtype=np.float16, low=0, high=None, **more):
    bits = codes.CODES[qtype].bits
    q = RNG.integers(low, (1 << bits) if high is None else high, (2, N, K)).astype(np.uint8)
    q[0, 0, :2] = low, ((1 << bits) if high is None else high) - 1
    shape = (2, -(-N // group[0]), -(-K // group[1]))
    scale = (RNG.standard_normal(shape) * 0.02).astype(np.float16).astype(dtype)
    zero_point = None if zero is None else zero(shape)
    return QArray(codes.pack(q, bits), qtype, (N, K), scale, zero_point, group=group, **more)


def values(w):
    parts = (w.qvalue, w.qtype, w.shape, w.group, w.scale, w.zero_point)
    return codes.dequantize(*parts, w.aux.get("global_scale"), additive=w.additive, xp=np)


def drawn(low, high):
    return lambda shape: RNG.integers(low, high, shape).astype(np.uint8)


@pytest.mark.parametrize(
    ("w", "qtype"),
    [
        (weight("uint4b8"), "q4_0"),
        (weight("uint4b8", (1, 64), dtype=np.float32), "q4_0"),
        (weight("uint4b8", (4, 128)), "q4_0"),
        (weight("uint4b8", (8, 128)), "q4_0"),
        (weight("uint3b4"), "q4_0"),
        (weight("uint5b16"), "q5_0"),
        (weight("uint6b32"), "q8_0"),
        (weight("uint8b128"), "q8_0"),
        (weight("int8", (1, 128)), "q8_0"),
        (weight("uint4", zero=lambda shape: np.full(shape, 8, np.uint8)), "q4_0"),
        (weight("uint4", zero=lambda shape: np.zeros(shape, np.uint8)), "q4_1"),
        (weight("uint4", zero=drawn(0, 16)), "q5_0"),
        (weight("uint8", zero=drawn(100, 128), high=228), "q8_0"),
        (
            weight(
                "uint4",
                zero=lambda shape: RNG.standard_normal(shape).astype(np.float16),
                additive=True,
            ),
            "q4_1",
        ),
        (weight("uint4b8", aux={"global_scale": np.full((2, 1, 1), 0.5, np.float32)}), "q4_0"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.qtype}-{value.group}",
)
def test_same_numbers(w, qtype):
    blocks = as_blocks(w)
    assert blocks.qtype == qtype
    np.testing.assert_array_equal(unpack.dequantize(blocks.raw, qtype, np), values(w))


@pytest.mark.parametrize(
    ("w", "reason"),
    [
        (weight("fp8_e4m3"), "no integers"),
        (weight("uint4b8", (1, 16)), "groups of 16 are not whole blocks of 32"),
        (weight("uint8", zero=drawn(0, 10)), "more than 8 bits"),
        (weight("uint4b8", rounded="bfloat16"), "rounded to bfloat16"),
        (weight("uint4b8", hadamard=(128, 0)), "rotation"),
        (weight("uint4b8", aux={"perm": np.arange(K, dtype=np.int32)[None]}), "perm"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.qtype,
)
def test_refused(w, reason):
    assert reason in as_blocks(w)


def test_scales_that_float16_rounds():
    w = weight("uint4b8", dtype=np.float32)
    w.scale[0, 0, 0] = np.float32(0.1)
    assert "no float16 numbers" in as_blocks(w)
