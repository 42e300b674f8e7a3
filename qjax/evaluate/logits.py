"""What a model says of windows of tokens: hidden states, and logits of some of their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.engine.exact_jit import exact_jit
from qjax.engine.runner import numerics_for
from qjax.key_bases import key_bases
from qjax.kv_cache import PAGE_SIZE, cache_dtypes, init_cache, whole_sequences
from qjax.models import parts
from qjax.params import Params

ROWS = 128  # of logits at a time: a large vocabulary makes them large
TOKENS = 8192  # that an accelerator reads at a time; on a CPU, several windows gain nothing


class Reader(NamedTuple):
    """A model with its numerics.

    Attributes:
      hidden: from tokens int32 [B, T] to hidden states float32 [B, T, E].
      head: from hidden states [R, E] to logits float32 [R, V].
    """

    hidden: Callable[[np.ndarray], jax.Array]
    head: Callable[[Any], jax.Array]

    def rows(self, hidden: Any) -> Iterator[jax.Array]:
        """Logits of hidden states [T, E], at most `ROWS` of them at a time."""
        for first in range(0, len(hidden), ROWS):
            yield self.head(hidden[first : first + ROWS])

    def read(self, ids: np.ndarray) -> Iterator[jax.Array]:
        """Hidden states [T, E] of each of the windows [N, T]."""
        count, length = ids.shape
        most = 1 if jax.default_backend() == "cpu" else TOKENS // length
        together = max(1, min(count, most))
        for batch in (ids[first : first + together] for first in range(0, count, together)):
            # Of one shape all: some of the last may be there twice.
            yield from self.hidden(np.resize(batch, (together, length)))[: len(batch)]

    def __call__(self, tokens: np.ndarray) -> Iterator[jax.Array]:
        """Logits of all tokens [T], like `rows`."""
        return self.rows(self.hidden(tokens[None])[0])


def reader(
    params: Params,
    numerics: str = "exact",
    kv_cache_dtype: str = "auto",
    kv_cache_dtype_skip_layers: Sequence[int | str] = (),
) -> Reader:
    """A model as the engine has it while it reads a prompt.

    Args:
      numerics, kv_cache_dtype, kv_cache_dtype_skip_layers: see `qjax.generate`.

    Raises:
      RequestError: an argument is none of those.
    """
    chosen = numerics_for(numerics, 1)
    dtypes = cache_dtypes(
        params.config, kv_cache_dtype, chosen.cache_dtype, kv_cache_dtype_skip_layers
    )
    return rounded_reader(params, chosen.prefill, dtypes)


def rounded_reader(params: Params, numerics: str, dtypes: str | Sequence[str]) -> Reader:
    """The same by `numerics` of a `Batch` and the dtype of the cache, of all layers or of each."""
    dtypes = dtypes if isinstance(dtypes, str) else tuple(dtypes)
    bases = key_bases(params, dtypes, numerics)
    return Reader(
        lambda tokens: _hidden(numerics, dtypes, params, jnp.asarray(tokens, jnp.int32), bases),
        lambda hidden: _head(numerics, params, jnp.asarray(hidden)),
    )


@exact_jit(static_argnums=(0, 1))
def _hidden(
    numerics: str, dtypes: str | tuple[str, ...], params: Params, tokens: jax.Array, bases: Any
) -> jax.Array:
    count, length = tokens.shape
    batch = whole_sequences(count, length, numerics)
    cache = init_cache(
        parts.cache_config(params), batch.block_table.size, PAGE_SIZE, dtypes, bases=bases
    )
    hidden, _ = parts.run(params, tokens.reshape(-1), batch, cache)
    return hidden.reshape(count, length, -1)


@exact_jit(static_argnums=0)
def _head(numerics: str, params: Params, hidden: jax.Array) -> jax.Array:
    batch = whole_sequences(1, len(hidden), numerics)
    return parts.logits(params, hidden, batch)
