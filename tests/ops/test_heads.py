"""Products of heads with matrices of their own, against float64 numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax import ops
from qjax.kv_cache import Batch
from qjax.ops.heads import per_head
from qjax.qarray import QArray


@pytest.fixture(scope="module")
def blocks(golden):
    """Of Q8_0: raw uint8 [4, 5, 68] and values float32 [4, 5, 64]; see make_gguf_blocks.py."""
    with np.load(golden / "gguf_blocks.npz") as file:
        raw, values = file["q8_0/raw"], file["q8_0/values"]
    return raw.reshape(4, 5, -1), values.reshape(4, 5, -1)


def test_each_head_has_its_own(blocks):
    raw, values = blocks
    weight = ops.prepare(QArray(raw, "q8_0", (5, 64)))
    x = np.random.default_rng(0).normal(size=(5, 4, 64)).astype(np.float32)
    batch = Batch(jnp.arange(5), jnp.array([0, 5]), jnp.array([5]), jnp.zeros((1, 1), jnp.int32))
    wanted = np.einsum("thk,hnk->thn", x.astype(np.float64), values.astype(np.float64))
    found = per_head(jnp.asarray(x), weight, batch=batch)
    assert found.shape == (5, 4, 5)
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
