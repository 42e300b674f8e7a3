"""The model as quantization sees it: one decoder layer at a time, its weights as float arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from qjax import ops
from qjax.checkpoint import native
from qjax.compress import statistics
from qjax.compress.statistics import InputStats
from qjax.engine.exact_jit import exact_jit
from qjax.kv_cache import PAGE_SIZE, LayerCache, init_layer_cache, whole_sequences
from qjax.models import functional
from qjax.models.config import ModelConfig
from qjax.ops import floats
from qjax.ops.dense import dequantized
from qjax.params import Params
from qjax.qarray import QArray

Flat = dict[str, Any]
"""Parameters of one layer by their names below it: "self_attn.q_proj.weight"."""

LAYERS = "model.layers."
EMBEDDING, HEAD, NORM = "model.embed_tokens", "lm_head", "model.norm"


def modules(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape (..., N, K) of every matrix, by the name of its module."""
    shapes = functional.parameter_shapes(config)
    return {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) > 1
    }


def prefix(index: int) -> str:
    """What the names of a layer's parameters begin with."""
    return f"{LAYERS}{index}."


def flat(tree: Mapping[str, Any]) -> Flat:
    """A nested dict as one, names joined by dots."""
    return {".".join(path): leaf for path, leaf in native.leaves_of(tree)}


def nested(names: Mapping[str, Any]) -> dict[str, Any]:
    """What `flat` was given."""
    tree: dict[str, Any] = {}
    for name, value in names.items():
        native.put(tree, name.split("."), value)
    return tree


def dense(weight: QArray) -> jax.Array:
    """float32 [..., N, K] of a weight in any layout, see `dequantized`."""
    return jnp.asarray(dequantized(ops.unprepare(jax.tree.map(np.asarray, weight))))


def stored_layer(params: Params, index: int) -> Flat:
    """One layer's parameters, as they are."""
    return flat(params.tree["model"]["layers"][str(index)])


def floats_of(stored: Flat) -> Flat:
    """Parameters as float32 arrays."""
    return {k: dense(v) if isinstance(v, QArray) else v for k, v in stored.items()}


def run(config: ModelConfig, index: int, layer: Flat, x: jax.Array) -> tuple[jax.Array, LayerCache]:
    """A layer's outputs, and what it caches, for hidden states float32 [S, T, E] of whole
    sequences."""
    sequences, length, _ = x.shape
    batch = whole_sequences(sequences, length, "exact")
    pages = batch.block_table.size
    cache = init_layer_cache(config, pages, PAGE_SIZE, "float32")
    rows = x.reshape(sequences * length, -1)
    y, cached = functional.run_layer(config, index, nested(layer), rows, batch, cache)
    assert cached is not None
    return y.reshape(x.shape), cached


def run_uncached(config: ModelConfig, index: int, layer: Flat, x: jax.Array) -> jax.Array:
    """The outputs alone, in operations that have gradients."""
    sequences, length, _ = x.shape
    batch = whole_sequences(sequences, length, "exact")
    rows = x.reshape(sequences * length, -1)
    # Kernels have no gradients.
    with dispatch.use("xla"):
        y, _ = functional.run_layer(config, index, nested(layer), rows, batch, None)
    return y.reshape(x.shape)


@exact_jit(static_argnames=("config", "index"))
def outputs(config: ModelConfig, index: int, layer: Flat, x: jax.Array) -> jax.Array:
    """What a layer makes of hidden states float32 [S, T, E] of whole sequences.

    Args:
      index: of a layer that computes the same, see `functional.same_layer`.
      layer: float arrays, or QArrays.
    """
    return run(config, index, layer, x)[0]


@exact_jit(static_argnames=("config", "index"))
def cached_extremes(
    config: ModelConfig, index: int, layer: Flat, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The largest absolute values of the keys (rotated) and of the values of each head that are
    cached: float32 [num_kv_heads] each."""
    cache = run(config, index, layer, x)[1]
    keys, values = (jnp.abs(pages.values).max((0, 2, 3)) for pages in cache[:2])
    return keys, values


@exact_jit(static_argnames=("config", "index"))
def input_stats(
    config: ModelConfig, index: int, layer: Flat, x: jax.Array
) -> dict[str, InputStats]:
    """Statistics of the inputs of linear layers, for the first by name of those that share them
    (see `shared_inputs`). The layer is of float arrays."""
    return _stats_and_outputs(config, index, layer, x)[0]


@exact_jit(static_argnames=("config", "index"))
def stats_and_outputs(
    config: ModelConfig, index: int, layer: Flat, x: jax.Array
) -> tuple[dict[str, InputStats], jax.Array]:
    """`input_stats` and `outputs` in one run."""
    return _stats_and_outputs(config, index, layer, x)


def _stats_and_outputs(
    config: ModelConfig, index: int, layer: Flat, x: jax.Array
) -> tuple[dict[str, InputStats], jax.Array]:
    names = {id(weight): name.removesuffix(".weight") for name, weight in layer.items()}
    with floats.watch() as seen:
        y, _ = run(config, index, layer, x)
    found: dict[str, InputStats] = {}
    for product in seen:
        first = min(names[id(weight)] for weight in product.weights)
        if product.sizes is None:
            found[first] = statistics.of_rows(product.inputs)
        else:
            found[first] = statistics.of_experts(product.inputs, product.sizes)
    return found, y


# The layers that take the same inputs, by the last part of their names.
_SIDE_BY_SIDE = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("q_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
)


def shared_inputs(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Modules of a layer in groups that take the same inputs, each sorted by name."""
    left = sorted(names)
    groups = []
    while left:
        parent, _, last = left[0].rpartition(".")
        beside = {f"{parent}.{other}" for side in _SIDE_BY_SIDE if last in side for other in side}
        group = tuple(name for name in left if name == left[0] or name in beside)
        left = [name for name in left if name not in group]
        groups.append(group)
    return groups
