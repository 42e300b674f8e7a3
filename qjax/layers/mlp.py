"""The gated feed-forward network: down(act(gate(x)) * up(x))."""

from __future__ import annotations

import jax
from flax import nnx

from qjax import ops
from qjax.kv_cache import Batch
from qjax.layers.linear import Linear


class GatedMLP(nnx.Module):
    """Two products: gate and up share the first, with norm and activation; down adds the residual.

    Args:
      activation: "silu" or "gelu_tanh".
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, activation: str, bias: bool, eps: float
    ):
        self.gate_proj = Linear(hidden_size, intermediate_size, bias)
        self.up_proj = Linear(hidden_size, intermediate_size, bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias)
        self.activation, self.eps = activation, eps

    def __call__(
        self, x: jax.Array, batch: Batch, *, norm: jax.Array, post_norm: jax.Array | None
    ) -> jax.Array:
        """x + mlp(norm(x)), with `post_norm` on what is added. x is float32 [T, E]."""
        return self.added(x, batch, norm=norm, post_norm=post_norm, residual=x)

    def added(
        self,
        x: jax.Array,
        batch: Batch,
        *,
        norm: jax.Array,
        post_norm: jax.Array | None = None,
        residual: jax.Array | None = None,
        total: bool = True,
    ) -> jax.Array:
        """mlp(norm(x)) alone, or joined to a residual; `total` as in `ops.linear`."""
        hidden = ops.linear(
            x,
            (self.gate_proj.w, self.up_proj.w),
            bias=(self.gate_proj.b, self.up_proj.b),
            batch=batch,
            norm=norm,
            norm_eps=self.eps,
            activation=self.activation,
        )
        return ops.linear(
            hidden,
            self.down_proj.w,
            bias=self.down_proj.b,
            batch=batch,
            by_inputs=True,
            total=total,
            residual=residual,
            post_norm=post_norm,
            norm_eps=self.eps,
        )
