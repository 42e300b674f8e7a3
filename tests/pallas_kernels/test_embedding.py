"""Every implementation of the table look-up gives the values that the `gguf` package decoded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native, unpack
from pallas_kernels.embedding import embedding
from pallas_kernels.matmul import WeightSpec, prepare


@pytest.mark.parametrize(
    ("implementation", "qtype"),
    [
        (name, qtype)
        for qtype in unpack.BLOCKS
        for name in ("native", "xla", "ref")
        if name != "native" or qtype in native.TYPE_IDS
    ],
    indirect=["implementation"],
)
def test_rows_are_decoded_exactly(implementation, golden_weight, qtype):
    raw, decoded = golden_weight(qtype, 40, 512)
    spec, qvalue = prepare(WeightSpec(qtype, (40, 512)), raw)
    ids = np.array([0, 39, 7, 7, 16], np.int32)
    rows = jax.jit(lambda ids, table: embedding(ids, (spec, table)))(ids, qvalue)
    np.testing.assert_array_equal(rows, decoded[ids])


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
