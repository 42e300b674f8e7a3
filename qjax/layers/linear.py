"""Places for weights: what they are multiplied with is decided by `ops`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.qarray import QArray


class Linear(nnx.Module):
    """weight (out, in) and, maybe, bias (out,), behind the axes of `lead`: one a stacked expert.
    Layers read them and call `ops.linear`, since one call may take several of them."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, lead: tuple[int, ...] = ()
    ):
        self.weight: nnx.Param[Any] = nnx.Param(jnp.zeros((*lead, out_features, in_features)))
        self.bias = nnx.Param(jnp.zeros((*lead, out_features))) if bias else None

    @property
    def w(self) -> QArray:
        return self.weight.get_value()

    @property
    def b(self) -> jax.Array | None:
        return None if self.bias is None else self.bias.get_value()


class Norm(nnx.Module):
    """The multiplicative weight of an RMSNorm, which a linear layer or attention applies."""

    def __init__(self, features: int):
        self.weight = nnx.Param(jnp.zeros((features,)))

    @property
    def w(self) -> jax.Array:
        return self.weight.get_value()
