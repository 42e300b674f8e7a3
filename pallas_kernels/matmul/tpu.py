"""Products with weights in planes on TPUs, as Pallas kernels that Mosaic compiles.

The kernel (`tpu_kernel`) is the product alone; XLA fuses what is around it. With `activation_dtype`
"bfloat16" inputs are rounded to bfloat16. Codes, which are exact in it, then meet them unscaled
where 128 columns or more share a scale; weights with smaller groups are scaled first, and rounded
to bfloat16, so that matrix units are filled. With all others products are of float32.

A row is summed up in one order, whatever rows are beside it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import platform
from pallas_kernels.matmul.around import by_products
from pallas_kernels.matmul.planes import TRANSPOSED, describe
from pallas_kernels.matmul.spec import WeightArrays, WeightSpec
from pallas_kernels.matmul.tpu_plan import Plan, candidates, least_rows, plan_of, takes_groups

__all__ = ["candidates", "matmul", "product"]


def matmul(
    x: jax.Array, weights: tuple[tuple[WeightSpec, WeightArrays], ...], **around: Any
) -> tuple[jax.Array, ...]:
    """See `pallas_kernels.matmul.api.matmul`."""
    return by_products(product, x, weights, **around)


def product(
    x: jax.Array,
    spec: WeightSpec,
    arrays: WeightArrays,
    *,
    x_scale: jax.Array | None = None,
    num_rows: jax.Array | None = None,
    group_sizes: jax.Array | None = None,
) -> jax.Array:
    """(x * x_scale) @ w.T, with x as it is or as codes.

    Args:
      x: [T, K]. float32: an exact product. bfloat16: weights may be rounded to it. int8,
        float8_e4m3fn, float8_e5m2, or anything with an `x_scale`: codes, whose products with codes
        of the weight are exact: of int8 by int8, of floats of 8 bits from TPU7x on, else as
        bfloat16, or float32 where scales are of fewer than 128 columns.
      spec, arrays: a weight in the layout "planes_t".
      x_scale: float32 [T, groups of columns]; K is a multiple of the groups.
      num_rows: int32 [1]; rows from there on are padding, with unspecified outputs.
      group_sizes: int32 [E]: arrays have a leading axis of experts, and rows of x, sorted by
        expert, meet the weight of theirs.

    Returns:
      float32 [T, N].

    Raises:
      NotImplementedError: the weight lies otherwise, its kind is none of the kernel's, or this is
        no TPU.
      ValueError: `x_scale` does not fit x.
    """
    interpret = platform.interprets("tpu")
    operands = weight_operands(spec, arrays, group_sizes is not None)
    rows, k = x.shape
    x_group, after = None, None
    if x_scale is not None:
        groups = x_scale.shape[-1]
        if x_scale.shape != (rows, groups) or not groups or k % groups:
            raise ValueError(f"x_scale {x_scale.shape} of x {x.shape}")
        if groups == 1:
            after = x_scale
        elif takes_groups(describe(spec), k // groups):
            x_group = k // groups
        else:
            x = x.astype(jnp.float32) * jnp.repeat(x_scale, k // groups, axis=1)
    plan = plan_of(
        spec,
        rows,
        x.dtype,
        exact_codes=after is not None or x_group is not None,
        x_group=x_group,
        entries=0 if arrays.codebook is None else arrays.codebook.shape[-1],
        experts=0 if group_sizes is None else group_sizes.shape[0],
    )
    least = least_rows(plan.dot)
    missing = -rows % least
    operands["x"] = _in_units(x, plan, missing)
    if x_group is not None:
        assert x_scale is not None
        operands["x_scale"] = jnp.pad(x_scale, ((0, missing), (0, 0)))
    table = None
    if group_sizes is not None:
        table = visits(group_sizes, rows, plan.blocks.rows)
    elif num_rows is not None and rows > plan.blocks.rows:
        table = visits(num_rows, rows, plan.blocks.rows)
    if interpret:
        # Where a weight is a constant of the program, XLA for CPUs otherwise gets other words out
        # of its bytes (jaxlib 0.10.2).
        operands = lax.optimization_barrier(operands)
    from pallas_kernels.matmul import tpu_kernel  # jax has it on some systems only

    y = tpu_kernel.product(plan, operands, table, interpret)[:rows]
    return y if after is None else y * after


def weight_operands(spec: WeightSpec, arrays: WeightArrays, experts: bool) -> dict[str, jax.Array]:
    """The arrays of a weight as the kernel reads them.

    Raises:
      NotImplementedError: it does not lie in planes, columns along sublanes.
    """
    if spec.layout != TRANSPOSED:
        raise NotImplementedError(f"a weight in the layout {spec.layout!r}, not {TRANSPOSED!r}")
    planes = describe(spec)
    named = {
        "qvalue": arrays.qvalue,
        "scale": arrays.scale,
        "zero": arrays.zero_point,
        "super_scale": arrays.super_scale,
        "super_zero": arrays.super_zero,
        "global_scale": arrays.global_scale,
        "codebook": arrays.codebook,
    }
    operands = {name: jnp.asarray(array) for name, array in named.items() if array is not None}
    for name in ("scale", "zero"):
        if name in operands and operands[name].shape[-1] < planes.shape[0]:
            # Far fewer than weights, as they are of many of them.
            wide = jnp.repeat(operands[name], planes.group[0], axis=-1)
            operands[name] = wide[..., : planes.shape[0]]
    operands = {name: _as_bits(array) for name, array in operands.items()}
    return operands if experts else {name: array[None] for name, array in operands.items()}


def _as_bits(array: jax.Array) -> jax.Array:
    """Floats that Mosaic does not load, of 8 bits and float16, as unsigned integers."""
    size = array.dtype.itemsize
    if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype == jnp.bfloat16 or size > 2:
        return array
    return lax.bitcast_convert_type(array, jnp.uint8 if size == 1 else jnp.uint16)


def _in_units(x: jax.Array, plan: Plan, missing: int) -> jax.Array:
    """x [T, K] as [k / unit, T + missing, unit], with zeros for rows that are missing and for the
    columns that K was filled up with."""
    x = jnp.pad(x.astype(plan.dot), ((0, missing), (0, plan.planes.k - x.shape[1])))
    return x.reshape(len(x), -1, plan.unit).swapaxes(0, 1)


def visits(group_sizes: jax.Array, rows: int, tile: int) -> dict[str, jax.Array]:
    """Which tile of rows meets whose weight: "tile", "expert", and the rows that it has there,
    "start" to "end"; int32 [visits].

    Each expert visits the tiles that its rows lie in, so that there are at most tiles + E - 1; what
    is left over repeats the last one, with no rows.
    """
    experts, tiles = group_sizes.shape[0], -(-rows // tile)
    count = tiles + min(experts, rows) - 1
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    first = starts // tile
    of_expert = jnp.where(group_sizes > 0, -(-ends // tile) - first, 0)
    last = jnp.cumsum(of_expert)
    index = jnp.arange(count, dtype=jnp.int32)
    at = jnp.minimum(index, jnp.maximum(last[-1] - 1, 0))
    expert = jnp.minimum((at[:, None] >= last[None, :]).sum(1), experts - 1)
    place = first[expert] + at - (last - of_expert)[expert]
    start = jnp.maximum(starts[expert], place * tile)
    end = jnp.minimum(ends[expert], (place + 1) * tile)
    columns = {"tile": place, "expert": expert, "start": start, "end": end}
    columns["end"] = jnp.where(index < last[-1], end, start)
    return {name: column.astype(jnp.int32) for name, column in columns.items()}
