"""What a model says of windows of tokens: hidden states, and logits of some of their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.engine.runner import numerics_for
from qjax.key_bases import key_bases
from qjax.kv_cache import PAGE_SIZE, cache_dtypes, init_cache, whole_sequences
from qjax.models import functional
from qjax.params import Params

ROWS = 128  # of logits at a time: a large vocabulary makes them large


class Reader(NamedTuple):
    """A model with its numerics.

    Attributes:
      hidden: from tokens int32 [T] to hidden states float32 [T, E].
      head: from hidden states [R, E] to logits float32 [R, V].
    """

    hidden: Callable[[np.ndarray], jax.Array]
    head: Callable[[Any], jax.Array]

    def rows(self, hidden: Any) -> Iterator[jax.Array]:
        """Logits of hidden states [T, E], at most `ROWS` of them at a time."""
        for first in range(0, len(hidden), ROWS):
            yield self.head(hidden[first : first + ROWS])

    def __call__(self, tokens: np.ndarray) -> Iterator[jax.Array]:
        """The same of all tokens [T]."""
        return self.rows(self.hidden(tokens))


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


@partial(jax.jit, static_argnums=(0, 1))
def _hidden(
    numerics: str, dtypes: str | tuple[str, ...], params: Params, tokens: jax.Array, bases: Any
) -> jax.Array:
    batch = whole_sequences(1, len(tokens), numerics)
    cache = init_cache(params.config, batch.block_table.size, PAGE_SIZE, dtypes, bases=bases)
    return functional.run(params.config, params.tree, tokens, batch, cache)[0]


@partial(jax.jit, static_argnums=0)
def _head(numerics: str, params: Params, hidden: jax.Array) -> jax.Array:
    batch = whole_sequences(1, len(hidden), numerics)
    return functional.logits(params.config, params.tree, hidden, batch)
