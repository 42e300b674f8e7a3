"""Linear layers on stored weights, with the operations around them that a kernel can fuse."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import numpy as np

from pallas_kernels import matmul as kernels
from qjax.qarray import QArray

if TYPE_CHECKING:
    from qjax.kv_cache import Batch


# Batch.numerics -> what the kernels may round activations to.
ACTIVATION_DTYPES = {"exact": "float32", "int16": "int16", "int8": "int8"}


def linear(
    x: jax.Array,
    w: QArray | tuple[QArray, ...],
    *,
    batch: Batch,
    norm: jax.Array | None = None,
    norm_eps: float = 0.0,
    bias: jax.Array | tuple[jax.Array | None, ...] | None = None,
    activation: str | None = None,
    residual: jax.Array | None = None,
    post_norm: jax.Array | None = None,
    rows: jax.Array | None = None,
) -> jax.Array | tuple[jax.Array, ...]:
    """x @ w.T for one weight or for several that share their input.

    Args:
      x: float32 [T, K].
      w: one weight, or a tuple of weights.
      batch: says how activations may be rounded (`numerics`), and how many rows of x are not
        padding where x has one row a token.
      norm: float32 [K], RMSNorm of x first.
      norm_eps: of `norm` and `post_norm`.
      bias: float32 [N]; a tuple of these or None where w is a tuple.
      activation: "silu" or "gelu_tanh": w is (gate, up) and the result act(gate) * up.
      residual: float32 [T, N], added last.
      post_norm: float32 [N], RMSNorm of the result before the residual.
      rows: int32 [1], the number of rows that are not padding, where `batch` does not tell.

    Returns:
      float32 [T, N]; a tuple of them where w is a tuple and there is no activation.
    """
    several = isinstance(w, tuple)
    if rows is None and x.shape[0] == batch.positions.shape[0]:
        rows = batch.query_start_loc[-1:]
    outputs = kernels.matmul(
        x,
        [(each.spec, each.qvalue) for each in (w if several else (w,))],
        norm=norm,
        norm_eps=norm_eps,
        biases=bias if isinstance(bias, tuple) or bias is None else (bias,),
        activation=activation,
        residual=residual,
        post_norm=post_norm,
        activation_dtype=ACTIVATION_DTYPES[batch.numerics],
        num_rows=rows,
    )
    return outputs if several and activation is None else outputs[0]


def prepare(w: QArray) -> QArray:
    """The weight (on the host, canonical) in the layout that this machine's kernels like best."""
    spec, qvalue = kernels.prepare(w.spec, np.asarray(w.qvalue))
    return w.with_layout(spec.layout, qvalue)


def unprepare(w: QArray) -> QArray:
    """The canonical weight that `prepare` was given."""
    spec, qvalue = kernels.unprepare(w.spec, np.asarray(w.qvalue))
    return w.with_layout(spec.layout, qvalue)
