"""The one entry to grouped products: checks the call, then dispatches it."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, tuning
from pallas_kernels.inputs import ActSpec
from pallas_kernels.matmul.spec import WeightArrays, WeightSpec
from pallas_kernels.matmul_grouped import coded, mosaic_gpu, native, ref, tpu, triton, xla
from pallas_kernels.matmul_grouped.bias import add_bias

IMPLEMENTATIONS: dispatch.Implementations = (
    ("native", native.matmul_grouped),
    ("triton", triton.matmul_grouped),
    ("mosaic_gpu", mosaic_gpu.matmul_grouped),
    ("tpu", tpu.matmul_grouped),
    ("xla", xla.matmul_grouped),
    ("ref", ref.matmul_grouped),
)


def matmul_grouped(
    x: jax.Array,
    group_sizes: jax.Array,
    weight: tuple[WeightSpec, WeightArrays],
    *,
    bias: jax.Array | None = None,
    activation_dtype: str = "float32",
    act: ActSpec | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """y[t] = x[t] @ w[e].T + bias[e], where e is the expert of row t.

    Args:
      x: float32 [T, K], rows sorted by expert.
      group_sizes: int32 [E], rows of each expert. Rows behind the last group are padding: their
        outputs are unspecified.
      weight: spec of one expert's weight, and arrays with a leading axis E.
      bias: float32 [E, N].
      activation_dtype: what x may be rounded to, see `pallas_kernels.matmul`.
      act: what x is rounded to first, for weights of which `takes_inputs` says so.
      implementation: one of `IMPLEMENTATIONS`, by name; None for the first that takes the call.

    Returns:
      float32 [T, N].

    Raises:
      ValueError: shapes contradict each other.
      NotImplementedError: no implementation, or not the named one, takes the call.
    """
    spec, arrays = weight
    experts = group_sizes.shape[0]
    if x.ndim != 2 or x.dtype != jnp.float32 or x.shape[1] != spec.shape[1]:
        raise ValueError(f"x is {x.dtype} {x.shape}, expected float32 (T, {spec.shape[1]})")
    if group_sizes.shape != (experts,) or group_sizes.dtype != jnp.int32:
        raise ValueError(f"group_sizes is {group_sizes.dtype} {group_sizes.shape}, expected int32")
    for name, array in zip(arrays._fields, arrays, strict=True):
        if array is not None and array.shape[0] != experts:
            raise ValueError(f"{name} {array.shape} of {experts} experts")
    if bias is not None and bias.shape != (experts, spec.shape[0]):
        raise ValueError(f"bias is {bias.shape}, expected {(experts, spec.shape[0])}")
    if act is not None:
        plain = partial(
            matmul_grouped,
            group_sizes=group_sizes,
            weight=weight,
            activation_dtype=activation_dtype,
        )
        with dispatch.use(implementation or dispatch.named()):
            y = coded.product(
                x, group_sizes, weight, act=act, activation_dtype=activation_dtype, plain=plain
            )
        return add_bias(y, group_sizes, bias)
    return dispatch.call(
        f"matmul_grouped {spec.qtype}",
        IMPLEMENTATIONS,
        x,
        group_sizes,
        weight,
        bias=bias,
        activation_dtype=activation_dtype,
        implementation=implementation,
        preferred=tuning.preferred("matmul_grouped", spec.kind, max(x.shape[0], 1), *spec.shape),
    )
