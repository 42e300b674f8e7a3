"""Native CPU kernels of the quantized matrix product, as XLA custom calls on tiled weights."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.inputs import ActSpec, Inputs
from pallas_kernels.matmul import tiles
from pallas_kernels.matmul.spec import WeightArrays, WeightSpec

MAX_WEIGHTS = 8
_PRECISION = {"float32": 0, "int16": 1, "int8": 2}
_ACTIVATION = {None: 0, "silu": 1, "gelu_tanh": 2}


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
    act: ActSpec | None = None,
    inputs: Inputs | None = None,
) -> tuple[jax.Array, ...]:
    """See `pallas_kernels.matmul.api.matmul`."""
    described = describe(weights)
    if len(weights) > MAX_WEIGHTS:
        raise NotImplementedError(f"{len(weights)} weights in one call, at most {MAX_WEIGHTS}")
    rows = x.shape[0]
    if num_rows is None:
        num_rows = jnp.full((1,), rows, jnp.int32)
    outputs = [weights[0]] if activation else weights
    given = [bias for bias in biases if bias is not None]
    if act is not None and not rounds_inputs(act):
        raise NotImplementedError(f"inputs rounded to {act}")
    optional = [norm, residual, post_norm, *input_arrays(inputs)]
    extra = [array for array in optional if array is not None]
    flags = sum((array is not None) << bit for bit, array in enumerate(optional))
    call = jax.ffi.ffi_call(
        "qjax_matmul",
        [jax.ShapeDtypeStruct((rows, spec.shape[0]), jnp.float32) for spec, _ in outputs],
        vmap_method="sequential",
    )
    return tuple(
        call(
            x, num_rows, *weight_arrays(weights), *given, *extra,
            **described,
            biases=np.int32(sum((b is not None) << i for i, b in enumerate(biases))),
            flags=np.int32(flags),
            activation=np.int32(_ACTIVATION[activation]),
            precision=np.int32(_PRECISION[activation_dtype]),
            eps=np.float32(norm_eps),
            **act_attributes(act),
        )
    )  # fmt: skip


def describe(weights: Sequence[tuple[WeightSpec, WeightArrays]]) -> dict[str, np.ndarray]:
    """What a kernel is told of its weights; refuses those that are not tiled for it."""
    return {
        "types": np.array([tiles.require(spec).number for spec, _ in weights], np.int32),
        "beside": np.array([tiles.beside(*weight) for weight in weights], np.int32).reshape(-1),
    }


def weight_arrays(weights: Sequence[tuple[WeightSpec, WeightArrays]]) -> list[jax.Array]:
    """All arrays of all weights, one after the other."""
    return [array for _, arrays in weights for array in tiles.given(arrays)]


# Bits of mantissa, exponents of the smallest normal and of the largest number, largest number.
_FLOATS = {
    "fp8_e4m3": (3, -6, 8, 448.0),
    "fp8_e5m2": (2, -14, 15, 57344.0),
    "fp6_e2m3": (3, 0, 2, 7.5),
    "fp6_e3m2": (2, -2, 4, 28.0),
    "fp4_e2m1": (1, 0, 2, 6.0),
}
_SCALES = (
    *("float32", "bfloat16", "float16", "e8m0", "e8m0_ceil", "fp8_e4m3", "e8m0_even", "e8m0_even4"),
)
_INTEGERS = tuple(f"int{bits}" for bits in range(2, 9))


def rounds_inputs(act: ActSpec) -> bool:
    """Whether the kernel itself can round its inputs so: row by row, to a type that it knows."""
    return (
        act.dtype in (*_FLOATS, *_INTEGERS)
        and act.scale in _SCALES
        and act.outliers is None
        and not (act.dynamic and act.strategy == "tensor")
        and (act.symmetric or act.scale == "float32")
    )


def takes_inputs(specs: Sequence[WeightSpec], act: ActSpec | None) -> bool:
    """Whether `matmul` takes these weights together with what is to happen to their inputs."""
    return all(spec.layout == tiles.LAYOUT for spec in specs) and (
        act is None or rounds_inputs(act)
    )


def input_arrays(inputs: Inputs | None) -> list[jax.Array | None]:
    if inputs is None:
        return []
    *floats, perm = inputs
    return [*(None if each is None else each.astype(jnp.float32) for each in floats), perm]


def act_attributes(act: ActSpec | None) -> dict[str, np.ndarray]:
    """What native/ffi.cc reads as `Inputs`."""
    if act is None:
        return {"act": np.zeros(0, np.int32), "act_values": np.zeros(0, np.float32)}
    if act.dtype in _FLOATS:
        mantissa, least, most, top = _FLOATS[act.dtype]
        bottom = -top
    else:
        half = 1 << (int(act.dtype.removeprefix("int")) - 1)
        mantissa = least = most = 0
        bottom, top = -half, half - 1
    kind = _SCALES.index(act.scale)
    group = act.group_size or 0
    return {
        "act": np.array(
            [act.dtype in _FLOATS, act.dynamic, act.symmetric, mantissa, least, most, kind, group],
            np.int32,
        ),
        "act_values": np.array([bottom, top, act.divisor or top, act.upper_bound or 0], np.float32),
    }
