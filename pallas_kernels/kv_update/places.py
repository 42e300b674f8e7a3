"""Where the tokens of a ragged batch stand, and what they bring to a cache."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.kv_update.pages import Pages, in_basis, turned, turns_keys, turns_values
from pallas_kernels.kv_update.turn import turn


class Places(NamedTuple):
    """Of each token of a batch, int32 [T] but for `real`.

    Attributes:
      owner: its sequence; of padding, any.
      position: in its sequence; 0 of padding.
      page, slot: of the cache; page is `len(pages)`, one past the last, for padding.
      real: bool [T], whether it is no padding.
    """

    owner: jax.Array
    position: jax.Array
    page: jax.Array
    slot: jax.Array
    real: jax.Array


def places(
    tokens: int,
    pages: Pages,
    block_table: jax.Array,
    query_start_loc: jax.Array,
    seq_lens: jax.Array,
) -> Places:
    """Where each of `tokens` tokens stands, see `paged_attention.api` for the arguments."""
    index = jnp.arange(tokens)
    ends = query_start_loc[1:]
    real = index < ends[-1]
    owner = owners(ends, index)
    position = jnp.where(real, seq_lens[owner] - (ends[owner] - index), 0)
    block = jnp.clip(position // pages.page_size, 0, block_table.shape[1] - 1)
    page = jnp.where(real, block_table[owner, block], len(pages.values))
    return Places(owner, position, page, position % pages.page_size, real)


def owners(ends: jax.Array, index: jax.Array) -> jax.Array:
    """Which run each index lies in, of runs one after the other that end before `ends`, int32
    [S]; the last one for what is beyond."""
    # All at once: a search is a loop of gathers.
    run = jnp.searchsorted(ends, index, side="right", method="compare_all")
    return jnp.minimum(run, len(ends) - 1)


def heads_of(
    x: jax.Array,
    head_dim: int,
    dtype: str,
    rope: tuple[jax.Array, jax.Array] | None,
    weight: jax.Array | None,
    eps: float,
    k_scale: jax.Array | None,
    basis: jax.Array | None,
) -> jax.Array:
    """Heads of queries or keys as they meet: normed, turned by rope, and by a Hadamard matrix where
    the pages are such, or taken to a basis of their own.

    Args:
      x: float32 [T, H * head_dim].
      dtype: of the pages.
      k_scale: of float8 pages, where it came with the model.
      basis: the half of a `Basis` that is theirs.

    Returns:
      float32 [T, H, head_dim].
    """
    heads = turn(x.reshape(len(x), -1, head_dim), rope, weight, eps)
    if basis is not None:
        return in_basis(heads, basis)
    return turned(heads) if turns_keys(dtype, k_scale) else heads


def values_of(v: jax.Array, head_dim: int, dtype: str) -> jax.Array:
    """Heads of values, float32 [T, H, head_dim], as pages of `dtype` hold them."""
    heads = v.reshape(len(v), -1, head_dim)
    return turned(heads) if turns_values(dtype) else heads
