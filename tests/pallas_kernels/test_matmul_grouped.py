"""Grouped products against float64 numpy: each row with the weight of its own expert."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.matmul_grouped import matmul_grouped
from qjax import ops
from qjax.qarray import QArray

SIZES = [[3, 0, 1, 4], [0, 0, 0, 1], [0, 8, 0, 2], [0, 0, 0, 0]]


def plain(values):
    return QArray.from_dense(values.astype(np.float32)), values.astype(np.float32)


def coded(values):
    """Codes of 4 bits with a scale for each run of 32 columns and one for each expert."""
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 16, values.shape, np.uint8)
    scale = rng.uniform(0.5, 2, (*values.shape[:2], values.shape[2] // 32)).astype(np.float32)
    packed = codes[..., ::2] | codes[..., 1::2] << 4
    whole = rng.uniform(0.5, 2, (len(values), 1, 1)).astype(np.float32)
    weight = QArray(
        packed, "uint4b8", values.shape[1:], scale, aux={"global_scale": whole}, group=(1, 32)
    )
    return weight, (codes - 8.0) * np.repeat(scale.astype(np.float64), 32, -1) * whole


@pytest.mark.parametrize(
    ("make", "implementation"),
    [
        *((make, name) for make in (plain, coded) for name in ("native", "xla", "ref")),
        (coded, "triton"),
        (coded, "tpu"),
    ],
    indirect=["implementation"],
)
def test_against_float64(make, implementation):
    rng = np.random.default_rng(0)
    weight, values = make(rng.normal(size=(4, 24, 64)))
    weight = ops.prepare(weight)
    assert (weight.layout == "canonical") == (implementation in ("xla", "ref"))
    x, bias = rng.normal(size=(10, 64)).astype(np.float32), rng.normal(size=(4, 24))
    for sizes in SIZES:
        y = matmul_grouped(
            jnp.asarray(x),
            jnp.asarray(sizes, jnp.int32),
            (weight.spec, weight.arrays),
            bias=jnp.asarray(bias, jnp.float32),
            implementation=implementation,
        )
        owner = np.repeat(np.arange(4), sizes)
        rows = x[: len(owner)].astype(np.float64)
        wanted = np.einsum("tk,tnk->tn", rows, values[owner]) + bias.astype(np.float32)[owner]
        np.testing.assert_allclose(y[: len(owner)], wanted, rtol=1e-4, atol=2e-4)
