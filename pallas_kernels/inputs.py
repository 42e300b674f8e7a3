"""What a quantized product does to its inputs before they meet the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

_STRATEGIES = ("tensor", "token", "group")


class FloatType(NamedTuple):
    """A small float: bits of its mantissa, exponents of its smallest normal and of its largest
    number, and that number."""

    mantissa: int
    min_exponent: int
    max_exponent: int
    top: float


FLOATS = {
    "fp8_e4m3": FloatType(3, -6, 8, 448.0),
    "fp8_e5m2": FloatType(2, -14, 15, 57344.0),
    "fp6_e2m3": FloatType(3, 0, 2, 7.5),
    "fp6_e3m2": FloatType(2, -2, 4, 28.0),
    "fp4_e2m1": FloatType(1, 0, 2, 6.0),
}


def bounds(dtype: str) -> tuple[float, float]:
    """The smallest and the largest number of a type: one of `FLOATS`, or "int" and its bits."""
    if dtype in FLOATS:
        return -FLOATS[dtype].top, FLOATS[dtype].top
    half = 1 << (int(dtype.removeprefix("int")) - 1)
    return -half, half - 1


@dataclass(frozen=True)
class ActSpec:
    """How a weight wants its activations quantized.

    Attributes:
      dtype: name of the numeric type: "int8", "int4", "fp8_e4m3", "fp4_e2m1", "fp6_e2m3" ...
      strategy: what shares one scale: "tensor", "token" or "group".
      dynamic: whether scales are computed from the activations, or come with the weight
        (`Inputs.scale` and, maybe, `Inputs.zero_point`).
      symmetric: integers without a zero point.
      group_size: columns of a group, for "group".
      scale: how a computed scale is made:
        "float32": absmax / largest value.
        "bfloat16", "float16": the same, rounded to that.
        "e8m0": a power of two, 2 ** (floor(log2 absmax) - exponent of the largest value), OCP MX.
        "e8m0_even": the same of absmax rounded to the mantissa of the type first (Quark).
        "e8m0_even4": the same, always rounded to that of 4-bit floats (compressed-tensors).
        "e8m0_ceil": absmax / largest value, rounded up to a power of two.
        "fp8_e4m3": absmax / largest value in multiples of `Inputs.global_scale` (nvfp4).
      divisor: what absmax is divided by for a computed scale, where it is not the largest value of
        the type (compressed-tensors divides by 127.5 for int8).
      upper_bound: of the absolute value that a dynamic scale is made from, or None.
      outliers: columns in which any value reaches this threshold stay unrounded (LLM.int8), or
        None.
    """

    dtype: str
    strategy: str
    dynamic: bool
    symmetric: bool = True
    group_size: int | None = None
    scale: str = "float32"
    divisor: float | None = None
    upper_bound: float | None = None
    outliers: float | None = None

    def __post_init__(self) -> None:
        if self.strategy not in _STRATEGIES:
            known = ", ".join(_STRATEGIES)
            raise ValueError(f"ActSpec: strategy {self.strategy!r} is none of {known}")
        if (self.strategy == "group") != (self.group_size is not None):
            raise ValueError("ActSpec: group_size belongs to strategy 'group'")


class Inputs(NamedTuple):
    """The arrays of that, in the order in which they are used; None where there is none.

    Attributes:
      pre_scale: [1, K], multiplies the inputs.
      scale, zero_point, global_scale: [1, 1], of the `ActSpec`.
      perm: int32 [1, K]; the columns are then taken in this order.
    """

    pre_scale: Any = None
    scale: Any = None
    zero_point: Any = None
    global_scale: Any = None
    perm: Any = None
