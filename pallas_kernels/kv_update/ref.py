"""The oracle: one token and one head after the other, in numpy float32.

Runs outside jit only, since it reads the batch's numbers. It shares no code with the other
implementations.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.core import Tracer

from pallas_kernels.kv_update.pages import Basis, Pages


def kv_update(
    k: jax.Array,
    v: jax.Array,
    k_pages: Pages,
    v_pages: Pages,
    *,
    block_table: jax.Array,
    query_start_loc: jax.Array,
    seq_lens: jax.Array,
    rope: tuple[jax.Array, jax.Array] | None,
    k_norm: jax.Array | None,
    norm_eps: float,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    basis: Basis | None = None,
) -> tuple[Pages, Pages]:
    """See `pallas_kernels.kv_update.api.kv_update`."""
    if any(isinstance(x, Tracer) for x in (k, block_table, query_start_loc, seq_lens)):
        raise NotImplementedError("the oracle runs outside jit only")
    table, starts, lens = (np.asarray(x) for x in (block_table, query_start_loc, seq_lens))
    keys_of, values_of = Cache(k_pages, k_scale, True, basis), Cache(v_pages, v_scale)
    heads, page_size = k_pages.values.shape[1:3]
    keys, values = (np.asarray(x).reshape(len(x), heads, -1) for x in (k, v))
    for s in range(len(lens)):
        for t in range(starts[s], starts[s + 1]):
            position = int(lens[s] - (starts[s + 1] - t))
            page, slot = table[s, position // page_size], position % page_size
            own = None if rope is None else [np.asarray(x[t]) for x in rope]
            for h in range(heads):
                keys_of.write((page, h, slot), turned(keys[t, h], own, k_norm, norm_eps))
                values_of.write((page, h, slot), values[t, h])
    return keys_of.pages(), values_of.pages()


def turned(
    row: np.ndarray,
    rope: list[np.ndarray] | None,
    weight: jax.Array | None,
    eps: float,
) -> np.ndarray:
    """One head of one token as it meets others: normed and rotated. rope is (cos, sin) of the
    token."""
    if weight is not None:
        row = row / np.sqrt((row**2).mean() + eps) * np.asarray(weight)
    if rope is not None:
        cos, sin = rope
        half = len(cos)
        x1, x2, rest = row[:half], row[half : 2 * half], row[2 * half :]
        row = np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest])
    return row


class Cache:
    """Pages on the host, to write to and to read as numbers.

    What is spread over its channels, or in a basis of its own, is as it was when it is read.
    """

    def __init__(
        self,
        pages: Pages,
        scale: jax.Array | None,
        keys: bool = False,
        basis: Basis | None = None,
    ):
        self._dtype = pages.dtype
        self._arrays = Pages(*(None if a is None else np.array(a) for a in pages))
        heads = pages.values.shape[1]
        self._scale = np.ones(heads, np.float32) * (1 if scale is None else np.asarray(scale))
        without_scale = self._dtype in ("fp8_e4m3", "fp8_e5m2") and scale is None
        self._spread = self._dtype == "int4" or (keys and (self._dtype == "int8" or without_scale))
        self._basis = None if basis is None else Basis(*map(np.asarray, basis))

    def pages(self) -> Pages:
        return jax.tree.map(jnp.asarray, self._arrays)

    def write(self, at: tuple, x: np.ndarray) -> None:
        """A head of one token at (page, head, slot)."""
        values, scales, zeros = self._arrays
        if self._basis is not None:
            x = x @ self._basis.keys[at[1]]
        elif self._spread:
            x = spread(x)
        if self._dtype.startswith("fp8"):
            top = float(ml_dtypes.finfo(values.dtype).max)
            values[at] = np.clip(x / self._scale[at[1]], -top, top).astype(values.dtype)
        elif self._dtype == "int8":
            step = _rounded_up(np.abs(x).max() / np.float32(127))
            scales[at] = step
            values[at] = np.clip(np.rint(x / (step or 1)), -127, 127)
        elif self._dtype == "int4":
            middle = (x.max() + x.min()) / np.float32(2)
            width = max((x.max() - x.min()) / np.float32(15), abs(middle) * np.float32(16 / 127))
            scales[at] = step = _rounded_up(width)
            steps = x / (step or 1) + np.float32(7.5)
            start = np.rint(middle / (step or 1) * 16) / np.float32(16)
            codes = np.clip(np.rint(steps - start), 0, 15)
            zeros[at] = np.clip(np.rint((steps - codes).mean() * 16), -128, 127)
            codes, half = codes.astype(np.uint8), len(codes) // 2
            values[at] = codes[:half] + 16 * codes[half:]
        else:
            values[at] = x.astype(values.dtype)

    def read(self, at: tuple) -> np.ndarray:
        """A head of many tokens, [N, head_dim], at (pages, head, slots)."""
        x = self._decoded(at)
        if self._basis is not None:
            return x @ self._basis.queries[at[1]].T
        return spread(x) if self._spread else x

    def _decoded(self, at: tuple) -> np.ndarray:
        values, scales, zeros = self._arrays
        if self._dtype == "int4":
            codes = np.concatenate([values[at] % 16, values[at] // 16], -1).astype(np.float32)
            codes = codes + zeros[at].astype(np.float32)[..., None] / 16 - np.float32(7.5)
            return codes * scales[at].astype(np.float32)[..., None]
        x = values[at].astype(np.float32)
        if self._dtype == "int8":
            return x * scales[at].astype(np.float32)[..., None]
        return x * self._scale[at[1]] if self._dtype.startswith("fp8") else x


def spread(heads: np.ndarray) -> np.ndarray:
    """Heads [..., D] times the Hadamard matrix; twice leaves them as they were."""
    size = 1
    while heads.shape[-1] % (2 * size) == 0:
        size *= 2
    index = np.arange(size)
    shared = index[:, None] & index
    odd = np.array([[bin(x).count("1") % 2 for x in line] for line in shared])
    matrix = np.where(odd, -1.0, 1.0) / np.sqrt(size)
    return (heads.reshape(-1, size) @ matrix).reshape(heads.shape).astype(np.float32)


def _rounded_up(x: np.ndarray) -> np.float32:
    """The next bfloat16 at or above x >= 0."""
    near = np.float32(x).astype(ml_dtypes.bfloat16)
    if near.astype(np.float32) < x:
        near = np.nextafter(near, ml_dtypes.bfloat16(np.inf))
    return np.float32(near)
