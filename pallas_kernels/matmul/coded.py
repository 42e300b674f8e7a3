"""Products of inputs that are quantized with weights in planes: codes by codes, scales afterwards.

y = (x_codes @ w_codes.T) * x_scale * w_scale, where the types of both allow it: integers by
integers, small floats by small floats. Products of codes are exact, so that this is the product of
the rounded inputs but for the order of additions. Inputs with a zero point enter as code - zero
point, which bfloat16 holds. All else is a product of the rounded inputs as plain floats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch, platform, tuning
from pallas_kernels.inputs import FLOATS, ActSpec, Inputs
from pallas_kernels.matmul import mosaic_gpu, planes, tpu, triton
from pallas_kernels.matmul.around import epilogue, rms_norm
from pallas_kernels.matmul.spec import WeightArrays, WeightSpec
from pallas_kernels.quantize import quantize, refused, rounded


def takes_inputs(specs: Sequence[WeightSpec], act: ActSpec | None) -> bool:
    """Whether `matmul` is for these weights and what is to happen to their inputs."""
    return act is not None and not refused(act) and all(_fits(spec, act) for spec in specs)


def _fits(spec: WeightSpec, act: ActSpec) -> bool:
    if spec.layout not in planes.LAYOUTS:
        return False
    kinds = ("float",) if act.dtype in FLOATS else ("int", "signed")
    return planes.describe(spec).value in kinds


def matmul(
    x: jax.Array,
    weights: tuple[tuple[WeightSpec, WeightArrays], ...],
    *,
    norm: jax.Array | None,
    norm_eps: float,
    biases: tuple[jax.Array | None, ...],
    activation: str | None,
    residual: jax.Array | None,
    post_norm: jax.Array | None,
    activation_dtype: str,
    num_rows: jax.Array | None,
    act: ActSpec,
    inputs: Sequence[Inputs] | None,
    plain: Callable[..., tuple[jax.Array, ...]],
) -> tuple[jax.Array, ...]:
    """See `pallas_kernels.matmul.api.matmul`.

    Args:
      plain: the product of float inputs with weights, for those that no product of codes takes.
    """
    x = rms_norm(x, norm, norm_eps)
    # Many weights may share their inputs, which are then quantized once.
    made: dict[tuple[int, ...], tuple[jax.Array, jax.Array]] = {}
    products = []
    for (spec, arrays), own in zip(weights, inputs or [Inputs()] * len(weights), strict=True):
        scaled = x if own.pre_scale is None else x * own.pre_scale.astype(jnp.float32)
        try:
            require_codes(spec, act, own, activation_dtype, PRODUCTS)
            key = tuple(map(id, own))
            if key not in made:
                made[key] = codes_of(scaled, act, own, num_rows, activation_dtype)
            codes, scale = made[key]
            y = dispatch.call(
                f"matmul {act.dtype} {spec.qtype}",
                PRODUCTS,
                codes,
                spec,
                arrays,
                x_scale=scale,
                num_rows=num_rows,
                preferred=tuning.preferred(
                    "matmul",
                    tuning.product_kind(spec.kind, codes.dtype),
                    max(len(codes), 1),
                    *spec.shape,
                ),
            )
        except NotImplementedError:
            values = rounded(scaled, act, own, num_rows)
            values = values if own.perm is None else values[:, own.perm[0]]
            (y,) = plain(
                values, [(spec, arrays)], activation_dtype=activation_dtype, num_rows=num_rows
            )
        products.append(y)
    return epilogue(
        products,
        biases=biases,
        activation=activation,
        post_norm=post_norm,
        norm_eps=norm_eps,
        residual=residual,
    )


def require_codes(
    spec: WeightSpec,
    act: ActSpec,
    own: Inputs,
    activation_dtype: str,
    products: dispatch.Implementations,
) -> None:
    """Raises NotImplementedError where a product of codes is another one than is asked for, or none
    of these products was.
    """
    if spec.rounded is not None and activation_dtype == "float32":
        raise NotImplementedError(f"weights rounded to {spec.rounded} once they are scaled")
    if not any(dispatch.is_wanted(name) for name, _ in products):
        raise NotImplementedError("another implementation was named")
    if own.perm is not None and act.strategy == "group":
        raise NotImplementedError("columns of several groups in another order")
    if act.group_size and spec.shape[1] % act.group_size:
        raise NotImplementedError(f"{spec.shape[1]} columns in groups of {act.group_size}")


def codes_of(
    x: jax.Array, act: ActSpec, own: Inputs, num_rows: jax.Array | None, activation_dtype: str
) -> tuple[jax.Array, jax.Array]:
    """Codes [T, K] and their scales, float32 [T, groups].

    Matrix units may add products of 8-bit floats with fewer bits than float32 has: where that is
    not asked for, these are bfloat16.
    """
    named = dispatch.named()
    codes, scale, zero = quantize(
        x, act, own, num_rows=num_rows, implementation=named and named + ",xla"
    )
    if zero is not None:
        size = act.group_size or x.shape[1]
        zero = jnp.repeat(zero, size, axis=1)[:, : x.shape[1]]
        codes = (codes.astype(jnp.float32) - zero).astype(jnp.bfloat16)
    elif act.dtype in FLOATS and activation_dtype == "float32":
        codes = codes.astype(jnp.bfloat16)
    if own.perm is not None:
        codes = codes[:, own.perm[0]]
    return codes, jnp.broadcast_to(scale, (x.shape[0], scale.shape[1]))


def product(
    x: jax.Array,
    spec: WeightSpec,
    arrays: WeightArrays,
    *,
    x_scale: jax.Array,
    num_rows: jax.Array | None = None,
) -> jax.Array:
    """XLA's own product of codes: of weights of 8 bits with a scale for each output, and of inputs
    with one for each row.

    Args:
      x: codes [T, K], int8, float8_e4m3fn, float8_e5m2 or (exact in it) bfloat16.
      x_scale: float32 [T, 1].

    Returns:
      float32 [T, N].

    Raises:
      NotImplementedError: the weight has other codes, or either has other scales.
    """
    del num_rows  # rows of padding are computed like the others
    layout = planes.describe(spec)
    if layout.bits != 8 or layout.zero or layout.super_columns or arrays.scale.shape[-2] > 1:
        raise NotImplementedError("XLA takes codes of 8 bits with a scale for each output alone")
    if x_scale.shape[1] > 1:
        raise NotImplementedError("XLA takes inputs with one scale for each row alone")
    weight = _eight_bits(arrays.qvalue, layout)
    if layout.k > x.shape[1]:
        x = jnp.pad(x, ((0, 0), (0, layout.k - x.shape[1])))
    accumulator, precision = jnp.float32, None
    if x.dtype == weight.dtype == jnp.int8:
        accumulator = jnp.int32
    elif x.dtype == weight.dtype == jnp.float8_e4m3fn:
        precision = lax.Precision.HIGHEST  # else libraries for GPUs keep fewer bits of sums
    else:
        # (CPUs have no units for bfloat16 to be kept for, and XLA for them not all its products.)
        wide = jnp.float32 if platform.device_kind() == "cpu" else jnp.bfloat16
        x, weight = x.astype(wide), weight.astype(wide)
    y = lax.dot_general(
        x,
        weight,
        (((1,), (0 if spec.layout == planes.TRANSPOSED else 1,)), ((), ())),
        precision=precision,
        preferred_element_type=accumulator,
    )
    scale = arrays.scale[0].astype(jnp.float32)
    if arrays.global_scale is not None:
        scale = scale * arrays.global_scale.reshape(1)
    if scale.shape[0] > 1:
        scale = jnp.repeat(scale, layout.group[0])[: spec.shape[0]]
    return y.astype(jnp.float32) * x_scale * scale


def _eight_bits(qvalue: jax.Array, layout: planes.Planes) -> Any:
    """Codes of 8 bits in their own type: int8, or that of the float."""
    if layout.value == "int":
        raise NotImplementedError(f"XLA takes no codes from 0 to 255 ({layout.qtype})")
    if layout.value == "signed":
        return lax.bitcast_convert_type(qvalue, jnp.int8)
    dtypes = {"fp8_e4m3": jnp.float8_e4m3fn, "fp8_e5m2": jnp.float8_e5m2}
    return lax.bitcast_convert_type(qvalue, dtypes[layout.qtype])


# XLA's own are the libraries of the maker of the device, for the few kinds that these take.
PRODUCTS: dispatch.Implementations = (
    ("xla", product),
    ("triton", triton.product),
    ("mosaic_gpu", mosaic_gpu.product),
    ("tpu", tpu.product),
)
