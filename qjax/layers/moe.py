"""The feed-forward network of experts, of which each token takes a few."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.kv_cache import Batch
from qjax.layers.linear import Linear
from qjax.layers.router import RouterConfig, route
from qjax.ops.linear import linear
from qjax.ops.moe import experts


class StackedLinear(nnx.Module):
    """weight (experts, out, in)."""

    def __init__(self, count: int, in_features: int, out_features: int):
        self.weight = nnx.Param(jnp.zeros((count, out_features, in_features)))

    @property
    def w(self):
        return self.weight.get_value()


class Experts(nnx.Module):
    """The weights of all experts of a layer."""

    def __init__(self, count: int, hidden_size: int, intermediate_size: int):
        self.gate_proj = StackedLinear(count, hidden_size, intermediate_size)
        self.up_proj = StackedLinear(count, hidden_size, intermediate_size)
        self.down_proj = StackedLinear(count, intermediate_size, hidden_size)


class SparseMLP(nnx.Module):
    """A router, and gated networks of which each token goes to some.

    Args:
      intermediate_size: of one expert.
      activation: "silu" or "gelu_tanh".
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        router: RouterConfig,
        *,
        activation: str,
        eps: float,
    ):
        self.gate = Linear(hidden_size, router.num_experts)
        self.experts = Experts(router.num_experts, hidden_size, intermediate_size)
        self.router, self.activation, self.eps = router, activation, eps

    def __call__(
        self, x: jax.Array, batch: Batch, *, norm: jax.Array, post_norm: jax.Array | None
    ) -> jax.Array:
        """x + experts(norm(x)). x is float32 [T, E]."""
        assert post_norm is None
        # Which experts a token takes shall not hang on the rounding of activations.
        logits = linear(
            x, self.gate.w, batch=replace(batch, numerics="exact"), norm=norm, norm_eps=self.eps
        )
        weights, chosen = route(logits, self.router)
        own = self.experts
        return x + experts(
            x,
            own.gate_proj.w,
            own.up_proj.w,
            own.down_proj.w,
            weights,
            chosen,
            batch=batch,
            norm=norm,
            norm_eps=self.eps,
            activation=self.activation,
        )
