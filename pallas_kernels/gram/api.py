"""The entry to products of a matrix with itself: check the call, then dispatch it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.gram import native, ref, xla

GRAM: dispatch.Implementations = (
    ("native", native.gram),
    ("xla", xla.gram),
    ("ref", ref.gram),
)


def gram(x: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """The Gram matrix of the columns of x: x^T x, in float32 throughout.

    Args:
      x: float32 [T, K].
      implementation: "native", "xla" or "ref"; None for the first that takes the call.

    Returns:
      float32 [K, K].

    Raises:
      ValueError: x is not float32, or has not two dimensions.
      NotImplementedError: no implementation, or not the named one, takes the call.
    """
    if x.dtype != jnp.float32 or x.ndim != 2:
        raise ValueError(f"x is {x.dtype} {x.shape}, expected float32 [T, K]")
    return dispatch.call("gram", GRAM, x, implementation=implementation)
