"""Rows of experts in tiles, for kernels that compute a tile at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def tile_table(group_sizes: jax.Array, rows: int, tile: int) -> dict[str, jax.Array]:
    """Whose rows each tile holds: "expert", "start" and "end" (rows), int32 [tiles].

    Each expert begins a tile of its own, so that there are at most rows / tile + E; those that
    nobody needs are empty.
    """
    tiles = rows // tile + min(group_sizes.shape[0], rows)
    of_expert = -(-group_sizes // tile)
    last = jnp.cumsum(of_expert)
    index = jnp.arange(tiles, dtype=jnp.int32)
    expert, used = experts_of(tiles, of_expert), index < last[-1]
    end = jnp.cumsum(group_sizes)[expert]
    start = end - group_sizes[expert] + (index - (last - of_expert)[expert]) * tile
    return {
        "expert": expert,
        "start": jnp.where(used, start, 0).astype(jnp.int32),
        "end": jnp.where(used, end, 0).astype(jnp.int32),
    }


def places(group_sizes: jax.Array, expert: jax.Array, tile: int) -> jax.Array:
    """int32 [rows]: where each row, of these `experts_of`, lies in tiles one after the other."""
    of_expert = -(-group_sizes // tile)
    first_tile = jnp.cumsum(of_expert) - of_expert
    start = jnp.cumsum(group_sizes) - group_sizes
    return first_tile[expert] * tile + jnp.arange(len(expert), dtype=jnp.int32) - start[expert]


def experts_of(rows: int, group_sizes: jax.Array) -> jax.Array:
    """int32 [rows]: whose each row is; of padding, the last one's."""
    ends = jnp.cumsum(group_sizes)
    return (jnp.arange(rows)[:, None] >= ends[None, :-1]).sum(1, dtype=jnp.int32)
