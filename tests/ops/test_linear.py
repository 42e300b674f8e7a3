"""ops.linear and ops.embedding: how a batch and QArrays become a kernel call."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import matmul as kernels
from pallas_kernels import native, platform, unpack
from qjax import ops
from qjax.kv_cache import Batch
from qjax.qarray import ActSpec, QArray

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
    ("numerics", "rounded_to"),
    [("exact", "float32"), ("bfloat16", "bfloat16"), ("int16", "int16"), ("int8", "int8")],
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


ROUNDINGS = {
    "int8 token": ActSpec("int8", "token", True),
    "int8 token, another divisor": ActSpec("int8", "token", True, divisor=127.5),
    "int8 token, bfloat16 scale": ActSpec("int8", "token", True, scale="bfloat16"),
    "int8 asymmetric": ActSpec("int8", "token", True, symmetric=False),
    "int8 static": ActSpec("int8", "tensor", False),
    "int4 group": ActSpec("int4", "group", True, group_size=48),
    "fp8 token": ActSpec("fp8_e4m3", "token", True),
    "fp8 token, bounded": ActSpec("fp8_e4m3", "token", True, upper_bound=1.5),
    "fp8 static": ActSpec("fp8_e4m3", "tensor", False),
    "fp8 group, powers of two": ActSpec(
        "fp8_e4m3", "group", True, group_size=32, scale="e8m0_ceil"
    ),
    "e5m2": ActSpec("fp8_e5m2", "token", True),
    "mxfp8": ActSpec("fp8_e4m3", "group", True, group_size=32, scale="e8m0"),
    "mxfp6": ActSpec("fp6_e2m3", "group", True, group_size=32, scale="e8m0"),
    "mxfp6 e3m2": ActSpec("fp6_e3m2", "group", True, group_size=32, scale="e8m0"),
    "mxfp4": ActSpec("fp4_e2m1", "group", True, group_size=32, scale="e8m0"),
    "mxfp4, rounded absmax": ActSpec("fp4_e2m1", "group", True, group_size=32, scale="e8m0_even"),
    "mxfp8, rounded absmax": ActSpec("fp8_e4m3", "group", True, group_size=32, scale="e8m0_even4"),
    "nvfp4": ActSpec("fp4_e2m1", "group", True, group_size=16, scale="fp8_e4m3"),
}


def treated(act, **aux):
    """A weight whose inputs are scaled, rounded and put in another order."""
    scalars = {
        "act_scale": np.full((1, 1), 0.017, np.float32),
        "act_global_scale": np.full((1, 1), 0.003, np.float32),
    }
    weight = ops.prepare(QArray.from_dense(A))
    return replace(weight, act=act, aux={**scalars, **aux})


@pytest.mark.skipif(native.library()[0] is None, reason=native.library()[1])
def test_kernels_treat_inputs_as_jax_does(monkeypatch):
    """Bit for bit: the same weights with the rounding outside of the kernel."""
    order = RNG.permutation(64).astype(np.int32)[None]
    scales = RNG.uniform(0.5, 2, (1, 64)).astype(ml_dtypes.bfloat16)
    weights = {name: treated(act) for name, act in ROUNDINGS.items()}
    weights["all"] = treated(ROUNDINGS["int8 token"], perm=order, act_pre_scale=scales)
    weights["zero point"] = treated(
        ActSpec("int8", "tensor", False, symmetric=False),
        act_zero_point=np.full((1, 1), 3, np.int8),
    )
    # Every kind of number: ties, zeros, tiny ones, large ones.
    x = np.concatenate([np.asarray(X) * 3, np.arange(64)[None] / 4 - 8, np.zeros((1, 64))])
    x = jnp.asarray(np.concatenate([x, x * 1e-6, x * 100]), jnp.float32)
    norm = jnp.asarray(RNG.uniform(0.5, 2, 64), jnp.float32)

    def run():
        return jax.jit(
            lambda x, weights: {
                name: (
                    ops.linear(x, w, batch=batch(tokens=99)),
                    ops.linear(
                        x,
                        (w, w),
                        batch=batch(tokens=99),
                        norm=norm,
                        norm_eps=1e-5,
                        activation="silu",
                    ),
                )
                for name, w in weights.items()
            }
        )(x, weights)

    assert all(kernels.takes_inputs([w.spec], w.act) for w in weights.values())
    inside = run()
    monkeypatch.setattr(kernels, "takes_inputs", lambda *_: False)
    outside = run()
    for name in weights:
        np.testing.assert_array_equal(inside[name][0], outside[name][0], err_msg=name)
        np.testing.assert_allclose(inside[name][1], outside[name][1], rtol=0.05, atol=0.5)


@pytest.mark.skipif(native.library()[0] is None, reason=native.library()[1])
@pytest.mark.parametrize("numerics", ["exact", "int16", "int8"])
def test_one_call_serves_weights_with_inputs_of_their_own(calls, numerics):
    """Two share an order of columns, one has another, one another static scale too."""
    act = ROUNDINGS["int8 static"]
    orders = [RNG.permutation(64).astype(np.int32)[None] for _ in range(2)]
    first, second = (treated(act, perm=order) for order in orders)
    third = treated(act, perm=orders[1].copy(), act_scale=np.full((1, 1), 0.03, np.float32))
    weights = (first, second, first, third)
    together = ops.linear(X, weights, batch=batch(numerics, tokens=9))
    assert len(calls) == 1
    for y, weight in zip(together, weights, strict=True):
        x = np.asarray(X)[:, weight.aux["perm"][0]]
        scale = weight.aux["act_scale"][0, 0]
        x = np.clip(np.rint(x / scale), -128, 127) * scale
        np.testing.assert_allclose(y, x @ A.T, atol=0.05)
        alone = ops.linear(X, weight, batch=batch(numerics, tokens=9))
        np.testing.assert_array_equal(y, alone)


@pytest.mark.parametrize("device", ["gpu", "tpu"])
def test_weights_of_accelerators_treat_inputs_as_others_do(calls, device):
    """As codes by codes, or as plain floats where a product of codes is none of XLA's."""
    codes = RNG.integers(-128, 128, (16, 64), np.int8).view(np.uint8)
    scale = RNG.uniform(0.5, 2, (16, 1)).astype(np.float32)
    order = RNG.permutation(64).astype(np.int32)[None]
    aux = {"act_scale": np.full((1, 1), 0.017, np.float32)}
    weights = [
        QArray(codes, "int8", (16, 64), scale, act=ROUNDINGS[name], group=(1, 64), aux=own)
        for name, own in (
            ("int8 token", {}),
            ("int8 asymmetric", {}),
            ("int4 group", {}),
            ("int8 static", aux | {"perm": order}),
            ("int8 static", aux | {"act_pre_scale": np.full((1, 64), 0.7, np.float32)}),
        )
    ]
    with platform.assume(device):
        laid_out = [ops.prepare(weight) for weight in weights]
    assert all(each.layout.startswith("planes") for each in laid_out)
    bias = jnp.arange(16, dtype=jnp.float32)
    for weight, ready in zip(weights, laid_out, strict=True):
        wanted = ops.linear(X, weight, batch=batch(tokens=9), bias=bias, residual=X[:, :16])
        y = ops.linear(X, ready, batch=batch(tokens=9), bias=bias, residual=X[:, :16])
        assert calls[-1].keys() >= {"act", "inputs"}
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=2e-4)
    gate = ops.linear(X, tuple(laid_out[3:]), batch=batch(tokens=9), activation="silu")
    wanted = ops.linear(X, tuple(weights[3:]), batch=batch(tokens=9), activation="silu")
    np.testing.assert_allclose(gate, wanted, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
def test_plain_floats_are_plain_arrays_on_accelerators(dtype):
    """A product of their own dtype with bfloat16 activations: nothing is unpacked."""
    values = RNG.normal(size=(16, 64)).astype(dtype)
    weight = QArray.from_dense(values)
    with platform.assume("gpu", "NVIDIA H100 80GB HBM3"):
        laid_out = ops.prepare(weight)
    assert (laid_out.layout, laid_out.qvalue.dtype) == ("dense", dtype)
    np.testing.assert_array_equal(ops.unprepare(laid_out).qvalue, weight.qvalue)

    def product(x, w, numerics):
        return ops.linear(x, w, batch=batch(numerics, tokens=9))

    wide = values.astype(np.float64)
    for numerics, tolerance in ("exact", 1e-6), ("bfloat16", 4e-3):
        y, wanted = product(X, laid_out, numerics), np.asarray(X, np.float64) @ wide.T
        assert np.linalg.norm(y - wanted) < tolerance * np.linalg.norm(wanted)
    with platform.assume("gpu", "NVIDIA H100 80GB HBM3"):
        traced = str(jax.make_jaxpr(product, static_argnums=2)(X, laid_out, "bfloat16"))
    assert traced.count("dot_general") == 1
    assert "u8[" not in traced
    ids = jnp.array([3, 0, 15, 99], jnp.int32)
    np.testing.assert_array_equal(ops.embedding(laid_out, ids), values[[3, 0, 15, 15]])


@pytest.mark.parametrize("device", ["gpu", "tpu"])
@pytest.mark.parametrize("qtype", ["q2_k", "q4_0", "q6_k", "iq4_nl"])
def test_stacked_blocks_are_taken_apart_for_accelerators_and_put_together(qtype, device):
    elements, size = unpack.BLOCKS[qtype]
    raw = RNG.integers(0, 256, (2, 16, 512 // elements * size), np.uint8)
    weight = QArray(raw, qtype, (16, 512))
    with platform.assume(device):
        laid_out = ops.prepare(weight)
    assert laid_out.layout.startswith("planes")
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(laid_out))
    back = ops.unprepare(laid_out)
    assert jax.tree.structure(back) == jax.tree.structure(weight)
    np.testing.assert_array_equal(back.qvalue, raw)
