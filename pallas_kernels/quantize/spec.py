"""What quantized activations are."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.inputs import FLOATS, ActSpec


class Quantized(NamedTuple):
    """x is about codes * scale, or (codes - zero_point) * scale.

    Attributes:
      codes: [T, K] of the `code_dtype`.
      scale: float32, [T, groups of columns], or [1, 1] where all share one.
      zero_point: like scale, integers in the range of the codes; None where there is none.
    """

    codes: Any
    scale: Any
    zero_point: Any = None


def code_dtype(dtype: str) -> Any:
    """What codes of a type of `ActSpec` are stored as: int8, float8_e5m2, or float8_e4m3fn, which
    holds the numbers of all smaller floats.
    """
    if dtype not in FLOATS:
        return jnp.int8
    return jnp.float8_e5m2 if dtype == "fp8_e5m2" else jnp.float8_e4m3fn


def require_own_scales(act: ActSpec) -> None:
    """Refuses (NotImplementedError) scales that are not computed from the row that they are for."""
    if not act.dynamic or act.strategy == "tensor":
        raise NotImplementedError("a scale that all rows share")
