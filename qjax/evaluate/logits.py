"""Logits of a window of tokens, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.engine.runner import numerics_for
from qjax.key_bases import key_bases
from qjax.kv_cache import PAGE_SIZE, cache_dtypes, init_cache, whole_sequences
from qjax.models import functional
from qjax.params import Params

ROWS = 128  # of logits at a time: a large vocabulary makes them large

Logits = Callable[[np.ndarray], Iterator[jax.Array]]


def logits_of(
    params: Params,
    numerics: str = "exact",
    kv_cache_dtype: str = "auto",
    kv_cache_dtype_skip_layers: Sequence[int | str] = (),
) -> Logits:
    """Logits as the engine has them while it reads a prompt.

    Args:
      numerics, kv_cache_dtype, kv_cache_dtype_skip_layers: see `qjax.generate`.

    Returns:
      A function from tokens int32 [T] to float32 [R, V], R at most `ROWS`, of all T one after the
      other.

    Raises:
      RequestError: an argument is none of those.
    """
    chosen = numerics_for(numerics, 1)
    dtypes = cache_dtypes(
        params.config, kv_cache_dtype, chosen.cache_dtype, kv_cache_dtype_skip_layers
    )
    return rounded_logits(params, chosen.prefill, dtypes)


def rounded_logits(params: Params, numerics: str, dtypes: str | Sequence[str]) -> Logits:
    """The same by `numerics` of a `Batch` and the dtype of the cache, of all layers or of each."""
    bases = key_bases(params, dtypes, numerics)

    @jax.jit
    def hidden_states(params: Params, tokens: jax.Array, bases: Any) -> jax.Array:
        batch = whole_sequences(1, len(tokens), numerics)
        cache = init_cache(params.config, batch.block_table.size, PAGE_SIZE, dtypes, bases=bases)
        return functional.run(params.config, params.tree, tokens, batch, cache)[0]

    @jax.jit
    def head(params: Params, hidden: jax.Array) -> jax.Array:
        return functional.logits(
            params.config, params.tree, hidden, whole_sequences(1, len(hidden), numerics)
        )

    def logits(tokens: np.ndarray) -> Iterator[jax.Array]:
        hidden = hidden_states(params, jnp.asarray(tokens, jnp.int32), bases)
        for first in range(0, len(tokens), ROWS):
            yield head(params, hidden[first : first + ROWS])

    return logits
