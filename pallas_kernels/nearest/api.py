"""The entries to searches of what codes stand for: check the call, then dispatch it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.iq_grids import grid
from pallas_kernels.nearest import native, ref, xla
from pallas_kernels.nearest.spec import Found

LEVEL: dispatch.Implementations = (
    ("native", native.nearest_level),
    ("xla", xla.nearest_level),
    ("ref", ref.nearest_level),
)
VECTOR: dispatch.Implementations = (
    ("native", native.nearest_vector),
    ("xla", xla.nearest_vector),
    ("ref", ref.nearest_vector),
)


def nearest_level(
    y: jax.Array, levels: np.ndarray, *, implementation: str | None = None
) -> jax.Array:
    """The nearest of some numbers; halfway between two, the lower one.

    Args:
      y: float32 of any shape.
      levels: float32 [16], in order.
      implementation: "native", "xla" or "ref"; None for the first that takes the call.

    Returns:
      float32, the shape of y.

    Raises:
      ValueError: y is not float32, or there are not 16 levels in order.
      NotImplementedError: no implementation, or not the named one, takes the call.
    """
    if y.dtype != jnp.float32:
        raise ValueError(f"y is {y.dtype}, expected float32")
    if levels.shape != (16,) or (np.diff(levels) <= 0).any():
        raise ValueError(f"levels of shape {levels.shape}, expected 16 in order")
    return dispatch.call("nearest level", LEVEL, y, levels, implementation=implementation)


def nearest_vector(
    y: jax.Array,
    w: jax.Array,
    name: str,
    near: int | None = None,
    *,
    implementation: str | None = None,
) -> Found:
    """The entry of a grid with the least sum of w (y - entry)^2: of all, or of those next to the
    point that a vector rounds to, of which it is now and then a bit more than the least of all.

    Args:
      y: float32 [..., size], vectors of as many numbers as the grid's.
      w: float32, like y, at least 0.
      name: of a grid of `pallas_kernels.iq_grids`.
      near: how many entries next to that point are looked at, a power of two from 16 on, no more
        than the grid has; None: all.
      implementation: "native", "xla" or "ref"; None for the first that takes the call.

    Raises:
      ValueError: shapes or dtypes are others, or so many entries cannot be looked at.
      NotImplementedError: no implementation, or not the named one, takes the call.
    """
    count, size = grid(name).shape
    if y.dtype != jnp.float32 or w.dtype != jnp.float32 or y.shape != w.shape or y.ndim < 1:
        raise ValueError(f"y is {y.dtype} {y.shape} and w {w.dtype} {w.shape}, expected float32")
    if y.shape[-1] != size:
        raise ValueError(f"vectors of {y.shape[-1]} numbers, those of {name} have {size}")
    if near is not None and (not 16 <= near <= count or near & (near - 1)):
        raise ValueError(f"near is {near}, expected a power of two from 16 to {count}")
    op = f"nearest {name}"
    return dispatch.call(op, VECTOR, y, w, name, near, implementation=implementation)
