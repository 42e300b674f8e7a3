"""Feed-forward networks of experts: rows sorted by expert, grouped products, put back."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.matmul.around import ACTIVATIONS, rms_norm
from pallas_kernels.matmul_grouped import matmul_grouped, takes_inputs
from qjax.errors import UnsupportedError
from qjax.kv_cache import Batch
from qjax.ops import activations, floats
from qjax.ops.linear import ACTIVATION_DTYPES
from qjax.qarray import QArray


def _clipped_swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Of gpt-oss: (up + 1) * gate * sigmoid(1.702 gate), with gate at most 7 and |up| at most 7."""
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)


def experts(
    x: jax.Array,
    gate: QArray,
    up: QArray,
    down: QArray,
    weights: jax.Array,
    chosen: jax.Array,
    *,
    biases: tuple[jax.Array | None, jax.Array | None, jax.Array | None],
    batch: Batch,
    norm: jax.Array,
    norm_eps: float,
    activation: str,
) -> jax.Array:
    """Sum over the chosen experts e of weight * down_e(act(gate_e(z)) * up_e(z)), z = RMSNorm(x).

    Args:
      x: float32 [T, K]. norm: float32 [K].
      gate, up, down: stacked weights [E, N, K], or float32 arrays.
      weights: float32 [T, top_k]. chosen: int32 [T, top_k], experts.
      batch: tokens from query_start_loc[-1] on are padding and go to no expert. Where the model is
        split, each device has some experts, or some hidden units of each, and gives its part of
        the sum.
      biases: of gate, up and down, float32 [E, N] or None.
      activation: "silu", "gelu_tanh" or "clipped_swiglu".

    Returns:
      float32 [T, K]; rows of padding are zero.
    """
    tokens, top_k = chosen.shape
    count = (gate.qvalue if isinstance(gate, QArray) else gate).shape[0]
    real = (jnp.arange(tokens) < batch.query_start_loc[-1])[:, None]
    parallel, across = batch.parallel, ()
    if parallel is not None:
        chosen = chosen - lax.axis_index("expert") * count
        real = real & (chosen >= 0) & (chosen < count)
        if parallel.tensor > 1:
            across = ("tensor",)
            biases = (*biases[:2], _once(biases[2]))
    owner = jnp.where(real, chosen, count).reshape(-1)
    order = jnp.argsort(owner, stable=True)
    owner = owner[order]
    sizes = (owner[:, None] == jnp.arange(count)).sum(0, dtype=jnp.int32)

    def product(
        x: jax.Array, w: QArray, bias: jax.Array | None, across: tuple[str, ...] = ()
    ) -> jax.Array:
        if not isinstance(w, QArray):
            return floats.grouped(x, sizes, w, bias)
        if not (batch.numerics == "exact" or "perm" in w.aux):
            across = ()  # as in `ops.linear`
        within = _kernel_rounds(w) and not (across and activations.sees_whole_rows(w))
        return matmul_grouped(
            x if within else _inputs(x, w, jnp.minimum(owner, count - 1), across),
            sizes,
            (w.spec, w.arrays),
            bias=bias,
            act=w.act if within else None,
            activation_dtype=ACTIVATION_DTYPES[batch.numerics],
        )

    rows = rms_norm(x, norm, norm_eps)[order // top_k]
    gates, ups = product(rows, gate, biases[0]), product(rows, up, biases[1])
    if activation == "clipped_swiglu":
        gated = _clipped_swiglu(gates, ups)
    else:
        gated = ACTIVATIONS[activation](gates) * ups
    y = product(gated, down, biases[2], across)
    y = jnp.where((owner < count)[:, None], y, 0)
    # Back in the order of tokens, so that a sum does not depend on what else is in the batch.
    y = jnp.zeros_like(y).at[order].set(y).reshape(tokens, top_k, -1)
    return (y * weights[..., None]).sum(1)


def _once(bias: jax.Array | None) -> jax.Array | None:
    """A bias that one of the devices adds which share an expert."""
    return None if bias is None else jnp.where(lax.axis_index("tensor") == 0, bias, 0)


def _kernel_rounds(w: QArray) -> bool:
    """Whether the kernel does all that is to happen to the inputs of this weight."""
    apart = {"lora_a", "output_perm"} & w.aux.keys() or any(w.hadamard)
    if w.act is None or apart or activations.has_own_inputs(w):
        return False
    return takes_inputs(w.spec, w.act)


def _inputs(x: jax.Array, w: QArray, owner: jax.Array, across: tuple[str, ...] = ()) -> jax.Array:
    """Rows of x as the weights of their own experts want them."""
    if {"lora_a", "output_perm"} & w.aux.keys() or any(w.hadamard):
        raise UnsupportedError("experts with adapters, permuted outputs or rotations")
    if not activations.treats_inputs(w):
        return x

    def one(row: jax.Array, aux: dict[str, jax.Array]) -> jax.Array:
        return activations.inputs(row[None], replace(w, aux=aux), across=across)[0]

    return jax.vmap(one)(x, {key: array[owner] for key, array in w.aux.items()})
