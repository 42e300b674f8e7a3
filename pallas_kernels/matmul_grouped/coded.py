"""Grouped products of inputs that are quantized: codes by codes where a kernel takes both (see
`pallas_kernels.matmul.coded`), else of the rounded inputs as plain floats.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from pallas_kernels import dispatch, tuning
from pallas_kernels.inputs import ActSpec, Inputs
from pallas_kernels.matmul import coded
from pallas_kernels.matmul.spec import WeightArrays, WeightSpec
from pallas_kernels.matmul_grouped import mosaic_gpu, tpu, triton
from pallas_kernels.quantize import rounded


def _tpu_product(
    x: jax.Array,
    group_sizes: jax.Array,
    spec: WeightSpec,
    arrays: WeightArrays,
    *,
    x_scale: jax.Array,
) -> jax.Array:
    return tpu.product(x, spec, arrays, x_scale=x_scale, group_sizes=group_sizes)


PRODUCTS: dispatch.Implementations = (
    ("triton", triton.product),
    ("mosaic_gpu", mosaic_gpu.product),
    ("tpu", _tpu_product),
)


def takes_inputs(spec: WeightSpec, act: ActSpec) -> bool:
    """Whether `product` is for such a weight: rows are rounded alike, whatever their expert."""
    return act.dynamic and act.strategy != "tensor" and coded.takes_inputs([spec], act)


def product(
    x: jax.Array,
    group_sizes: jax.Array,
    weight: tuple[WeightSpec, WeightArrays],
    *,
    act: ActSpec,
    activation_dtype: str,
    plain: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """The product without a bias.

    Args:
      x, group_sizes, weight, activation_dtype: see `pallas_kernels.matmul_grouped.matmul_grouped`.
      plain: the same of rounded inputs, for weights that no product of codes takes.
    """
    spec, arrays = weight
    try:
        coded.require_codes(spec, act, Inputs(), activation_dtype, PRODUCTS)
        codes, scale = coded.codes_of(x, act, Inputs(), None, activation_dtype)
        return dispatch.call(
            f"matmul_grouped {act.dtype} {spec.qtype}",
            PRODUCTS,
            codes,
            group_sizes,
            spec,
            arrays,
            x_scale=scale,
            preferred=tuning.preferred(
                "matmul_grouped",
                tuning.product_kind(spec.kind, codes.dtype),
                max(len(codes), 1),
                *spec.shape,
            ),
        )
    except NotImplementedError:
        return plain(rounded(x, act, Inputs()))
