"""Multi-head latent attention: keys and values grow from one small vector a token.

DeepSeek-V2 (arXiv:2405.04434, section 2.1) projects the input down to a latent vector, norms it and
projects that up to the keys and values of all heads. Positions enter by a few more dimensions of
each query and one more key, which all heads share; only these are rotated.

Where one matrix makes keys and values of all heads, the cache holds these, each filled up to one
width with zeros, which is exact and serves every attention kernel: 2 * heads * width numbers a
token. Where each head has a matrix for its keys and one for its values (as llama.cpp stores them),
the first goes to the queries and the second behind the attention (section 2.1.2 there, "absorbed"):
all heads attend to the latent vector and the shared key, and the cache takes 2 * (kv_lora_rank +
qk_rope_head_dim) numbers a token, 42 times less in DeepSeek-V3.

Either cache can be of any dtype; the dimensions that are rotated share the scale of the others.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.paged_attention import AttentionSpec
from qjax import ops
from qjax.kv_cache import Batch, LayerCache
from qjax.layers.linear import Linear, Norm
from qjax.layers.mla_config import MLAConfig
from qjax.layers.rope import RopeConfig
from qjax.ops.heads import norm as rms_norm
from qjax.ops.heads import per_head

# Norms of the latent vectors have an epsilon of their own, whatever the config says of others.
LATENT_EPS = 1e-6


class LatentAttention(nnx.Module):
    """Latent attention, for the same call as `qjax.layers.attention.Attention`.

    Args:
      hidden_size: of the residual stream.
      mla: sizes of its projections.
      spec: heads, scale and window; as many heads of keys as of queries, or one where these are
        latent, each of `mla.cache_head_dim`, of which the kernel rotates nothing.
      bias: whether the projections from and to the residual stream have biases (but for `q_proj`).
      eps: of the norms of the residual stream.
    """

    def __init__(
        self,
        hidden_size: int,
        mla: MLAConfig,
        spec: AttentionSpec,
        rope: RopeConfig,
        *,
        bias: bool,
        eps: float,
    ):
        queries = spec.num_heads * mla.qk_head_dim
        rank = mla.q_lora_rank
        if rank is None:
            self.q_proj = Linear(hidden_size, queries)
        else:
            self.q_a_proj = Linear(hidden_size, rank, bias)
            self.q_a_layernorm = Norm(rank)
            self.q_b_proj = Linear(rank, queries)
        latent = mla.kv_lora_rank
        self.kv_a_proj_with_mqa = Linear(hidden_size, latent + mla.qk_rope_head_dim, bias)
        self.kv_a_layernorm = Norm(latent)
        if mla.split:
            self.k_b_proj = Linear(mla.qk_nope_head_dim, latent, lead=(spec.num_heads,))
            self.v_b_proj = Linear(latent, mla.v_head_dim, lead=(spec.num_heads,))
        else:
            heads = spec.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
            self.kv_b_proj = Linear(latent, heads)
        self.o_proj = Linear(spec.num_heads * mla.v_head_dim, hidden_size, bias)
        self.mla, self.spec, self.rope, self.eps = mla, spec, rope, eps

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
        q, k, v = self._heads(x, batch, tables[self.rope], norm)
        size = self.spec.head_dim
        out, layer_cache = ops.paged_attention(
            _filled(q, size),
            _filled(k, size),
            _filled(v, size),
            layer_cache,
            batch,
            self.spec,
        )
        out = out.reshape(len(x), self.spec.num_heads, size)[:, :, : v.shape[-1]]
        if self.mla.split:
            out = per_head(out, self.v_b_proj.w, batch=batch)
        x = ops.linear(
            out.reshape(len(x), -1),
            self.o_proj.w,
            bias=self.o_proj.b,
            batch=batch,
            by_inputs=True,
            residual=x,
            post_norm=post_norm,
            norm_eps=self.eps,
        )
        return x, layer_cache

    def _heads(
        self,
        x: jax.Array,
        batch: Batch,
        tables: tuple[jax.Array, jax.Array],
        norm: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated q and k [T, H, qk_head_dim] and v [T, H, v_head_dim]; latent ones, q [T, H,
        cache_head_dim], k [T, 1, cache_head_dim] and v [T, 1, kv_lora_rank]."""
        mla, shape = self.mla, (len(x), self.spec.num_heads, -1)
        direct = mla.q_lora_rank is None
        down = (self.q_proj if direct else self.q_a_proj, self.kv_a_proj_with_mqa)
        q, kv = ops.linear(
            x,
            tuple(p.w for p in down),
            bias=tuple(p.b for p in down),
            batch=batch,
            norm=norm,
            norm_eps=self.eps,
        )
        if not direct:
            q = ops.linear(
                q, self.q_b_proj.w, batch=batch, norm=self.q_a_layernorm.w, norm_eps=LATENT_EPS
            )
        latent, shared = jnp.split(kv, [mla.kv_lora_rank], axis=-1)
        q_nope, q_rope = jnp.split(q.reshape(shape), [mla.qk_nope_head_dim], axis=-1)
        q_rope = rotate(q_rope, tables, mla.rope_interleave)
        k_rope = rotate(shared[:, None], tables, mla.rope_interleave)
        if mla.split:
            q_nope = per_head(q_nope, self.k_b_proj.w, batch=batch)
            k_nope = v = rms_norm(latent, self.kv_a_layernorm.w, LATENT_EPS)[:, None]
        else:
            kv = ops.linear(
                latent,
                self.kv_b_proj.w,
                batch=batch,
                norm=self.kv_a_layernorm.w,
                norm_eps=LATENT_EPS,
            )
            k_nope, v = jnp.split(kv.reshape(shape), [mla.qk_nope_head_dim], axis=-1)
            k_rope = jnp.broadcast_to(k_rope, q_rope.shape)
        return (
            jnp.concatenate([q_nope, q_rope], axis=-1),
            jnp.concatenate([k_nope, k_rope], axis=-1),
            v,
        )


def rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array], interleave: bool) -> jax.Array:
    """Rope on all dimensions of the heads of x.

    Neighbouring pairs are taken apart first and left so: queries and keys change alike, and scores
    do not depend on the order of dimensions.

    Args:
      x: float32 [T, H, D].
      tables: (cos, sin), float32 [T, D / 2].
      interleave: pair i is (2i, 2i + 1), otherwise (i, i + D / 2).
    """
    if interleave:
        x = jnp.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)
    return ops.rotate(x, tables)


def _filled(x: jax.Array, head_dim: int) -> jax.Array:
    """[T, H, D] with zeros up to head_dim, as [T, H * head_dim]."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, head_dim - x.shape[-1]))).reshape(len(x), -1)
