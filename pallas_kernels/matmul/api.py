"""The one entry to quantized matrix products: checks the call, then dispatches it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch, platform, tuning
from pallas_kernels.inputs import ActSpec, Inputs
from pallas_kernels.matmul import (
    coded,
    dense,
    mosaic_gpu,
    native,
    planes,
    ref,
    tiles,
    tpu,
    triton,
    xla,
)
from pallas_kernels.matmul.around import ACTIVATIONS, epilogue
from pallas_kernels.matmul.spec import CANONICAL, WeightArrays, WeightSpec

IMPLEMENTATIONS: dispatch.Implementations = (
    ("native", native.matmul),
    ("triton", triton.matmul),
    ("mosaic_gpu", mosaic_gpu.matmul),
    ("tpu", tpu.matmul),
    ("xla", xla.matmul),
    ("ref", ref.matmul),
)
# Those that can treat inputs themselves.
TREATING = IMPLEMENTATIONS[:1]
ACTIVATION_DTYPES = ("float32", "bfloat16", "int16", "int8")

# Layouts of kernels on accelerators, by the kind of device or by the implementation that is named.
_PLANES = {
    "gpu": planes.PLANES,
    "triton": planes.PLANES,
    "mosaic_gpu": planes.PLANES,
    "tpu": planes.TRANSPOSED,
}

# A weight of blocks may be given as its uint8 array alone.
Weight = tuple[WeightSpec, WeightArrays | jax.Array]


def matmul(
    x: jax.Array,
    weights: Sequence[Weight],
    *,
    norm: jax.Array | None = None,
    norm_eps: float = 0.0,
    biases: Sequence[jax.Array | None] | None = None,
    activation: str | None = None,
    residual: jax.Array | None = None,
    post_norm: jax.Array | None = None,
    activation_dtype: str = "float32",
    num_rows: jax.Array | None = None,
    act: ActSpec | None = None,
    inputs: Sequence[Inputs] | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """y_i = x @ w_i.T for several weights that share one input, with prologue and epilogue.

    In this order: RMSNorm of x, rounding of x, products, biases, gate, RMSNorm of y, residual.

    Args:
      x: float32 [T, K].
      weights: (spec, arrays) pairs, all with the same K; types and N may differ.
      norm: float32 [K]. x becomes x * rsqrt(mean(x^2) + norm_eps) * norm first (RMSNorm, arXiv
        1910.07467).
      norm_eps: of `norm` and of `post_norm`.
      biases: float32 [N_i] or None for each weight.
      activation: "silu" or "gelu_tanh" (the tanh approximation of arXiv 1606.08415). The weights
        are then two, gate and up, and the one output is act(gate) * up.
      residual: float32 [T, N], added last; one output only.
      post_norm: float32 [N], RMSNorm of the output before the residual; one output only.
      activation_dtype: what the (normed) x may be rounded to before the product: "float32" not at
        all; "bfloat16", and with it decoded weights; "int16" or "int8" in blocks of 32 along K
        with scale absmax / 32639 (what two signed bytes hold) or absmax / 127.
        With int8, what rounding left over of the two blocks with the largest scales of each row is
        rounded in the same way and added, since these blocks hold most of the error. An
        implementation that gains nothing by rounding leaves x as it is. With all but "bfloat16",
        weights are never rounded. Sums are float32.
      num_rows: int32 [1]. Rows from num_rows[0] on are padding: their outputs are unspecified.
      act, inputs: what else happens to the (normed) x, where an implementation can take it in: ask
        `takes_inputs`. Weights may have different `inputs`, one each.
      implementation: one of `IMPLEMENTATIONS`, by name; None for the first that takes the call.

    Returns:
      One float32 [T, N_i] a weight, or one [T, N] with `activation`.

    Raises:
      ValueError: the arguments contradict each other or the shapes.
      NotImplementedError: no implementation, or not the named one, takes the call.
    """
    weights = tuple((spec, as_arrays(arrays)) for spec, arrays in weights)
    biases = tuple(biases) if biases is not None else (None,) * len(weights)
    _check(x, weights, norm, biases, activation, residual, post_norm, activation_dtype, num_rows)
    treated = act is not None or inputs is not None
    if act is not None and coded.takes_inputs([spec for spec, _ in weights], act):
        with dispatch.use(implementation or dispatch.named()):
            return coded.matmul(
                x,
                weights,
                norm=norm,
                norm_eps=norm_eps,
                biases=biases,
                activation=activation,
                residual=residual,
                post_norm=post_norm,
                activation_dtype=activation_dtype,
                num_rows=num_rows,
                act=act,
                inputs=inputs,
                plain=matmul,
            )
    if len({spec.layout for spec, _ in weights}) > 1 and not treated:
        products = _by_layout(
            x,
            weights,
            norm=norm,
            norm_eps=norm_eps,
            activation_dtype=activation_dtype,
            num_rows=num_rows,
            implementation=implementation,
        )
        return epilogue(
            products,
            biases=biases,
            activation=activation,
            post_norm=post_norm,
            norm_eps=norm_eps,
            residual=residual,
        )
    return dispatch.call(
        "matmul " + "+".join(spec.qtype for spec, _ in weights),
        TREATING if treated else IMPLEMENTATIONS,
        x,
        weights,
        norm=norm,
        norm_eps=norm_eps,
        biases=biases,
        activation=activation,
        residual=residual,
        post_norm=post_norm,
        activation_dtype=activation_dtype,
        num_rows=num_rows,
        implementation=implementation,
        preferred=_preferred(x.shape[0], weights),
        **({"act": act, "inputs": inputs} if treated else {}),
    )


def _by_layout(
    x: jax.Array, weights: tuple[tuple[WeightSpec, WeightArrays], ...], **arguments: Any
) -> list[jax.Array]:
    """The products alone, in a call of `matmul` for each layout: no implementation takes them all.

    A file may store, say, q and k in a type that one kernel tiles and v in another's.
    """
    products: dict[int, jax.Array] = {}
    for layout in dict.fromkeys(spec.layout for spec, _ in weights):
        chosen = [i for i, (spec, _) in enumerate(weights) if spec.layout == layout]
        outputs = matmul(x, [weights[i] for i in chosen], **arguments)
        products.update(zip(chosen, outputs, strict=True))
    return [products[i] for i in range(len(weights))]


def _preferred(rows: int, weights: tuple[tuple[WeightSpec, WeightArrays], ...]) -> str | None:
    """The implementation measured fastest for the largest of the weights, on this device."""
    largest = max((spec for spec, _ in weights), key=lambda spec: spec.shape[0])
    return tuning.preferred("matmul", largest.kind, max(rows, 1), *largest.shape)


def takes_inputs(specs: Sequence[WeightSpec], act: ActSpec | None) -> bool:
    """Whether `matmul` can itself treat the inputs of these weights, or the caller has to."""
    return native.takes_inputs(specs, act) or coded.takes_inputs(specs, act)


def as_arrays(arrays: WeightArrays | Any) -> WeightArrays:
    """The arrays of a weight; a single one is its qvalue."""
    return arrays if isinstance(arrays, WeightArrays) else WeightArrays(arrays)


def prepare(spec: WeightSpec, arrays: WeightArrays | np.ndarray) -> tuple[WeightSpec, WeightArrays]:
    """Lays a canonical weight out as the implementation that will run on this machine likes it.

    Args:
      spec: of the canonical weight.
      arrays: numpy arrays of shapes [N, ...]; a single one is the qvalue.

    Returns:
      The new spec and arrays; the arguments themselves where canonical is best. `unprepare` undoes
      it exactly.
    """
    arrays = as_arrays(arrays)
    if spec.layout != CANONICAL:
        return spec, arrays
    named = dispatch.named()
    first = named.split(",")[0] if named else platform.device_kind()
    if first in _PLANES:
        if spec.qtype in dense.DTYPES:
            return dense.prepare(spec, arrays)
        try:
            return planes.prepare(spec, arrays, _PLANES[first])
        except NotImplementedError:
            return spec, arrays
    if not dispatch.is_wanted("native"):
        return spec, arrays
    return tiles.prepare(spec, arrays) or (spec, arrays)


def unprepare(spec: WeightSpec, arrays: WeightArrays | Any) -> tuple[WeightSpec, WeightArrays]:
    """The canonical weight that `prepare` was given."""
    arrays = as_arrays(arrays)
    if spec.layout == CANONICAL:
        return spec, arrays
    if spec.layout == dense.LAYOUT:
        return dense.unprepare(spec, arrays)
    return (planes if spec.layout in planes.LAYOUTS else tiles).unprepare(spec, arrays)


def _check(
    x: jax.Array,
    weights: tuple[tuple[WeightSpec, WeightArrays], ...],
    norm: jax.Array | None,
    biases: tuple[jax.Array | None, ...],
    activation: str | None,
    residual: jax.Array | None,
    post_norm: jax.Array | None,
    activation_dtype: str,
    num_rows: jax.Array | None,
) -> None:
    """Raises ValueError where the arguments of `matmul` do not belong together."""
    if not weights or len(biases) != len(weights):
        raise ValueError(f"matmul: {len(weights)} weights with {len(biases)} biases")
    if activation_dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"activation_dtype {activation_dtype!r} is none of {ACTIVATION_DTYPES}")
    if x.ndim != 2:
        raise ValueError(f"x has shape {x.shape}, expected (T, K)")
    rows, k = x.shape
    _check_array("x", x, (rows, k))
    for spec, arrays in weights:
        if spec.shape[1] != k:
            raise ValueError(f"weight {spec.shape} does not fit x {x.shape}: K differs")
        check_weight(spec, arrays)
    for (spec, _), bias in zip(weights, biases, strict=True):
        _check_array("bias", bias, spec.shape[:1])
    _check_array("norm", norm, (k,))
    n = weights[0][0].shape[0]
    if activation is not None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is none of {tuple(ACTIVATIONS)}")
        if [spec.shape[0] for spec, _ in weights] != [n, n]:
            raise ValueError(f"{activation} takes two weights, gate and up, of equal N")
    if (residual is not None or post_norm is not None) and len(weights) > 1 and activation is None:
        raise ValueError("residual and post_norm need one output")
    _check_array("residual", residual, (rows, n))
    _check_array("post_norm", post_norm, (n,))
    if num_rows is not None and (num_rows.shape != (1,) or num_rows.dtype != jnp.int32):
        raise ValueError(f"num_rows is {num_rows.dtype} {num_rows.shape}, expected int32 (1,)")


def check_weight(spec: WeightSpec, arrays: WeightArrays) -> None:
    """Raises ValueError where the arrays are not those that the spec speaks of."""
    qvalue = arrays.qvalue
    if spec.layout != dense.LAYOUT and qvalue.dtype != jnp.uint8:
        raise ValueError(f"{spec.qtype} weight: raw blocks are uint8, got {qvalue.dtype}")
    if spec.layout != CANONICAL:
        return
    if qvalue.shape != spec.canonical_shape:
        raise ValueError(
            f"{spec.qtype} weight {spec.shape}: bytes have shape {qvalue.shape}, "
            f"expected {spec.canonical_shape}"
        )
    for name in ("scale", "zero_point"):
        array, dtype = getattr(arrays, name), getattr(spec, name)
        found = None if array is None else (jnp.dtype(array.dtype).name, array.shape)
        expected = None if dtype is None else (dtype, spec.scale_shape)
        if found != expected:
            raise ValueError(f"{spec.qtype} weight: {name} is {found}, expected {expected}")
    if (arrays.global_scale is not None) != spec.has_global_scale:
        raise ValueError(f"{spec.qtype} weight: the spec and the arrays disagree on a global scale")


def _check_array(name: str, array: jax.Array | None, shape: tuple[int, ...]) -> None:
    if array is not None and (array.shape != shape or array.dtype != jnp.float32):
        raise ValueError(f"{name} is {array.dtype} {array.shape}, expected float32 {shape}")
