"""Self-attention: q, k, v in one product, the cache, the output projection with the residual."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.paged_attention import AttentionSpec
from qjax import ops
from qjax.kv_cache import Batch, LayerCache
from qjax.layers.linear import Linear, Norm
from qjax.layers.rope import RopeConfig


class Attention(nnx.Module):
    """Grouped-query attention.

    Args:
      hidden_size: of the residual stream.
      spec: heads, scale, window, soft cap.
      bias, output_bias: whether q, k, v and whether the output projection have biases.
      qk_norm: RMSNorm of each head of q and k before rope.
      eps: of all norms.
      kv_scales: how many scales keys and values have, which are then rounded for the cache.
      sinks: a score for each head that takes its share of attention and gives nothing back.
    """

    def __init__(
        self,
        hidden_size: int,
        spec: AttentionSpec,
        rope: RopeConfig,
        *,
        bias: bool,
        output_bias: bool,
        qk_norm: bool,
        eps: float,
        kv_scales: int = 0,
        sinks: bool = False,
    ):
        heads, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj = Linear(hidden_size, heads, bias)
        self.k_proj = Linear(hidden_size, kv, bias)
        self.v_proj = Linear(hidden_size, kv, bias)
        self.o_proj = Linear(heads, hidden_size, output_bias)
        self.q_norm = Norm(spec.head_dim) if qk_norm else None
        self.k_norm = Norm(spec.head_dim) if qk_norm else None
        self.k_scale = nnx.Param(jnp.zeros((kv_scales,))) if kv_scales else None
        self.v_scale = nnx.Param(jnp.zeros((kv_scales,))) if kv_scales else None
        self.sinks = nnx.Param(jnp.zeros((spec.num_heads,))) if sinks else None
        self.spec, self.rope, self.eps = spec, rope, eps

    def __call__(
        self,
        x: jax.Array,
        layer_cache: LayerCache | None,
        batch: Batch,
        tables: dict[RopeConfig, tuple[jax.Array, jax.Array]],
        *,
        norm: jax.Array,
        post_norm: jax.Array | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """x + attention(norm(x)), with `post_norm` on what is added. x is float32 [T, E]."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = ops.linear(
            x,
            tuple(p.w for p in projections),
            bias=tuple(p.b for p in projections),
            batch=batch,
            norm=norm,
            norm_eps=self.eps,
        )
        scales = None
        if self.k_scale is not None and self.v_scale is not None:
            scales = self.k_scale.get_value(), self.v_scale.get_value()
        out, layer_cache = ops.paged_attention(
            q,
            k,
            v,
            layer_cache,
            batch,
            self.spec,
            rope=tables[self.rope],
            q_norm=self.q_norm and self.q_norm.w,
            k_norm=self.k_norm and self.k_norm.w,
            norm_eps=self.eps,
            cache_scales=scales,
            sinks=None if self.sinks is None else self.sinks.get_value(),
        )
        x = ops.linear(
            out,
            self.o_proj.w,
            bias=self.o_proj.b,
            batch=batch,
            by_inputs=True,
            residual=x,
            post_norm=post_norm,
            norm_eps=self.eps,
        )
        return x, layer_cache
