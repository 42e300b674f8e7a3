"""ops.linear and ops.embedding: how a batch and QArrays become a kernel call."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import matmul as kernels
from qjax import ops
from qjax.kv_cache import Batch
from qjax.qarray import QArray

RNG = np.random.default_rng(3)
X = jnp.asarray(RNG.standard_normal((3, 64)), jnp.float32)
A, B = (RNG.standard_normal((16, 64)).astype(np.float32) for _ in range(2))


def batch(numerics="exact", tokens=3):
    """One sequence with two tokens; the rest is padding."""
    return Batch(
        positions=jnp.zeros(tokens, jnp.int32),
        query_start_loc=jnp.array([0, 2], jnp.int32),
        seq_lens=jnp.array([2], jnp.int32),
        block_table=jnp.zeros((1, 1), jnp.int32),
        numerics=numerics,
    )


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every kernel call made."""
    seen = []
    run = kernels.matmul
    monkeypatch.setattr(kernels, "matmul", lambda *a, **kw: seen.append(kw) or run(*a, **kw))
    return seen


def test_one_weight_gives_one_array():
    bias = jnp.arange(16, dtype=jnp.float32)
    y = ops.linear(X, QArray.from_dense(A), batch=batch(tokens=9), bias=bias)
    np.testing.assert_allclose(y, X @ A.T + bias, atol=1e-4)


def test_several_weights_give_a_tuple_and_a_gate_one_array():
    weights = (QArray.from_dense(A), QArray.from_dense(B))
    first, second = ops.linear(X, weights, batch=batch(tokens=9), bias=(None, jnp.asarray(A[:, 0])))
    np.testing.assert_allclose(first, X @ A.T, atol=1e-4)
    np.testing.assert_allclose(second, X @ B.T + A[:, 0], atol=1e-4)
    gate = ops.linear(X, weights, batch=batch(tokens=9), activation="silu")
    a = np.asarray(X) @ A.T
    np.testing.assert_allclose(gate, a / (1 + np.exp(-a)) * (X @ B.T), atol=1e-3)


@pytest.mark.parametrize(
    ("numerics", "rounded_to"), [("exact", "float32"), ("int16", "int16"), ("int8", "int8")]
)
def test_numerics_choose_the_rounding_of_activations(calls, numerics, rounded_to):
    ops.linear(X, QArray.from_dense(A), batch=batch(numerics))
    assert calls[0]["activation_dtype"] == rounded_to


def test_padding_rows_are_told_where_x_has_a_row_a_token(calls):
    weight = QArray.from_dense(A)
    ops.linear(X, weight, batch=batch(tokens=3))
    ops.linear(X, weight, batch=batch(tokens=9))
    ops.linear(X, weight, batch=batch(tokens=9), rows=jnp.array([1], jnp.int32))
    first, second, third = (call["num_rows"] for call in calls)
    assert (int(first[0]), second, int(third[0])) == (2, None, 1)


def test_embedding():
    rows = ops.embedding(QArray.from_dense(A), jnp.array([3, 0], jnp.int32))
    np.testing.assert_array_equal(rows, A[[3, 0]])


def test_prepare_is_undone_exactly():
    weight = QArray.from_dense(A)
    ready = ops.prepare(weight)
    y = ops.linear(X, ready, batch=batch(tokens=9))
    np.testing.assert_allclose(y, X @ A.T, atol=1e-4)
    back = ops.unprepare(ready)
    assert (back.layout, back.shape) == ("canonical", (16, 64))
    np.testing.assert_array_equal(back.qvalue, weight.qvalue)
