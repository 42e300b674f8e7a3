"""The numbers that a quantized weight may take, and rounding to them.

A grid says what codes there are and what shares a scale; `minmax` chooses scales for a weight (and
so does `scale_search`), `nearest` and `values` go between numbers and codes elementwise, and
`encoded` packs codes into a QArray. All but the last may run under jit. Codes are float32: unsigned
ones of integers with an offset, signed ones of "int8", and of small floats the numbers themselves.

Formulas are those of compressed-tensors (`calculate_qparams`, `generate_gparam`,
`generate_mx_scales`), which computes in the dtype of the weight: a bfloat16 weight gives the bits
that it would give, with the rounding to bfloat16 of each step; the same weight in float32 is
rounded once, which is nearer to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from pallas_kernels import codes as packing
from pallas_kernels.inputs import FLOATS, bounds
from pallas_kernels.quantize.rounding import divide, exponent_of, power_of_two, to_float
from qjax.errors import UnsupportedError
from qjax.qarray import ActSpec, QArray
from qjax.scheme import QuantizationArgs

_SCALES = ("float32", "bfloat16", "float16", "e8m0", "fp8_e4m3")
_FLOAT_TYPES = {4: "fp4_e2m1", 8: "fp8_e4m3"}


class Scales(NamedTuple):
    """What codes are scaled with; or, `spread`, what each weight is.

    Attributes:
      scale: float32 [groups of rows, groups of columns]; numbers that the grid's scale dtype holds
        (multiples of global_scale, where there is one: it is in these numbers already).
      zero: like scale, the code that means 0; None where that is fixed.
      global_scale: float32 [1, 1], or None.
    """

    scale: Any
    zero: Any = None
    global_scale: Any = None


@dataclass(frozen=True)
class Grid:
    """The numbers that a weight may take.

    Attributes:
      qtype: of the codes: "uint4b8" and its like of 2 to 8 bits, "uint4" and its like with zero
        points, "int8", "fp8_e4m3" or "fp4_e2m1".
      group: rows and columns that share a scale, no more than the weight has.
      scale: what scales are stored as: "float32", "bfloat16", "float16", "e8m0" (powers of two) or
        "fp8_e4m3" (multiples of one global scale).
      fractional: whether zero points are any float32 numbers, not codes (HQQ).
    """

    qtype: str
    group: tuple[int, int]
    scale: str = "float32"
    fractional: bool = False

    @staticmethod
    def of(
        args: QuantizationArgs,
        shape: tuple[int, int],
        scale_dtype: str = "float32",
        signed: bool = False,
    ) -> Grid:
        """The grid that a scheme gives to a weight of N outputs and K inputs.

        Args:
          scale_dtype: of scales where the scheme does not name their dtype: "float32", "bfloat16",
            "float16". (compressed-tensors takes that of the weight.)
          signed: whether symmetric integers of 8 bits are "int8", which products with integer
            inputs take, rather than "uint8b128", which goes with plain inputs.

        Raises:
          UnsupportedError: a type or strategy that weights cannot have, or groups that do not
            divide the columns.
        """
        group = _group(args, shape)
        if args.type == "float":
            qtype = _FLOAT_TYPES.get(args.num_bits)
            if qtype is None or not args.symmetric:
                kind = "symmetric" if args.symmetric else "asymmetric"
                raise UnsupportedError(
                    f"weights of {kind} {args.num_bits}-bit floats are not made; symmetric ones of "
                    "4 and 8 bits are"
                )
            if args.strategy == "tensor_group":
                scale_dtype = "fp8_e4m3"
            elif "uint8" in (args.scale_dtype or "") or qtype == "fp4_e2m1":
                scale_dtype = "e8m0"
            if qtype == "fp4_e2m1" and args.strategy not in ("group", "tensor_group"):
                raise UnsupportedError(
                    f"weights of 4-bit floats with strategy {args.strategy!r} are not made; with "
                    "'tensor_group' (NVFP4) and 'group' (MXFP4) they are"
                )
        elif args.type == "int" and args.num_bits in range(2, 9):
            bits = args.num_bits
            qtype = f"uint{bits}b{1 << (bits - 1)}" if args.symmetric else f"uint{bits}"
            qtype = "int8" if signed and qtype == "uint8b128" else qtype
        else:
            raise UnsupportedError(
                f"weights of type {args.type!r} with {args.num_bits} bits are not made; 'int' of 2 "
                "to 8 bits and 'float' of 4 and 8 bits are"
            )
        if scale_dtype not in _SCALES:
            raise UnsupportedError(
                f"scales of dtype {scale_dtype!r} are not made; {', '.join(_SCALES)} are"
            )
        if shape[1] * packing.CODES[qtype].bits % 8:
            raise UnsupportedError(
                f"rows of {shape[1]} codes of {args.num_bits} bits do not end with a byte"
            )
        return Grid(qtype, group, scale_dtype)

    @property
    def symmetric(self) -> bool:
        """Whether the code that means 0 is fixed."""
        code = packing.CODES[self.qtype]
        return code.kind != "uint" or code.zero > 0

    @property
    def is_float(self) -> bool:
        return self.qtype in FLOATS

    @property
    def half(self) -> int:
        """2 ** (bits - 1), of integers."""
        return 1 << (packing.CODES[self.qtype].bits - 1)

    @property
    def span(self) -> float:
        """The largest code less the smallest."""
        return 2 * FLOATS[self.qtype].top if self.is_float else 2 * self.half - 1

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Bits of storage a weight of that shape takes, with its scales and zero points."""
        bits = packing.CODES[self.qtype].bits
        each = jnp.dtype(self.scale).itemsize * 8 if self.scale in _SCALES[:3] else 8
        each += 32 if self.fractional else 0 if self.symmetric else bits
        rows, columns = (-(-size // part) for size, part in zip(shape, self.group, strict=True))
        return bits + each * rows * columns / (shape[0] * shape[1])


def _group(args: QuantizationArgs, shape: tuple[int, int]) -> tuple[int, int]:
    n, k = shape
    if args.strategy == "tensor":
        return n, k
    if args.strategy == "channel":
        return 1, k
    if args.strategy == "block":
        rows, columns = args.block_structure or (128, 128)
        return min(rows, n), min(columns, k)
    if args.strategy not in ("group", "tensor_group"):
        raise UnsupportedError(
            f"strategy {args.strategy!r} is not one of weights; these are: tensor, channel, group, "
            "tensor_group, block"
        )
    size = args.group_size or (16 if args.strategy == "tensor_group" else k)
    if size < 1 or k % size:
        fitting = [each for each in range(8, k + 1) if k % each == 0]
        raise UnsupportedError(
            f"groups of {size} do not divide rows of {k}; these do: {', '.join(map(str, fitting))}"
        )
    return 1, size


@partial(jax.jit, static_argnames="grid")
def minmax(w: jax.Array, grid: Grid, absmax: jax.Array | None = None) -> Scales:
    """Scales that reach to the extremes of each group, 0 among them.

    Args:
      w: float32, bfloat16 or float16 [N, K].
      absmax: [], what a global scale is made for, where it is to hold for other weights as well
        (LLM Compressor ties those of q, k and v, and of gate and up); else of this weight alone.
    """
    low, high = extremes(w, grid)
    return scales_for(low, high, grid, w.dtype, jnp.abs(w).max() if absmax is None else absmax)


def tiled(x: jax.Array, group: tuple[int, int]) -> jax.Array:
    """[N, K] as [groups of rows, rows, groups of columns, columns], filled with zeros."""
    (n, k), (rows, columns) = x.shape, group
    x = jnp.pad(x, ((0, -n % rows), (0, -k % columns)))
    return x.reshape(x.shape[0] // rows, rows, x.shape[1] // columns, columns)


def _sizes(w: jax.Array) -> tuple[int, int]:
    n, k = w.shape
    return n, k


def extremes(w: jax.Array, grid: Grid, *, zero: bool = True) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest weight of each group, float32 [groups of rows, groups of
    columns]; 0 counts as one of them, unless `zero` is False."""
    tiles = tiled(w, grid.group).astype(jnp.float32)
    low, high = tiles.min((1, 3)), tiles.max((1, 3))
    return (jnp.minimum(low, 0), jnp.maximum(high, 0)) if zero else (low, high)


def largest(w: jax.Array, grid: Grid) -> jax.Array:
    """What the scale of each group is proportional to: the largest magnitude in it; of a grid with
    zero points, half of the range. float32 [groups of rows, groups of columns]."""
    low, high = extremes(w, grid)
    return jnp.maximum(-low, high) if grid.symmetric else (high - low) / 2


def _rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """What another float dtype makes of float32 numbers. (Between plain casts there and back, XLA
    would keep the digits.)"""
    if jnp.dtype(dtype) == jnp.float32:
        return x
    return lax.optimization_barrier(x.astype(dtype)).astype(jnp.float32)


def scales_for(
    low: jax.Array, high: jax.Array, grid: Grid, dtype: Any, absmax: jax.Array
) -> Scales:
    """Scales for groups with these extremes, computed in `dtype`."""
    if not grid.symmetric:
        scale = _rounded(divide(_rounded(high - low, dtype), grid.span), dtype)
        scale = _held(scale, grid)
        zero = _rounded(-grid.half - _rounded(divide(low, scale), dtype), dtype)
        return Scales(scale, jnp.round(jnp.clip(zero, -grid.half, grid.half - 1)) + grid.half)
    largest = jnp.maximum(-low, high)
    if grid.scale == "e8m0":
        # Rounded to one bit of mantissa first, then a power of two less the largest value's.
        carried = lax.bitcast_convert_type(largest, jnp.int32) + (1 << 21)
        exponent = exponent_of(lax.bitcast_convert_type(carried, jnp.float32))
        return Scales(power_of_two(exponent - FLOATS[grid.qtype].max_exponent))
    scale = _rounded(divide(largest, grid.span / 2), dtype)
    if grid.scale != "fp8_e4m3":
        return Scales(_held(scale, grid))
    top = FLOATS["fp8_e4m3"].top * FLOATS[grid.qtype].top
    smallest = jnp.finfo(dtype).tiny
    # The reciprocal is rounded before the product: torch divides numbers by arrays that way.
    reciprocal = 1 / jnp.maximum(absmax.astype(jnp.float32), smallest)
    divisor = _rounded(_rounded(reciprocal, dtype) * top, dtype)
    divisor = jnp.where(jnp.isfinite(divisor), divisor, 1)
    stored = to_float(scale * divisor, "fp8_e4m3")
    scale = divide(jnp.where(stored == 0, 0.125, stored), divisor)
    return Scales(scale, None, divide(jnp.float32(1), divisor).reshape(1, 1))


def _held(scale: jax.Array, grid: Grid) -> jax.Array:
    """Scales as they are stored; those of nothing but zeros are not 0."""
    scale = _rounded(scale, grid.scale)
    return jnp.where(scale == 0, jnp.finfo(grid.scale).eps.astype(jnp.float32), scale)


def nearest(w: jax.Array, scale: jax.Array, zero: jax.Array | None, grid: Grid) -> jax.Array:
    """The codes, float32, whose values are nearest to w; half way, the even ones.

    Args:
      w: of any shape; see the top of this file for its dtype.
      scale: float32, of the same shape or one that broadcasts to it, none of them 0.
      zero: like scale; None in a symmetric grid.
    """
    held = {"e8m0": w.dtype, "fp8_e4m3": jnp.float32}.get(grid.scale, grid.scale)
    dtype = jnp.promote_types(w.dtype, held)
    scaled = _rounded(divide(w.astype(jnp.float32), scale), dtype)
    if grid.is_float:
        return to_float(scaled, grid.qtype)
    if zero is not None:
        scaled = _rounded(scaled + (zero - grid.half), dtype)
    signed = jnp.round(jnp.clip(scaled, -grid.half, grid.half - 1))
    return signed if grid.qtype == "int8" else signed + grid.half


def values(codes: jax.Array, scale: jax.Array, zero: jax.Array | None, grid: Grid) -> jax.Array:
    """What codes stand for: float32. Shapes as in `nearest`."""
    if not grid.is_float and grid.qtype != "int8":
        codes = codes - (grid.half if zero is None else zero)
    return codes * scale


def spread(scales: Scales, grid: Grid, shape: tuple[int, int]) -> Scales:
    """Scale and zero point of each weight: float32 [N, K]."""

    def each(array: jax.Array | None) -> jax.Array | None:
        if array is None:
            return None
        return jnp.broadcast_to(packing.spread(array, grid.group, shape, jnp), shape)

    return Scales(each(scales.scale), each(scales.zero), scales.global_scale)


@partial(jax.jit, static_argnames="grid")
def rounded(w: jax.Array, scales: Scales, grid: Grid) -> jax.Array:
    """The nearest values, float32 [N, K], that w can take with these scales."""
    each = spread(scales, grid, _sizes(w))
    return values(nearest(w, each.scale, each.zero, grid), each.scale, each.zero, grid)


def nearest_scale(scale: jax.Array, like: Scales, grid: Grid) -> jax.Array:
    """Scales as the grid stores them, with the global scale of others."""
    if grid.scale != "fp8_e4m3":
        return _held(scale, grid)
    stored = to_float(divide(scale, like.global_scale[0, 0]), "fp8_e4m3")
    return jnp.where(stored == 0, 0.125, stored) * like.global_scale[0, 0]


def encoded(
    codes: Any,
    scales: Scales,
    grid: Grid,
    *,
    act: ActSpec | None = None,
    aux: Mapping[str, np.ndarray] | None = None,
) -> QArray:
    """A canonical weight on the host.

    Args:
      codes: [..., N, K] of `nearest`; leading axes are experts, which scales have, too.
      act, aux: as in `QArray`.
    """
    held = np.asarray(codes)
    if grid.is_float:
        bits = held.astype(packing.ML_DTYPES[grid.qtype]).view(np.uint8)
    elif grid.qtype == "int8":
        bits = held.astype(np.int8).view(np.uint8)
    else:
        bits = held.astype(np.uint8)
    more = dict(aux or {})
    scale = np.asarray(scales.scale, np.float32)
    if grid.scale == "fp8_e4m3":
        # Formats store its reciprocal: one that comes back from that, where a device's division did
        # not round to it.
        more["global_scale"] = 1 / (1 / np.asarray(scales.global_scale, np.float32))
        top = FLOATS["fp8_e4m3"].top
        scale = np.clip(scale / more["global_scale"], -top, top).astype(ml_dtypes.float8_e4m3fn)
    elif grid.scale == "e8m0":
        scale = scale.astype(ml_dtypes.float8_e8m0fnu)
    else:
        scale = scale.astype(jnp.dtype(grid.scale))
    zeros = np.float32 if grid.fractional else np.uint8
    return QArray(
        packing.pack(bits, packing.CODES[grid.qtype].bits),
        grid.qtype,
        (held.shape[-2], held.shape[-1]),
        scale=scale,
        zero_point=None if scales.zero is None else np.asarray(scales.zero).astype(zeros),
        aux=more,
        group=grid.group,
        act=act,
    )


def decoded(weight: QArray) -> tuple[np.ndarray, Scales]:
    """The codes and scales that `encoded` was given, of integers: float32 [..., N, K]."""
    code = packing.CODES[weight.qtype]
    bits = packing.unpack(np.asarray(weight.qvalue), code.bits, weight.shape[-1], np)
    codes = bits.view(np.int8) if weight.qtype == "int8" else bits
    scale, zero = (
        None if a is None else np.asarray(a).astype(np.float32)
        for a in (weight.scale, weight.zero_point)
    )
    return codes.astype(np.float32), Scales(scale, zero)


def input_scales(act: ActSpec, low: float, high: float) -> dict[str, np.ndarray]:
    """Entries of `QArray.aux` for inputs from `low` <= 0 to `high` >= 0 whose scales are fixed, and
    the global scale of those that are multiples of one: float32 [1, 1] each."""

    def one(x: Any) -> np.ndarray:
        return np.full((1, 1), x, np.float32)

    bottom, top = bounds(act.dtype)
    largest = max(-low, high) or 1.0
    if act.scale == "fp8_e4m3":
        return {"act_global_scale": 1 / one(FLOATS["fp8_e4m3"].top * top / largest)}
    if act.symmetric:
        return {"act_scale": one(np.float32(largest) / np.float32(act.divisor or top))}
    scale = np.float32(high - low) / np.float32(top - bottom)
    scale = scale if scale > 0 else np.finfo(np.float32).eps
    zero = np.clip(np.round(bottom - np.float32(low) / scale), bottom, top)
    return {"act_scale": one(scale), "act_zero_point": one(zero)}
