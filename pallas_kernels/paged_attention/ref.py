"""The oracle: one token and one head after the other, in numpy float32.

Runs outside jit only, since it reads the batch's numbers. It shares no code with the other
implementations, and keeps what is cached as the numbers that it stands for.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.core import Tracer

from pallas_kernels.paged_attention.pages import Pages
from pallas_kernels.paged_attention.spec import AttentionSpec


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_pages: Pages,
    v_pages: Pages,
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
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> tuple[jax.Array, Pages, Pages]:
    """See `pallas_kernels.paged_attention.api.paged_attention`."""
    if any(isinstance(x, Tracer) for x in (q, block_table, query_start_loc, seq_lens)):
        raise NotImplementedError("the oracle runs outside jit only")
    page_size, group = k_pages.page_size, spec.num_heads // spec.num_kv_heads
    table, starts, lens = (np.asarray(x) for x in (block_table, query_start_loc, seq_lens))
    cached = k_pages.dtype
    rotates = cached == "int4"

    def turned(row: np.ndarray, weight: jax.Array | None, token: int) -> np.ndarray:
        if weight is not None:
            row = row / np.sqrt((row**2).mean() + norm_eps) * np.asarray(weight)
        if rope is not None:
            cos, sin = (np.asarray(t[token]) for t in rope)
            half = spec.rotary_dim // 2
            x1, x2, rest = row[:half], row[half : 2 * half], row[2 * half :]
            row = np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest])
        return _hadamard(row) if rotates else row

    keys_of, values_of = _Cache(k_pages), _Cache(v_pages)
    key_scale, value_scale = (partial(_scale_of, scale) for scale in (k_scale, v_scale))
    out = np.zeros(q.shape, np.float32)
    queries, keys, values = (np.asarray(x).reshape(len(x), -1, spec.head_dim) for x in (q, k, v))
    for s in range(len(lens)):
        for t in range(starts[s], starts[s + 1]):
            position = int(lens[s] - (starts[s + 1] - t))
            page, slot = table[s, position // page_size], position % page_size
            for h in range(spec.num_kv_heads):
                keys_of.write((page, h, slot), turned(keys[t, h], k_norm, t), key_scale(h))
                values_of.write((page, h, slot), values[t, h], value_scale(h))
            low = 0 if spec.sliding_window is None else max(0, position - spec.sliding_window + 1)
            seen = np.arange(low, position + 1)
            pages, slots = table[s, seen // page_size], seen % page_size
            for h in range(spec.num_heads):
                at = pages, h // group, slots
                query = turned(queries[t, h], q_norm, t) * np.float32(spec.scale)
                scores = keys_of.read(at, key_scale(h // group)) @ query
                if spec.soft_cap is not None:
                    scores = spec.soft_cap * np.tanh(scores / spec.soft_cap)
                sink = -np.inf if sinks is None else float(sinks[h])
                top = max(scores.max(), sink)
                weights = np.exp(scores - top)
                total = weights.sum() + np.exp(sink - top)
                row = weights / total @ values_of.read(at, value_scale(h // group))
                out[t, h * spec.head_dim : (h + 1) * spec.head_dim] = row
    return jnp.asarray(out), keys_of.pages(), values_of.pages()


def _scale_of(scale: jax.Array | None, head: int) -> np.float32:
    if scale is None:
        return np.float32(1)
    return np.float32(scale[head if len(scale) > 1 else 0])


def _hadamard(row: np.ndarray) -> np.ndarray:
    size = 1
    while row.size % (2 * size) == 0:
        size *= 2
    index = np.arange(size)
    shared = index[:, None] & index
    odd = np.array([[bin(x).count("1") % 2 for x in line] for line in shared])
    matrix = np.where(odd, -1.0, 1.0) / np.sqrt(size)
    return (row.reshape(-1, size) @ matrix).reshape(row.shape).astype(np.float32)


class _Cache:
    """Pages on the host, to write to and to read as numbers."""

    def __init__(self, pages: Pages):
        self._dtype = pages.dtype
        self._arrays = Pages(*(None if a is None else np.array(a) for a in pages))

    def pages(self) -> Pages:
        return jax.tree.map(jnp.asarray, self._arrays)

    def write(self, at: tuple, x: np.ndarray, scale: np.float32) -> None:
        values, scales, zeros = self._arrays
        if self._dtype.startswith("fp8"):
            top = float(ml_dtypes.finfo(values.dtype).max)
            values[at] = np.clip(x / scale, -top, top).astype(values.dtype)
        elif self._dtype == "int8":
            step = _rounded_up(np.abs(x).max() / np.float32(127))
            scales[at] = step
            values[at] = np.clip(np.rint(x / (step or 1)), -127, 127)
        elif self._dtype == "int4":
            spread = max((x.max() - x.min()) / np.float32(15), np.abs(x).max() / np.float32(120))
            step = _rounded_up(spread)
            scales[at], zeros[at] = step, np.rint(x.min() / (step or 1))
            codes = np.clip(np.rint(x / (step or 1)) - zeros[at], 0, 15).astype(np.uint8)
            half = len(codes) // 2
            values[at] = codes[:half] + 16 * codes[half:]
        else:
            values[at] = x.astype(values.dtype)

    def read(self, at: tuple, scale: np.float32) -> np.ndarray:
        values, scales, zeros = self._arrays
        if self._dtype == "int4":
            codes = np.concatenate([values[at] % 16, values[at] // 16], -1).astype(np.float32)
            codes = codes + zeros[at].astype(np.float32)[..., None]
            return codes * scales[at].astype(np.float32)[..., None]
        x = values[at].astype(np.float32)
        if self._dtype == "int8":
            return x * scales[at].astype(np.float32)[..., None]
        return x * scale if self._dtype.startswith("fp8") else x


def _rounded_up(x: np.ndarray) -> np.float32:
    """The next bfloat16 at or above x >= 0."""
    near = np.float32(x).astype(ml_dtypes.bfloat16)
    if near.astype(np.float32) < x:
        near = np.nextafter(near, ml_dtypes.bfloat16(np.inf))
    return np.float32(near)
