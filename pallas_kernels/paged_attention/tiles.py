"""A ragged batch of queries cut into tiles, none of which spans two sequences."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.kv_update.places import owners


class Tiles(NamedTuple):
    """Of each tile, int32 [N]; there are more than any batch of these shapes needs.

    Attributes:
      sequence: whose tokens these are.
      first: its first token in the batch.
      count: its tokens; 0 where the tile is not needed. Those come last.
      position: of its first token in the sequence.
    """

    sequence: jax.Array
    first: jax.Array
    count: jax.Array
    position: jax.Array


def tokens_per_tile(tokens: int, sequences: int, group: int, rows: int) -> int:
    """A power of two: about what a sequence has on the average, as long as `group` heads of each
    token are at most `rows` together."""
    average = max(1, -(-tokens // sequences))
    most = max(1, rows // group)
    return min(1 << (average - 1).bit_length(), 1 << (most.bit_length() - 1))


def tiles(
    tokens: int, per_tile: int, query_start_loc: jax.Array, seq_lens: jax.Array
) -> tuple[Tiles, jax.Array]:
    """Tiles of up to `per_tile` of `tokens` tokens, and the first tile of each sequence, int32 [S].

    See `paged_attention.api` for the arguments.
    """
    sequences = len(seq_lens)
    # Each sequence with tokens may leave a tile partly empty.
    bound = (tokens + min(tokens, sequences) * (per_tile - 1)) // per_tile
    counts = jnp.diff(query_start_loc)
    needed = -(-counts // per_tile)
    ends = jnp.cumsum(needed)
    index = jnp.arange(bound)
    owner = owners(ends, index)
    before = (index - (ends - needed)[owner]) * per_tile
    used = index < ends[-1]
    count = jnp.where(used, jnp.minimum(counts[owner] - before, per_tile), 0)
    first = jnp.where(used, query_start_loc[owner] + before, 0)
    position = jnp.where(used, (seq_lens - counts)[owner] + before, 0)
    fields = (x.astype(jnp.int32) for x in (owner, first, count, position))
    return Tiles(*fields), (ends - needed).astype(jnp.int32)
