"""What devices that share a model tell each other; without a `Parallel`, one device has it all."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from qjax.sharding import MODEL, Parallel

Axes = tuple[str, ...]
GROUP = 64  # numbers that share a scale


def summed(x: jax.Array, parallel: Parallel | None) -> jax.Array:
    """The sum of what all devices have, float32 [T, N]: the one all-reduce of a block.

    `parallel.all_reduce` tells what is sent. With "int8" and "fp8_e4m3" that is codes with a scale
    for `GROUP` numbers of a row, twice: each device sums a share of the columns, and gives the sum
    to all. So it takes a quarter of the bytes, and every number is rounded n + 1 times.
    """
    if parallel is None:
        return x
    if parallel.all_reduce == "float32" or parallel.size == 1:
        return lax.psum(x, MODEL)
    if parallel.all_reduce == "bfloat16":
        return lax.psum(x.astype(jnp.bfloat16), MODEL).astype(jnp.float32)
    n = x.shape[1]
    share = -(-n // (parallel.size * GROUP)) * GROUP
    wide = jnp.pad(x, ((0, 0), (0, share * parallel.size - n)))
    shares = wide.reshape(len(x), parallel.size, share).swapaxes(0, 1)
    sent = _coded(shares, parallel.all_reduce)
    own = jax.tree.map(lambda part: lax.all_to_all(part, MODEL, 0, 0), sent)
    total = _decoded(*own).sum(0)
    back = _coded(total, parallel.all_reduce)
    codes, scale = jax.tree.map(lambda part: lax.all_gather(part, MODEL), back)
    return _decoded(codes, scale).swapaxes(0, 1).reshape(len(x), -1)[:, :n]


def _coded(x: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    """Codes [..., groups, GROUP], and a bfloat16 scale for each group."""
    groups = x.reshape(*x.shape[:-1], -1, GROUP)
    top = jnp.abs(groups).max(-1, keepdims=True)
    if dtype == "int8":
        scale = _upwards(top / 127)
        codes = jnp.round(groups / scale.astype(jnp.float32)).astype(jnp.int8)
    else:
        scale = _upwards(top / 448)
        ratio = groups / scale.astype(jnp.float32)
        codes = jnp.clip(ratio, -448, 448).astype(jnp.float8_e4m3fn)
    return codes, scale


def _upwards(scale: jax.Array) -> jax.Array:
    """As bfloat16 that is not smaller, and not zero, so that no code is cut."""
    return (jnp.maximum(scale, 1e-30) * (1 + 2.0**-7)).astype(jnp.bfloat16)


def _decoded(codes: jax.Array, scale: jax.Array) -> jax.Array:
    values = codes.astype(jnp.float32) * scale.astype(jnp.float32)
    return values.reshape(*values.shape[:-2], -1)


def extremes(x: jax.Array, axes: Axes) -> jax.Array:
    """[..., 2]: the smallest and the largest number of rows [..., K] of which each device has some
    columns."""
    both = jnp.stack([-x.min(-1), x.max(-1)], -1)
    low, high = jnp.moveaxis(lax.pmax(both, axes), -1, 0)
    return jnp.stack([-low, high], -1)


def gathered(x: jax.Array, axes: Axes) -> jax.Array:
    """Rows [..., K] of which each device has some columns, whole."""
    return lax.all_gather(x, axes, axis=x.ndim - 1, tiled=True)
