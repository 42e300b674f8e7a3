"""Products with weights in planes on NVIDIA Hopper GPUs, as Pallas kernels that Mosaic compiles.

The kernel (`mosaic_gpu_kernel`) is the product alone; XLA fuses what is around it. It is for
inputs that may be rounded to bfloat16, and for codes. On an H200 it was the slower one for most
kinds: nothing uses it unless it is named, or a table of measurements says that it is the fastest.

A row's result is the same whatever rows are beside it, for up to 64 rows, as long as no table of
measurements says otherwise: the columns are cut into the same parts, summed in the same order.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.matmul import planes_tile
from pallas_kernels.matmul.around import by_products
from pallas_kernels.matmul.gpu_operands import scaled_inputs, weight_operands
from pallas_kernels.matmul.mosaic_gpu_plan import Plan, candidates, plan_of
from pallas_kernels.matmul.spec import WeightArrays, WeightSpec

__all__ = ["candidates", "matmul", "product"]

HOPPER = ("H100", "H200", "H800", "H20", "GH200")


def matmul(
    x: jax.Array,
    weights: tuple[tuple[WeightSpec, WeightArrays], ...],
    *,
    activation_dtype: str,
    **around: Any,
) -> tuple[jax.Array, ...]:
    """See `pallas_kernels.matmul.api.matmul`.

    Raises:
      NotImplementedError: see `product`; or `activation_dtype` is not "bfloat16".
    """
    require_bfloat16(activation_dtype)
    return by_products(product, x, weights, activation_dtype=activation_dtype, **around)


def product(
    x: jax.Array,
    spec: WeightSpec,
    arrays: WeightArrays,
    *,
    x_scale: jax.Array | None = None,
    num_rows: jax.Array | None = None,
) -> jax.Array:
    """(x * x_scale) @ w.T, with x as it is or as codes.

    Args:
      x: [T, K]. bfloat16: weights may be rounded to it. int8, float8_e4m3fn, float8_e5m2, or
        bfloat16 with an `x_scale`: codes, whose products with codes of the weight are exact: in
        int8 where both are integers, in floats of 8 bits where both are of the same type, else in
        bfloat16. Sums of chunks of floats of 8 bits have fewer bits than float32.
      spec, arrays: a weight in the layout "planes".
      x_scale: float32 [T, groups of columns]; K is a multiple of the groups.
      num_rows: int32 [1]; rows from there on are padding, with unspecified outputs. All are
        computed.

    Returns:
      float32 [T, N].

    Raises:
      NotImplementedError: the weight lies otherwise, its kind or shape is none of the kernel's,
        this is no Hopper GPU, or what jax needs for it is not installed.
      ValueError: `x_scale` does not fit x.
    """
    del num_rows
    interpret = platform.interprets("gpu")
    check_device(interpret)
    if x.dtype.itemsize > 1:
        require_bfloat16(x.dtype)
    x_group, scales, x_after = scaled_inputs(x, x_scale)
    operands = weight_operands(spec, arrays)
    plan = plan_of(
        spec,
        x.shape[0],
        x.dtype,
        exact_codes=x_scale is not None,
        x_group=x_group,
        has_global_scale="global_scale" in operands,
    )
    whole = operands.pop("global_scale", None)
    operands |= spread(operands, plan)
    after = taken_out(operands, plan)
    operands["x"] = padded(x, plan)
    if x_group is not None:
        groups, missing = -(-plan.planes.k // x_group), -len(x) % plan.blocks.rows
        fill = ((0, groups - len(scales["x_scale"])), (0, missing))
        operands["x_scale"] = jnp.pad(scales["x_scale"], fill)
    from pallas_kernels.matmul import mosaic_gpu_kernel  # jax needs more than itself for it

    y = mosaic_gpu_kernel.product(plan, operands, interpret)[: len(x)]
    y = scaled(y, x, x_scale, after, plan)
    for factor in (x_after, whole):
        y = y if factor is None else y * factor
    return y


def require_bfloat16(dtype: object) -> None:
    """Whether inputs may be rounded to, or are, bfloat16; NotImplementedError if not."""
    if str(dtype) != "bfloat16":
        raise NotImplementedError(f"a kernel for inputs of bfloat16, not {dtype}")


def check_device(interpret: bool) -> None:
    """Whether the kernel can run, or be compiled, here.

    Raises:
      NotImplementedError: it cannot.
    """
    name = platform.device().name
    if not interpret and not any(each in name for each in HOPPER):
        raise NotImplementedError(f"a kernel for Hopper GPUs, and this is {name or 'unknown'}")
    if importlib.util.find_spec("absl") is None:
        raise NotImplementedError("jax needs the package absl-py for kernels of Mosaic GPU")


def padded(x: jax.Array, plan: Plan) -> jax.Array:
    """x of the type that the kernel takes, with zeros for the columns that K was filled up with,
    and for rows up to whole tiles."""
    rows, k = x.shape
    return jnp.pad(x.astype(plan.dot), ((0, -rows % plan.blocks.rows), (0, plan.planes.k - k)))


def spread(operands: dict[str, jax.Array], plan: Plan) -> dict[str, jax.Array]:
    """Scales and zero points for each output, and for groups of the columns that K was filled up
    with: there are far fewer of them than of weights. Zero points are wide enough for the groups of
    a step to fill what copies write at a time.
    """
    n, (rows, columns) = plan.planes.shape[0], plan.planes.group
    groups = 1 if plan.scaling == "end" else -(-plan.planes.k // columns)
    found = {name: operands[name] for name in ("scale", "zero") if name in operands}
    for name, array in found.items():
        if array.shape[1] != n:
            array = jnp.repeat(array, rows, axis=1)[:, :n]
        if name == "zero" and array.dtype.itemsize == 1:
            array = array.astype(jnp.bfloat16)  # which holds integers of 8 bits
        found[name] = jnp.pad(array, ((0, groups - len(array)), (0, 0)))
    return found


def taken_out(operands: dict[str, jax.Array], plan: Plan) -> dict[str, jax.Array]:
    """Those that act in the end, which the kernel does not read: removed from `operands`."""
    if plan.scaling != "end":
        return {}
    return {name: operands.pop(name) for name in ("scale", "zero") if name in operands}


def scaled(
    y: jax.Array,
    x: jax.Array,
    x_scale: jax.Array | None,
    after: dict[str, jax.Array],
    plan: Plan,
) -> jax.Array:
    """Sums over codes, float32 [T, N], with what acts in the end: a scale and a zero point of each
    output. x [T, K] and its scales are as `product` got them."""
    if not after:
        return y
    scale = planes_tile.scales(after["scale"], plan.scale)
    if "zero" not in after:
        return y * scale
    x = x.astype(jnp.float32)
    if x_scale is not None and plan.x_group is not None:
        x = x * jnp.repeat(x_scale, plan.x_group, axis=1)
    shift = x.sum(axis=1, keepdims=True) * after["zero"].astype(jnp.float32)
    return y * scale + shift if plan.planes.zero == "add" else (y - shift) * scale
