"""The seam between Flax modules and plain trees.

A module's structure is made once a config, from shapes alone; a call merges it with a tree of
weights inside the traced function. Only trees cross the border of `jax.jit`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
from flax import nnx

from qjax.kv_cache import Batch, KVCache, LayerCache
from qjax.models.config import ModelConfig
from qjax.models.decoder import Decoder, DecoderLayer, position_tables


@lru_cache
def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef, Any]:
    return nnx.split(nnx.eval_shape(lambda: Decoder(config)))


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter, by its Hugging Face name.

    Of layers that are alike one is built: a hundred would take seconds.
    """
    around = _flat(_abstract(replace(config, num_layers=0, layer_types=()))[1])
    kinds = [same_layer(config, index) for index in range(config.num_layers)]
    layers = {index: _flat(_abstract_layer(config, index)[1]) for index in set(kinds)}
    found = {name: shape for name, shape in around.items() if name < "model.layers"}
    for index, kind in enumerate(kinds):
        found |= {f"model.layers.{index}.{name}": shape for name, shape in layers[kind].items()}
    return found | around


def _flat(state: Any) -> dict[str, tuple[int, ...]]:
    return {
        ".".join(map(str, path)): leaf.get_value().shape for path, leaf in nnx.to_flat_state(state)
    }


def _merge(config: ModelConfig, tree: Any) -> Decoder:
    return nnx.merge(_abstract(config)[0], nnx.State(_numbered(tree)))


def _numbered(tree: Any) -> Any:
    """The keys "0", "1", ... of the layers as the integers that Flax's lists have."""
    if not isinstance(tree, dict):
        return tree
    return {int(k) if k.isdigit() else k: _numbered(v) for k, v in tree.items()}


def run(
    config: ModelConfig, tree: Any, tokens: jax.Array, batch: Batch, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Hidden states float32 [T, E] of tokens int32 [T], and the cache with them entered."""
    return _merge(config, tree)(tokens, batch, cache)


def logits(config: ModelConfig, tree: Any, hidden: jax.Array, batch: Batch) -> jax.Array:
    """Logits float32 [R, V] of hidden states float32 [R, E]."""
    return _merge(config, tree).logits(hidden, batch)


@lru_cache
def _abstract_layer(config: ModelConfig, index: int) -> tuple[nnx.GraphDef, Any]:
    return nnx.split(nnx.eval_shape(lambda: DecoderLayer(config, index)))


def same_layer(config: ModelConfig, index: int) -> int:
    """The first layer that computes what layer `index` does, with other weights."""
    sparse = config.moe.layers if config.moe is not None else (False,) * config.num_layers
    kinds = list(zip(config.layer_types, sparse, strict=True))
    return kinds.index(kinds[index])


def run_layer(
    config: ModelConfig, index: int, tree: Any, x: jax.Array, batch: Batch, cache: LayerCache | None
) -> tuple[jax.Array, LayerCache | None]:
    """Layer `index` alone.

    Args:
      tree: its parameters, as they lie below "model.layers.<index>".
      x: hidden states float32 [T, E].
      cache: of this layer, or None: see `ops.paged_attention`.
    """
    layer = nnx.merge(_abstract_layer(config, index)[0], nnx.State(tree))
    return layer(x, cache, batch, position_tables(config, batch))


def embed(config: ModelConfig, tree: Any, tokens: jax.Array) -> jax.Array:
    """What the first layer is given, float32 [T, E], for tokens int32 [T]."""
    return _merge(config, tree).embed(tokens)
