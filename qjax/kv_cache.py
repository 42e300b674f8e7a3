"""The paged key-value cache, and the batch of flattened tokens that one step works on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.kv_update.pages import CACHE_DTYPES, Basis, Pages, empty
from qjax.errors import RequestError
from qjax.sharding import Parallel

if TYPE_CHECKING:
    from qjax.models.config import ModelConfig

NUMERICS = ("exact", "bfloat16", "int16", "int8")

PAGE_SIZE = 32  # of caches that live for one call
KV_CACHE_DTYPES = ("auto", "fp8", *CACHE_DTYPES)


class LayerCache(NamedTuple):
    """Of one layer; a pytree.

    Attributes:
      keys, values: their pages.
      basis: of keys and queries, where the cache has one (see `qjax.key_bases`).
      seen: () asks for the batch's own keys and queries, float32 [T, num_kv_heads, head_dim] and
        [T, num_heads, head_dim], normed but not rotated, which the layer leaves here.
    """

    keys: Pages
    values: Pages
    basis: Basis | None = None
    seen: tuple[jax.Array, ...] | None = None


KVCache = tuple[LayerCache, ...]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions", "query_start_loc", "seq_lens", "block_table"],
    meta_fields=["numerics", "head_numerics", "parallel"],
)
@dataclass(frozen=True)
class Batch:
    """Sequences whose new tokens lie one after the other in [T].

    Attributes:
      positions: int32 [T], of each token in its sequence.
      query_start_loc: int32 [S + 1], where the tokens of each sequence start; tokens from
        query_start_loc[-1] on are padding.
      seq_lens: int32 [S], length of each sequence with its new tokens.
      block_table: int32 [S, B], the pages of each sequence in order.
      numerics: how activations may be rounded before they meet a weight: "exact" not at all,
        the others as `pallas_kernels.matmul` describes its `activation_dtype`. Static.
      head_numerics: the same for logits; None as elsewhere. Static.
      parallel: how the model is split, inside of a `shard_map`; None elsewhere. Static.
    """

    positions: Any
    query_start_loc: Any
    seq_lens: Any
    block_table: Any
    numerics: str = field(default="exact")
    head_numerics: str | None = None
    parallel: Parallel | None = None

    def __post_init__(self) -> None:
        for numerics in (self.numerics, self.head_numerics or "exact"):
            if numerics not in NUMERICS:
                known = ", ".join(NUMERICS)
                raise ValueError(f"numerics must be one of {known}, got {numerics!r}")


def whole_sequences(rows: int, length: int, numerics: str) -> Batch:
    """`rows` sequences of `length` tokens, all new, which fill pages of `PAGE_SIZE` in order."""
    pages = -(-length // PAGE_SIZE)
    return Batch(
        positions=jnp.tile(jnp.arange(length, dtype=jnp.int32), rows),
        query_start_loc=jnp.arange(rows + 1, dtype=jnp.int32) * length,
        seq_lens=jnp.full((rows,), length, jnp.int32),
        block_table=jnp.arange(rows * pages, dtype=jnp.int32).reshape(rows, pages),
        numerics=numerics,
    )


def init_layer_cache(
    config: ModelConfig,
    num_pages: int,
    page_size: int,
    dtype: str,
    zeros: Callable[[tuple[int, ...], Any], Any] = jnp.zeros,
    basis: Basis | None = None,
) -> LayerCache:
    """An empty cache of `num_pages` pages of `page_size` tokens, one of `CACHE_DTYPES`."""
    shape = (num_pages, config.num_kv_heads, page_size, config.head_dim)
    return LayerCache(empty(shape, dtype, zeros), empty(shape, dtype, zeros), basis)


def init_cache(
    config: ModelConfig,
    num_pages: int,
    page_size: int,
    dtypes: str | Sequence[str],
    zeros: Callable[[tuple[int, ...], Any], Any] = jnp.zeros,
    bases: Sequence[Basis | None] | None = None,
) -> KVCache:
    """An empty cache of `num_pages` pages of `page_size` tokens for every layer.

    Args:
      dtypes: one of `CACHE_DTYPES`, or one for each layer.
      zeros: makes its arrays; on the host, `numpy.zeros` starts many times faster.
      bases: of each layer, see `qjax.key_bases`.
    """
    count = config.num_layers
    return tuple(
        init_layer_cache(config, num_pages, page_size, dtype, zeros, basis)
        for dtype, basis in zip(
            [dtypes] * count if isinstance(dtypes, str) else dtypes,
            [None] * count if bases is None else bases,
            strict=True,
        )
    )


def cache_dtypes(
    config: ModelConfig,
    asked: str,
    unrounded: str,
    skip_layers: Sequence[int | str] = (),
) -> tuple[str, ...]:
    """What the cache of each layer holds, one of `CACHE_DTYPES`.

    Args:
      asked: one of `KV_CACHE_DTYPES`. "auto" is 8-bit floats where scales for them came with the
        model, and `unrounded` elsewhere; "fp8" is "fp8_e4m3". Scales that came with the model
        serve "fp8_e4m3", which they were made for: int8 and int4 make their own.
      unrounded: what a cache holds that is not quantized.
      skip_layers: layers that keep `unrounded`: their numbers (or these as text, as in vLLM),
        negative ones from the end, or "sliding_window" for all that have one.

    Raises:
      RequestError: there is no such dtype or layer; a head has an odd number of dimensions, and
        4-bit codes go in pairs; or "fp8_e5m2" with scales from the model (which vLLM refuses too).
    """
    if asked not in KV_CACHE_DTYPES:
        known = ", ".join(KV_CACHE_DTYPES)
        raise RequestError(f"kv_cache_dtype must be one of {known}, got {asked!r}.")
    if asked == "auto":
        asked = "fp8_e4m3" if config.kv_scales else unrounded
    asked = "fp8_e4m3" if asked == "fp8" else asked
    if asked == "int4" and config.head_dim % 2:
        raise RequestError(
            f"kv_cache_dtype int4 takes heads of an even size, this model's is {config.head_dim}."
        )
    if asked == "fp8_e5m2" and config.kv_scales:
        raise RequestError(
            "kv_cache_dtype fp8_e5m2, but the scales that came with this model are for fp8_e4m3: "
            "take that, int8 or int4, or load with quantize_activations=False, without the scales."
        )
    count = config.num_layers
    skipped: set[int] = set()
    for layer in (skip_layers,) if isinstance(skip_layers, str) else skip_layers:
        if layer == "sliding_window":
            skipped |= {i for i in range(count) if config.window_for(i) is not None}
            continue
        try:
            number = int(layer)
        except (TypeError, ValueError):
            number = count  # no layer
        if not -count <= number < count or isinstance(layer, bool | float):
            raise RequestError(
                f"kv_cache_dtype_skip_layers must hold numbers in [{-count}, {count - 1}] or "
                f"'sliding_window', got {layer!r}."
            )
        skipped.add(number % count)
    return tuple(unrounded if i in skipped else asked for i in range(count))


def bytes_per_token(config: ModelConfig, dtypes: str | Sequence[str]) -> int:
    """Bytes of cache that one token takes in all layers together."""
    cache = init_cache(config, 1, 1, dtypes, jax.ShapeDtypeStruct)
    return sum(math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(cache))
