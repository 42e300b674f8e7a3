"""`forward`: logits of whole sequences, for evaluation and for looking inside."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qjax.kv_cache import PAGE_SIZE, Basis, cache_dtypes, init_cache, whole_sequences
from qjax.models import parts
from qjax.params import Params


def forward(
    params: Params,
    tokens: jax.Array,
    numerics: str = "exact",
    *,
    kv_cache_dtype: str = "auto",
    kv_cache_dtype_skip_layers: Sequence[int | str] = (),
    key_bases: Sequence[Basis | None] | None = None,
) -> jax.Array:
    """Logits after every token. Pure; works under `jax.jit` and `jax.vmap`.

    Args:
      params: a model.
      tokens: int [B, T] or [T].
      numerics: "exact" (activations stay float32), or how they may be rounded: "bfloat16",
        "int16" or "int8".
      kv_cache_dtype, kv_cache_dtype_skip_layers: see `qjax.generate`; "auto" is float32 here.
      key_bases: what `qjax.key_bases(params, kv_cache_dtype)` gives, to cache keys as the engine
        does; without it they are turned by a Hadamard matrix alone.

    Returns:
      float32 [B, T, V] or [T, V].
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    if tokens.ndim == 1:
        return forward(
            params,
            tokens[None],
            numerics,
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_dtype_skip_layers=kv_cache_dtype_skip_layers,
            key_bases=key_bases,
        )[0]
    rows, length = tokens.shape
    batch = whole_sequences(rows, length, numerics)
    dtypes = cache_dtypes(params.config, kv_cache_dtype, "float32", kv_cache_dtype_skip_layers)
    cache = init_cache(
        parts.cache_config(params), batch.block_table.size, PAGE_SIZE, dtypes, bases=key_bases
    )
    hidden, _ = parts.run(params, tokens.reshape(-1), batch, cache)
    logits = parts.logits(params, hidden, batch)
    return logits.reshape(rows, length, -1)
