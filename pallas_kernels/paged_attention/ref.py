"""The oracle: one token after the other, one position after the other, in float32.

Runs outside jit only (it reads the batch's numbers), and is slow on purpose.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention.spec import AttentionSpec


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    *,
    spec: AttentionSpec,
    block_table: jax.Array,
    query_start_loc: jax.Array,
    seq_lens: jax.Array,
    rope: tuple[jax.Array, jax.Array] | None,
    q_norm: jax.Array | None,
    k_norm: jax.Array | None,
    norm_eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `pallas_kernels.paged_attention.api.paged_attention`."""
    if any(isinstance(x, jax.core.Tracer) for x in (q, block_table, query_start_loc, seq_lens)):
        raise NotImplementedError("the oracle runs outside jit only")
    page_size, group = k_pages.shape[2], spec.num_heads // spec.num_kv_heads
    table, starts, lens = (np.asarray(x) for x in (block_table, query_start_loc, seq_lens))

    def turned(row: jax.Array, weight: jax.Array | None, token: int) -> jax.Array:
        if weight is not None:
            row = row / jnp.sqrt((row**2).mean() + norm_eps) * weight
        if rope is None:
            return row
        cos, sin = rope[0][token], rope[1][token]
        half = spec.rotary_dim // 2
        x1, x2, rest = row[:half], row[half : 2 * half], row[2 * half :]
        return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest])

    out = np.zeros(q.shape, np.float32)
    heads = {
        name: x.reshape(len(x), -1, spec.head_dim) for name, x in (("q", q), ("k", k), ("v", v))
    }
    for s in range(len(lens)):
        tokens = range(starts[s], starts[s + 1])
        first = lens[s] - len(tokens)
        for t in tokens:
            page, slot = divmod(int(first + t - starts[s]), page_size)
            for h in range(spec.num_kv_heads):
                key = turned(heads["k"][t, h], k_norm, t)
                k_pages = k_pages.at[table[s, page], h, slot].set(key.astype(k_pages.dtype))
                value = heads["v"][t, h]
                v_pages = v_pages.at[table[s, page], h, slot].set(value.astype(v_pages.dtype))
        for t in tokens:
            position = int(first + t - starts[s])
            low = 0 if spec.sliding_window is None else max(0, position - spec.sliding_window + 1)
            seen = [divmod(p, page_size) for p in range(low, position + 1)]
            for h in range(spec.num_heads):
                query = turned(heads["q"][t, h], q_norm, t) * spec.scale
                keys = jnp.stack([k_pages[table[s, p], h // group, i] for p, i in seen])
                values = jnp.stack([v_pages[table[s, p], h // group, i] for p, i in seen])
                scores = keys.astype(jnp.float32) @ query
                if spec.soft_cap is not None:
                    scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
                weights = jnp.exp(scores - scores.max())
                row = (weights / weights.sum()) @ values.astype(jnp.float32)
                out[t, h * spec.head_dim : (h + 1) * spec.head_dim] = row
    return jnp.asarray(out), k_pages, v_pages
