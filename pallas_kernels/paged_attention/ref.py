"""The oracle: one token and one head after the other, in numpy float32.

Runs outside jit only, since it reads the batch's numbers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

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
    sinks: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `pallas_kernels.paged_attention.api.paged_attention`."""
    if any(isinstance(x, Tracer) for x in (q, block_table, query_start_loc, seq_lens)):
        raise NotImplementedError("the oracle runs outside jit only")
    page_size, group = k_pages.shape[2], spec.num_heads // spec.num_kv_heads
    table, starts, lens = (np.asarray(x) for x in (block_table, query_start_loc, seq_lens))
    dtype = k_pages.dtype
    keys_of, values_of = np.array(k_pages), np.array(v_pages)  # copies, to write to

    def turned(row: np.ndarray, weight: jax.Array | None, token: int) -> np.ndarray:
        if weight is not None:
            row = row / np.sqrt((row**2).mean() + norm_eps) * np.asarray(weight)
        if rope is None:
            return row
        cos, sin = (np.asarray(t[token]) for t in rope)
        half = spec.rotary_dim // 2
        x1, x2, rest = row[:half], row[half : 2 * half], row[2 * half :]
        return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest])

    out = np.zeros(q.shape, np.float32)
    queries, keys, values = (np.asarray(x).reshape(len(x), -1, spec.head_dim) for x in (q, k, v))
    for s in range(len(lens)):
        for t in range(starts[s], starts[s + 1]):
            position = int(lens[s] - (starts[s + 1] - t))
            page, slot = table[s, position // page_size], position % page_size
            for h in range(spec.num_kv_heads):
                keys_of[page, h, slot] = turned(keys[t, h], k_norm, t).astype(dtype)
                values_of[page, h, slot] = values[t, h].astype(dtype)
            low = 0 if spec.sliding_window is None else max(0, position - spec.sliding_window + 1)
            seen = np.arange(low, position + 1)
            pages, slots = table[s, seen // page_size], seen % page_size
            for h in range(spec.num_heads):
                query = turned(queries[t, h], q_norm, t) * np.float32(spec.scale)
                scores = keys_of[pages, h // group, slots].astype(np.float32) @ query
                if spec.soft_cap is not None:
                    scores = spec.soft_cap * np.tanh(scores / spec.soft_cap)
                sink = -np.inf if sinks is None else float(sinks[h])
                top = max(scores.max(), sink)
                weights = np.exp(scores - top)
                total = weights.sum() + np.exp(sink - top)
                row = weights / total @ values_of[pages, h // group, slots].astype(np.float32)
                out[t, h * spec.head_dim : (h + 1) * spec.head_dim] = row
    return jnp.asarray(out), jnp.asarray(keys_of), jnp.asarray(values_of)
