"""The layouts of planes: what they hold, by a slow statement of it, and that they are undone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import unpack
from pallas_kernels.matmul import WeightArrays, WeightSpec, planes, planes_gguf
from tests.pallas_kernels.coded import Coded, draw

KINDS = [
    *(Coded(f"uint{bits}b{1 << bits - 1}", (1, 32)) for bits in range(2, 9)),
    Coded("uint4", (1, 64), "float16", "uint8", shape=(40, 576)),
    Coded("uint3", (1, 32), "bfloat16", "bfloat16", additive=True),
    Coded("int8", (1, 320)),
    Coded("fp8_e4m3", (8, 64), shape=(40, 512)),
    Coded("fp4_e2m1", (1, 16), "float8_e4m3fn", has_global_scale=True),
    Coded("fp4_e2m1", (1, 32), "float8_e8m0fnu", shape=(40, 2880)),
    Coded("lookup4", (1, 64)),
    Coded("fp6_e2m3", (1, 32), "float8_e8m0fnu"),
]


def name(kind):
    return f"{kind.qtype}-{kind.shape[1]}"


@pytest.mark.parametrize("layout", planes.LAYOUTS)
@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_undone_exactly_and_decoded(kind, layout):
    arrays, decoded = draw(kind)
    spec, laid_out = planes.prepare(kind.spec, arrays, layout)
    assert spec.layout == layout
    back, again = planes.unprepare(spec, laid_out)
    assert back == kind.spec
    jax.tree.map(np.testing.assert_array_equal, again, arrays)
    weight = planes.decode(spec, jax.tree.map(jnp.asarray, laid_out))
    np.testing.assert_allclose(weight, decoded, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", range(1, 9))
def test_where_bits_lie(bits):
    """Bit b of column c, found by the header's words."""
    codes = np.random.default_rng(bits).integers(0, 1 << bits, 512, np.uint8)
    kind = Coded(f"uint{bits}", (1, 32), zero_point="uint8", shape=(1, 512))
    layout = planes.describe(kind.spec)
    row = planes.pack(codes[None], layout)[0]
    assert row.size == 512 * bits // 8
    for column in range(512):
        found, shift, start = 0, 0, 0
        for width in [w for w in (8, 4, 2, 1) if bits & w]:
            block, within = divmod(column, layout.block)
            run = layout.block * width // 8
            byte = row[start + block * run + within % run]
            found |= (byte >> within // run * width & (1 << width) - 1) << shift
            shift, start = shift + width, start + 512 * width // 8
        assert found == codes[column]


@pytest.mark.parametrize("layout", planes.LAYOUTS)
@pytest.mark.parametrize("qtype", planes_gguf.TYPES)
def test_blocks(golden_weight, qtype, layout):
    """Random blocks: the numbers that the `gguf` package decodes, and every bit comes back."""
    raw, decoded = golden_weight(qtype, 24, 768)
    spec = WeightSpec(qtype, decoded.shape)
    laid_out_spec, laid_out = planes.prepare(spec, WeightArrays(raw), layout)
    weight = planes.decode(laid_out_spec, jax.tree.map(jnp.asarray, laid_out))
    np.testing.assert_array_equal(weight, decoded)
    scales = [a for name, a in laid_out._asdict().items() if name != "codebook" and a is not None]
    assert sum(a.nbytes for a in scales) <= raw.nbytes * (1.2 if qtype == "q2_k" else 1.04)
    back, again = planes.unprepare(laid_out_spec, laid_out)
    assert back == spec
    np.testing.assert_array_equal(again.qvalue, raw)
    assert all(array is None for array in again[1:])


def test_every_bit_of_a_block_comes_back():
    """Blocks of any bytes, NaN as scales among them, and leading axes."""
    for qtype, (_, size) in unpack.BLOCKS.items():
        if qtype in planes_gguf.TYPES:
            raw = np.random.default_rng(size).integers(0, 256, (2, 64, size), np.uint8)
            parts = planes_gguf.take_apart(raw, qtype)
            np.testing.assert_array_equal(planes_gguf.put_together(parts, qtype), raw)


def test_what_is_not_held_is_told():
    with pytest.raises(NotImplementedError, match="blocks of type iq2_xs"):
        planes.describe(WeightSpec("iq2_xs", (8, 256)))
    sparse = Coded("sparse24_uint4b8", (1, 32))
    with pytest.raises(NotImplementedError, match="codes of type sparse24_uint4b8"):
        planes.describe(sparse.spec)
