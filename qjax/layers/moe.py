"""The feed-forward network of experts, of which each token takes a few."""

from __future__ import annotations

from dataclasses import replace

import jax
from flax import nnx

from qjax.kv_cache import Batch
from qjax.layers.linear import Linear
from qjax.layers.router import RouterConfig, route
from qjax.ops.linear import linear
from qjax.ops.moe import experts


class Experts(nnx.Module):
    """The weights of all experts of a layer."""

    def __init__(self, count: int, hidden_size: int, intermediate_size: int, bias: bool):
        self.gate_proj = Linear(hidden_size, intermediate_size, bias, (count,))
        self.up_proj = Linear(hidden_size, intermediate_size, bias, (count,))
        self.down_proj = Linear(intermediate_size, hidden_size, bias, (count,))


class SparseMLP(nnx.Module):
    """A router, and gated networks of which each token goes to some.

    Args:
      intermediate_size: of one expert.
      activation: "silu", "gelu_tanh" or "clipped_swiglu".
      bias: whether router and experts have biases.
      router_name: of the router's weights.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        router: RouterConfig,
        *,
        activation: str,
        eps: float,
        bias: bool = False,
        router_name: str = "gate",
    ):
        setattr(self, router_name, Linear(hidden_size, router.num_experts, bias))
        self.experts = Experts(router.num_experts, hidden_size, intermediate_size, bias)
        self.routing, self.activation, self.eps = router, activation, eps
        self.router_name = router_name

    def __call__(
        self, x: jax.Array, batch: Batch, *, norm: jax.Array, post_norm: jax.Array | None
    ) -> jax.Array:
        """x + experts(norm(x)). x is float32 [T, E]."""
        assert post_norm is None
        # Which experts a token takes shall not hang on the rounding of activations.
        router = getattr(self, self.router_name)
        logits = linear(
            x,
            router.w,
            bias=router.b,
            batch=replace(batch, numerics="exact"),
            norm=norm,
            norm_eps=self.eps,
        )
        weights, chosen = route(logits, self.routing)
        own = self.experts
        return x + experts(
            x,
            own.gate_proj.w,
            own.up_proj.w,
            own.down_proj.w,
            weights,
            chosen,
            biases=(own.gate_proj.b, own.up_proj.b, own.down_proj.b),
            batch=batch,
            norm=norm,
            norm_eps=self.eps,
            activation=self.activation,
        )
