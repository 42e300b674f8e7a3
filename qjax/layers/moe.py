"""The feed-forward network of experts, of which each token takes a few."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.kv_cache import Batch
from qjax.layers.linear import Linear
from qjax.layers.mlp import GatedMLP
from qjax.layers.moe_config import MoEConfig
from qjax.layers.router import RouterConfig, route
from qjax.ops.collectives import summed
from qjax.ops.linear import linear
from qjax.ops.moe import experts


class Experts(nnx.Module):
    """The weights of all experts of a layer."""

    def __init__(self, count: int, hidden_size: int, intermediate_size: int, bias: bool):
        self.gate_proj = Linear(hidden_size, intermediate_size, bias, (count,))
        self.up_proj = Linear(hidden_size, intermediate_size, bias, (count,))
        self.down_proj = Linear(intermediate_size, hidden_size, bias, (count,))


class Router(nnx.Module):
    """Scores experts and chooses some for each token, maybe with a bias for the choice alone."""

    def __init__(self, hidden_size: int, config: RouterConfig, *, bias: bool, eps: float):
        scores = Linear(hidden_size, config.num_experts, bias)
        self.weight, self.bias = scores.weight, scores.bias
        self.e_score_correction_bias = (
            nnx.Param(jnp.zeros((config.num_experts,))) if config.correction_bias else None
        )
        self.config, self.eps = config, eps

    def __call__(self, x: jax.Array, batch: Batch, norm: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Weights float32 [T, top_k] and experts int32 [T, top_k] for x float32 [T, E]."""
        bias, correction = (
            None if param is None else param.get_value()
            for param in (self.bias, self.e_score_correction_bias)
        )
        logits = linear(
            x,
            self.weight.get_value(),
            bias=bias,
            # Which experts a token takes shall not hang on the rounding of activations.
            batch=replace(batch, numerics="exact"),
            norm=norm,
            norm_eps=self.eps,
        )
        return route(logits, self.config, correction)


class SparseMLP(nnx.Module):
    """A router, gated networks of which each token goes to some, and maybe one for all tokens.

    Args:
      activation: "silu", "gelu_tanh" or "clipped_swiglu".
    """

    def __init__(self, hidden_size: int, moe: MoEConfig, *, activation: str, eps: float):
        count = moe.router.num_experts
        setattr(self, moe.router_name, Router(hidden_size, moe.router, bias=moe.bias, eps=eps))
        self.experts = Experts(count, hidden_size, moe.intermediate_size, moe.bias)
        if moe.shared_size:
            shared = GatedMLP(
                hidden_size, moe.shared_size, activation=activation, bias=False, eps=eps
            )
            setattr(self, moe.shared_name, shared)
        if moe.shared_gate:
            setattr(self, f"{moe.shared_name}_gate", Linear(hidden_size, 1))
        self.moe, self.activation, self.eps = moe, activation, eps

    def __call__(
        self, x: jax.Array, batch: Batch, *, norm: jax.Array, post_norm: jax.Array | None
    ) -> jax.Array:
        """x + experts(norm(x)) + shared(norm(x)). x is float32 [T, E]."""
        assert post_norm is None
        router: Router = getattr(self, self.moe.router_name)
        weights, chosen = router(x, batch, norm)
        own = self.experts
        y = experts(
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
        if not self.moe.shared_size:
            return x + summed(y, batch.parallel)
        # What devices have of both networks meets in one sum.
        return x + summed(self._shared(x, batch, norm) + y, batch.parallel)

    def _shared(self, x: jax.Array, batch: Batch, norm: jax.Array) -> jax.Array:
        """gate * shared(norm(x)), of this device."""
        shared = getattr(self, self.moe.shared_name)
        y = shared.added(x, batch, norm=norm, total=False)
        if not self.moe.shared_gate:
            return y
        gate = getattr(self, f"{self.moe.shared_name}_gate")
        score = linear(x, gate.w, batch=batch, norm=norm, norm_eps=self.eps)
        return jax.nn.sigmoid(score) * y
