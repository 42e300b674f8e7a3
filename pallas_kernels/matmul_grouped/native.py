"""Native CPU kernel of grouped products, as an XLA custom call on tiled weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.matmul import native
from pallas_kernels.matmul.spec import WeightArrays, WeightSpec

_PRECISION = {"float32": 0, "int16": 1, "int8": 2}


def matmul_grouped(
    x: jax.Array,
    group_sizes: jax.Array,
    weight: tuple[WeightSpec, WeightArrays],
    *,
    bias: jax.Array | None,
    activation_dtype: str,
) -> jax.Array:
    """See `pallas_kernels.matmul_grouped.api.matmul_grouped`."""
    described = native.describe((weight,))
    call = jax.ffi.ffi_call(
        "qjax_matmul_grouped",
        [jax.ShapeDtypeStruct((len(x), weight[0].shape[0]), jnp.float32)],
        vmap_method="sequential",
    )
    (y,) = call(
        x, group_sizes, *native.weight_arrays((weight,)), *([] if bias is None else [bias]),
        **described,
        biases=np.int32(bias is not None),
        flags=np.int32(0),
        activation=np.int32(0),
        precision=np.int32(_PRECISION[activation_dtype]),
        **native.act_attributes(None),
    )  # fmt: skip
    return y
