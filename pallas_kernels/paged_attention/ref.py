"""The oracle: one token and one head after the other, in numpy float32.

Runs outside jit only, since it reads the batch's numbers. It shares no code with the other
implementations but the oracle of the cache's update.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pallas_kernels.kv_update import ref as kv_update
from pallas_kernels.kv_update.pages import Basis, Pages
from pallas_kernels.paged_attention.spec import AttentionSpec


def attend(
    q: jax.Array,
    k_pages: Pages,
    v_pages: Pages,
    *,
    spec: AttentionSpec,
    block_table: jax.Array,
    query_start_loc: jax.Array,
    seq_lens: jax.Array,
    rope: tuple[jax.Array, jax.Array] | None,
    q_norm: jax.Array | None,
    norm_eps: float,
    sinks: jax.Array | None,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    basis: Basis | None,
) -> jax.Array:
    """See `pallas_kernels.paged_attention.after_update.after_update`."""
    if any(isinstance(x, Tracer) for x in (q, block_table, query_start_loc, seq_lens)):
        raise NotImplementedError("the oracle runs outside jit only")
    page_size, group = k_pages.page_size, spec.num_heads // spec.num_kv_heads
    table, starts, lens = (np.asarray(x) for x in (block_table, query_start_loc, seq_lens))
    keys_of, values_of = (
        kv_update.Cache(k_pages, k_scale, True, basis),
        kv_update.Cache(v_pages, v_scale),
    )
    out = np.zeros(q.shape, np.float32)
    queries = np.asarray(q).reshape(len(q), -1, spec.head_dim)
    for s in range(len(lens)):
        for t in range(starts[s], starts[s + 1]):
            position = int(lens[s] - (starts[s + 1] - t))
            low = 0 if spec.sliding_window is None else max(0, position - spec.sliding_window + 1)
            seen = np.arange(low, position + 1)
            pages, slots = table[s, seen // page_size], seen % page_size
            own = None if rope is None else [np.asarray(x[t]) for x in rope]
            for h in range(spec.num_heads):
                at = pages, h // group, slots
                query = kv_update.turned(queries[t, h], own, q_norm, norm_eps)
                scores = keys_of.read(at) @ (query * np.float32(spec.scale))
                if spec.soft_cap is not None:
                    scores = spec.soft_cap * np.tanh(scores / spec.soft_cap)
                sink = -np.inf if sinks is None else float(sinks[h])
                top = max(scores.max(), sink)
                weights = np.exp(scores - top)
                total = weights.sum() + np.exp(sink - top)
                row = weights / total @ values_of.read(at)
                out[t, h * spec.head_dim : (h + 1) * spec.head_dim] = row
    return jnp.asarray(out)
