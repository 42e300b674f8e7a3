"""Rows of experts in tiles, for kernels that compute a tile at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def tile_table(group_sizes: jax.Array, rows: int, tile: int) -> dict[str, jax.Array]:
    """Whose rows each tile holds: "expert", "start" and "end" (rows), int32 [tiles].

    Each expert begins a tile of its own, so that there are at most rows / tile + E; those that
    nobody needs are empty.
    """
    experts = group_sizes.shape[0]
    tiles = rows // tile + min(experts, rows)
    of_expert = -(-group_sizes // tile)
    last = jnp.cumsum(of_expert)
    index = jnp.arange(tiles, dtype=jnp.int32)
    expert = (index[:, None] >= last[None, :]).sum(1, dtype=jnp.int32)
    used = expert < experts
    expert = jnp.minimum(expert, experts - 1)
    end = jnp.cumsum(group_sizes)[expert]
    start = end - group_sizes[expert] + (index - (last - of_expert)[expert]) * tile
    return {
        "expert": expert,
        "start": jnp.where(used, start, 0).astype(jnp.int32),
        "end": jnp.where(used, end, 0).astype(jnp.int32),
    }
