"""Products of each attention head with a matrix of its own, for latent attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.matmul.around import rms_norm
from pallas_kernels.matmul_grouped import matmul_grouped
from qjax.errors import UnsupportedError
from qjax.kv_cache import Batch
from qjax.ops import activations, floats
from qjax.ops.linear import ACTIVATION_DTYPES
from qjax.qarray import QArray


def per_head(x: jax.Array, w: QArray, *, batch: Batch) -> jax.Array:
    """y[t, h] = x[t, h] @ w[h].T.

    Args:
      x: float32 [T, H, K].
      w: stacked weights [H, N, K], or a float32 array.
      batch: says how activations may be rounded.

    Returns:
      float32 [T, H, N].

    Raises:
      UnsupportedError: the weight wants its inputs or outputs treated.
    """
    if not isinstance(w, QArray):
        return floats.per_head(x, w)
    if w.aux.keys() & {"lora_a", "output_perm"} or w.hadamard[1] or activations.treats_inputs(w):
        raise UnsupportedError("matrices of heads whose inputs or outputs are treated")
    tokens, heads, _ = x.shape
    y = matmul_grouped(
        x.swapaxes(0, 1).reshape(heads * tokens, -1),
        jnp.full((heads,), tokens, jnp.int32),
        (w.spec, w.arrays),
        activation_dtype=ACTIVATION_DTYPES[batch.numerics],
    )
    return y.reshape(heads, tokens, -1).swapaxes(0, 1)


def norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMSNorm of x, float32 [T, K], alone: where what is normed goes to a cache too."""
    return rms_norm(x, weight, eps)
