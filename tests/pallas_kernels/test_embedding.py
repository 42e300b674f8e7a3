"""Every implementation of the table look-up gives the values that the `gguf` package decoded, and
of codes those that float64 gives.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.embedding import embedding
from pallas_kernels.matmul import WeightArrays, WeightSpec, planes, prepare
from tests.pallas_kernels.coded import Coded, draw
from tests.pallas_kernels.products import EVERY_TYPE, INTERPRETED


@pytest.mark.parametrize(
    ("implementation", "qtype"),
    [(name, qtype) for name, qtype in EVERY_TYPE.args[1] if name not in INTERPRETED],
    indirect=["implementation"],
)
def test_rows_are_decoded_exactly(implementation, golden_weight, qtype):
    raw, decoded = golden_weight(qtype, 40, 512)
    spec, qvalue = prepare(WeightSpec(qtype, (40, 512)), raw)
    ids = jnp.array([0, 39, 7, 7, 16], jnp.int32)
    rows = jax.jit(lambda ids, table: embedding(ids, (spec, table)))(ids, qvalue)
    np.testing.assert_array_equal(rows, decoded[ids])


CODES = [
    Coded("uint4b8", (1, 64), "float16", has_global_scale=True),
    Coded("uint4", (1, 128), "bfloat16", "uint8"),
    Coded("uint4", (1, 48), "float16", "float16"),
    Coded("uint3b4", (1, 32), "float16", shape=(40, 104)),
    Coded("uint6", (1, 320), "float32", "int8"),
    Coded("uint8b128", (1, 64), "float16"),
    Coded("int8", (16, 128)),
    Coded("fp8_e4m3", (128, 128)),
    Coded("fp8_e5m2", (1, 32), "float8_e8m0fnu"),
    Coded("fp4_e2m1", (1, 16), "float8_e4m3fn", has_global_scale=True),
    Coded("lookup4", (1, 64)),
]
NOT_NATIVE = 2  # groups of 48 columns: another implementation's


def test_rows_of_codes_are_decoded_exactly(implementation):
    """The products of float32 numbers, rounded once."""
    ids = jnp.array([0, 39, 7, 7, 16], jnp.int32)
    tables, expected = [], []
    for kind in CODES:
        arrays, decoded = draw(kind)
        tables.append(prepare(kind.spec, arrays))
        expected.append(decoded.astype(np.float32)[ids])

    left = {i for i, (spec, _) in enumerate(tables) if spec.layout == "canonical"}
    assert left == ({NOT_NATIVE} if implementation == "native" else set(range(len(CODES))))

    def named(i):
        return "xla" if implementation == "native" and i in left else implementation

    @jax.jit
    def look_up(ids, arrays):
        return [
            embedding(ids, (spec, own), implementation=named(i))
            for i, (own, (spec, _)) in enumerate(zip(arrays, tables, strict=True))
        ]

    for kind, got, wanted in zip(
        CODES, look_up(ids, [arrays for _, arrays in tables]), expected, strict=True
    ):
        np.testing.assert_array_equal(got, wanted, str(kind))


@pytest.mark.parametrize("layout", planes.LAYOUTS)
def test_rows_of_planes_are_decoded_exactly(layout):
    """As an accelerator holds them."""
    ids = jnp.array([0, 39, 7, 7, 16], jnp.int32)
    for kind in CODES[1], CODES[6], CODES[8], CODES[9]:
        arrays, decoded = draw(kind)
        spec, laid_out = planes.prepare(kind.spec, arrays, layout)
        got = embedding(ids, (spec, jax.tree.map(jnp.asarray, laid_out)), implementation="xla")
        np.testing.assert_array_equal(got, decoded.astype(np.float32)[ids], str(kind))


@pytest.mark.parametrize("layout", planes.LAYOUTS)
def test_rows_of_blocks_in_planes_are_decoded_exactly(golden_weight, layout):
    ids = jnp.array([0, 39, 7, 7, 16], jnp.int32)
    for qtype in ("q4_k", "q5_0", "iq4_xs"):
        raw, decoded = golden_weight(qtype, 40, 512)
        spec, laid_out = planes.prepare(WeightSpec(qtype, (40, 512)), WeightArrays(raw), layout)
        got = embedding(ids, (spec, jax.tree.map(jnp.asarray, laid_out)), implementation="xla")
        np.testing.assert_array_equal(got, decoded[ids], qtype)


def test_ids_outside_are_clipped(implementation, golden_weight):
    raw, decoded = golden_weight("q4_1", 40, 64)
    spec, qvalue = prepare(WeightSpec("q4_1", (40, 64)), raw)
    ids = jnp.array([-1, 40], jnp.int32)
    rows = jax.jit(lambda ids, table: embedding(ids, (spec, table)))(ids, qvalue)
    np.testing.assert_array_equal(rows, decoded[[0, 39]])


def test_ids_must_be_int32():
    table = (WeightSpec("f32", (2, 1)), jnp.zeros((2, 4), jnp.uint8))
    with pytest.raises(ValueError, match=r"ids are float32 \(1,\), expected int32"):
        embedding(jnp.zeros(1), table)
