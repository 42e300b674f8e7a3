"""The decoder that all supported models are: Llama, with what a `ModelConfig` switches on.

Modules and attributes have the names of Hugging Face's, so that the state of the module is a nested
dict with a checkpoint's own names. Weights are never looked at here: a parameter may be a float
array or a QArray of any type.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from pallas_kernels.paged_attention import AttentionSpec
from qjax import ops
from qjax.kv_cache import Batch, KVCache, LayerCache
from qjax.layers.attention import Attention
from qjax.layers.linear import Linear, Norm
from qjax.layers.mla import LatentAttention
from qjax.layers.mlp import GatedMLP
from qjax.layers.moe import SparseMLP
from qjax.layers.rope import RopeConfig, rope_tables
from qjax.models.config import ModelConfig
from qjax.sharding import Parallel


class DecoderLayer(nnx.Module):
    """x + attention, then x + feed-forward, each with a post norm where the model has them."""

    def __init__(self, config: ModelConfig, layer: int):
        rope = config.rope_for(config.layer_types[layer])
        spec = AttentionSpec(
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            rope.rotary_dim if config.mla is None else 0,
            config.query_scale,
            config.window_for(layer),
            config.attn_soft_cap,
        )
        if config.mla is not None:
            self.self_attn = LatentAttention(
                config.hidden_size,
                config.mla,
                spec,
                rope,
                bias=config.attention_bias,
                eps=config.rms_norm_eps,
            )
        else:
            self.self_attn = Attention(
                config.hidden_size,
                spec,
                rope,
                bias=config.attention_bias,
                output_bias=config.attention_output_bias,
                qk_norm=config.qk_norm,
                eps=config.rms_norm_eps,
                kv_scales=config.kv_scales,
                sinks=config.attention_sinks,
            )
        mlp: GatedMLP | SparseMLP
        self.mlp_name = "mlp"
        if config.moe is not None and config.moe.layers[layer]:
            mlp = SparseMLP(
                config.hidden_size,
                config.moe,
                activation=config.hidden_act,
                eps=config.rms_norm_eps,
            )
            self.mlp_name = config.moe.module
        else:
            mlp = GatedMLP(
                config.hidden_size,
                config.intermediate_size,
                activation=config.hidden_act,
                bias=config.mlp_bias,
                eps=config.rms_norm_eps,
            )
        setattr(self, self.mlp_name, mlp)
        self.input_layernorm = Norm(config.hidden_size)
        self.post_attention_layernorm = Norm(config.hidden_size)
        self.post_norms = config.post_norms
        if config.post_norms:
            self.pre_feedforward_layernorm = Norm(config.hidden_size)
            self.post_feedforward_layernorm = Norm(config.hidden_size)

    def __call__(
        self,
        x: jax.Array,
        layer_cache: LayerCache | None,
        batch: Batch,
        tables: dict[RopeConfig, tuple[jax.Array, jax.Array]],
    ) -> tuple[jax.Array, LayerCache | None]:
        # Without post norms, `post_attention_layernorm` is the one before the feed-forward network.
        if self.post_norms:
            after_attention, before_mlp, after_mlp = (
                self.post_attention_layernorm.w,
                self.pre_feedforward_layernorm.w,
                self.post_feedforward_layernorm.w,
            )
        else:
            after_attention, before_mlp, after_mlp = None, self.post_attention_layernorm.w, None
        x, layer_cache = self.self_attn(
            x, layer_cache, batch, tables, norm=self.input_layernorm.w, post_norm=after_attention
        )
        mlp = getattr(self, self.mlp_name)
        return mlp(x, batch, norm=before_mlp, post_norm=after_mlp), layer_cache


class Backbone(nnx.Module):
    """Embedding, layers and the weight of the final norm."""

    def __init__(self, config: ModelConfig):
        self.embed_tokens = Linear(config.hidden_size, config.vocab_size)
        self.layers = nnx.List([DecoderLayer(config, i) for i in range(config.num_layers)])
        self.norm = Norm(config.hidden_size)


class Decoder(nnx.Module):
    """A causal language model."""

    def __init__(self, config: ModelConfig):
        self.model = Backbone(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.config = config

    def __call__(
        self, tokens: jax.Array, batch: Batch, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """Hidden states of the batch's tokens.

        Args:
          tokens: int32 [T].

        Returns:
          float32 [T, E] before the final norm, and the cache with the tokens' keys and values.
        """
        x = self.embed(tokens, batch.parallel)
        tables = position_tables(self.config, batch)

        def run(
            graph: Any, weights: Any, x: jax.Array, cache: LayerCache, batch: Batch
        ) -> tuple[jax.Array, LayerCache]:
            return nnx.merge(graph, weights)(x, cache, batch, tables)

        # Layers that are alike are traced and lowered once: with GPU kernels that takes far longer
        # than compiling. The function is this trace's own, since kernels are chosen in each.
        alike = jax.jit(run, static_argnums=0) if isinstance(x, Tracer) else run
        layers = []
        for layer, layer_cache in zip(self.model.layers, cache, strict=True):
            graph, weights = nnx.split(layer)
            x, layer_cache = alike(graph, weights, x, layer_cache, batch)
            layers.append(layer_cache)
        return x, tuple(layers)

    def embed(self, tokens: jax.Array, parallel: Parallel | None = None) -> jax.Array:
        """float32 [T, E] of tokens int32 [T]."""
        x = ops.embedding(self.model.embed_tokens.w, tokens, parallel)
        scale = self.config.embedding_scale
        return x if scale == 1.0 else x * jnp.float32(scale)

    def logits(self, hidden: jax.Array, batch: Batch) -> jax.Array:
        """float32 [R, V] from hidden states [R, E]: final norm, head, soft cap.

        Where the vocabulary is split, each device's part of it.
        """
        if batch.head_numerics is not None:
            batch = replace(batch, numerics=batch.head_numerics)
        tied = self.config.tie_word_embeddings
        head = self.model.embed_tokens if tied else self.lm_head
        logits = ops.linear(
            hidden,
            head.w,
            batch=batch,
            norm=self.model.norm.w,
            norm_eps=self.config.rms_norm_eps,
            rows=None if len(hidden) == len(batch.positions) else jnp.int32([len(hidden)]),
        )
        cap = self.config.final_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def position_tables(
    config: ModelConfig, batch: Batch
) -> dict[RopeConfig, tuple[jax.Array, jax.Array]]:
    """(cos, sin) of the batch's positions, for each way in which layers rotate."""
    return {rope: _rope(rope, batch) for _, rope in config.rope}


def _rope(rope: RopeConfig, batch: Batch) -> tuple[jax.Array, jax.Array]:
    lengths = None
    if rope.depends_on_length:
        index = jnp.arange(len(batch.positions))
        owner = jnp.searchsorted(batch.query_start_loc[1:], index, side="right")
        lengths = batch.seq_lens[jnp.minimum(owner, len(batch.seq_lens) - 1)]
    return rope_tables(rope, batch.positions, lengths)
