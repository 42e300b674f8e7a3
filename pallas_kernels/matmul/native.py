"""Native CPU kernels of the quantized matrix product, as XLA custom calls on tiled weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.inputs import FLOATS, ActSpec, Inputs, bounds
from pallas_kernels.matmul import tiles
from pallas_kernels.matmul.spec import WeightArrays, WeightSpec

MAX_WEIGHTS = 8
# (bfloat16 gains nothing here.)
PRECISION = {"float32": 0, "bfloat16": 0, "int16": 1, "int8": 2}
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
    inputs: Sequence[Inputs] | None = None,
) -> tuple[jax.Array, ...]:
    """See `pallas_kernels.matmul.api.matmul`."""
    kinds = [tiles.require(spec) for spec, _ in weights]
    if len(weights) > MAX_WEIGHTS:
        raise NotImplementedError(f"{len(weights)} weights in one call, at most {MAX_WEIGHTS}")
    rows = x.shape[0]
    if num_rows is None:
        num_rows = jnp.full((1,), rows, jnp.int32)
    outputs = [weights[0]] if activation else weights
    stored = [array for _, arrays in weights for array in tiles.given(arrays)]
    given = [bias for bias in biases if bias is not None]
    if act is not None and not rounds_inputs(act):
        raise NotImplementedError(f"inputs rounded to {act}")
    around = [norm, residual, post_norm]
    treating = [_input_arrays(each) for each in inputs or [None] * len(weights)]
    extra = [array for array in itertools.chain(around, *treating) if array is not None]
    call = jax.ffi.ffi_call(
        "qjax_matmul",
        [jax.ShapeDtypeStruct((rows, spec.shape[0]), jnp.float32) for spec, _ in outputs],
        vmap_method="sequential",
    )
    return tuple(
        call(
            x, num_rows, *stored, *given, *extra,
            types=np.array([kind.number for kind in kinds], np.int32),
            beside=np.array([tiles.beside(*weight) for weight in weights], np.int32).reshape(-1),
            biases=np.int32(sum((b is not None) << i for i, b in enumerate(biases))),
            flags=np.int32(_given(around)),
            input_flags=np.array([_given(each) for each in treating], np.int32),
            activation=np.int32(_ACTIVATION[activation]),
            precision=np.int32(PRECISION[activation_dtype]),
            eps=np.float32(norm_eps),
            **_act_attributes(act),
        )
    )  # fmt: skip


_SCALES = (
    *("float32", "bfloat16", "float16", "e8m0", "e8m0_ceil", "fp8_e4m3", "e8m0_even", "e8m0_even4"),
)
_INTEGERS = tuple(f"int{bits}" for bits in range(2, 9))


def rounds_inputs(act: ActSpec) -> bool:
    """Whether the kernel itself can round its inputs so: row by row, to a type that it knows."""
    return (
        act.dtype in (*FLOATS, *_INTEGERS)
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


def _given(arrays: Sequence[jax.Array | None]) -> int:
    """A bit for each, set where it is there."""
    return sum((array is not None) << bit for bit, array in enumerate(arrays))


def _input_arrays(inputs: Inputs | None) -> list[jax.Array | None]:
    if inputs is None:
        return []
    *floats, perm = inputs
    return [*(None if each is None else each.astype(jnp.float32) for each in floats), perm]


def _act_attributes(act: ActSpec | None) -> dict[str, np.ndarray]:
    """What native/ffi.cc reads as `Inputs`."""
    if act is None:
        return {"act": np.zeros(0, np.int32), "act_values": np.zeros(0, np.float32)}
    mantissa, least, most, _ = FLOATS.get(act.dtype, (0, 0, 0, 0))
    bottom, top = bounds(act.dtype)
    kind = _SCALES.index(act.scale)
    group = act.group_size or 0
    return {
        "act": np.array(
            [act.dtype in FLOATS, act.dynamic, act.symmetric, mantissa, least, most, kind, group],
            np.int32,
        ),
        "act_values": np.array([bottom, top, act.divisor or top, act.upper_bound or 0], np.float32),
    }
