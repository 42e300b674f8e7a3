"""The portable implementation, in the form that XLA makes vector code of on a CPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.nearest.spec import DIGITS_BITS, Found, candidates, digit_bits, edges


def nearest_level(y: jax.Array, levels: np.ndarray) -> jax.Array:
    """See `pallas_kernels.nearest.api.nearest_level`."""
    value = jnp.full_like(y, levels[0])
    for edge, level in zip(edges(levels), levels[1:], strict=True):
        value = jnp.where(y > edge, level, value)
    return value


def nearest_vector(y: jax.Array, w: jax.Array, name: str, near: int | None) -> Found:
    """See `pallas_kernels.nearest.api.nearest_vector`."""
    levels, table = candidates(name, near)
    size, bits = y.shape[-1], digit_bits(y.shape[-1])
    tried = table
    if near is not None:
        digits: Any = sum((y > edge).astype(jnp.int32) for edge in edges(levels))
        point = sum(digits[..., place] * len(levels) ** place for place in range(size))
        tried = jax.lax.optimization_barrier(jnp.asarray(table)[point])

    def value(packed: Any, place: int) -> jax.Array:
        digit = (packed >> (bits * place)) & ((1 << bits) - 1)
        found = jnp.full(digit.shape, levels[0])
        for number, level in enumerate(levels[1:], 1):
            found = jnp.where(digit >= number, level, found)
        return found

    distance = jnp.zeros((*y.shape[:-1], tried.shape[-1]), jnp.float32)
    for place in range(size):
        lost = y[..., place, None] - value(tried, place)
        distance += w[..., place, None] * (lost * lost)
    which, least = _least(distance)
    if near is None:
        chosen = jnp.asarray(table[0])[which]
    else:
        chosen = jnp.take_along_axis(tried, which[..., None], -1)[..., 0]
    values = jnp.stack([value(chosen, place) for place in range(size)], -1)
    return Found(values, least, chosen >> DIGITS_BITS)


def _least(distance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the least of 2^n distances [..., 2^n] is, and what it is, to a few bits less."""
    # Floats from 0 on are ordered as their bits are: the last ones make room for the index, so that
    # one minimum finds both.
    mask = distance.shape[-1] - 1
    key = jax.lax.bitcast_convert_type(distance, jnp.int32) & ~mask
    key = key | np.arange(mask + 1, dtype=np.int32)
    while key.shape[-1] > 16:  # by halves, which XLA makes vector code of on a CPU
        half = key.shape[-1] // 2
        key = jnp.minimum(key[..., :half], key[..., half:])
    key = key.min(-1)
    return key & mask, jax.lax.bitcast_convert_type(key & ~mask, jnp.float32)
