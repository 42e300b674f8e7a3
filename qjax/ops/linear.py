"""Linear layers on stored weights, with the operations around them that a kernel can fuse."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import matmul as kernels
from pallas_kernels.hadamard import hadamard
from pallas_kernels.matmul import WeightArrays
from pallas_kernels.matmul.around import epilogue, rms_norm
from qjax.errors import UnsupportedError
from qjax.ops import activations, floats
from qjax.ops.collectives import summed
from qjax.qarray import QArray
from qjax.sharding import MODEL

if TYPE_CHECKING:
    from qjax.kv_cache import Batch


# Batch.numerics -> what the kernels may round activations to.
ACTIVATION_DTYPES = {
    "exact": "float32",
    "bfloat16": "bfloat16",
    "int16": "int16",
    "int8": "int8",
}
_OUTPUT_AUX = {"lora_a", "output_perm"}  # what a weight does to the outputs of its product


@overload
def linear(x: jax.Array, w: QArray, **around: Any) -> jax.Array: ...
@overload
def linear(x: jax.Array, w: tuple[QArray, ...], *, activation: str, **around: Any) -> jax.Array: ...
@overload
def linear(x: jax.Array, w: tuple[QArray, ...], **around: Any) -> tuple[jax.Array, ...]: ...
def linear(  # pyright: ignore[reportInconsistentOverload]  (it names what `around` may be)
    x: jax.Array,
    w: QArray | tuple[QArray, ...],
    *,
    batch: Batch,
    norm: jax.Array | None = None,
    norm_eps: float = 0.0,
    bias: jax.Array | tuple[jax.Array | None, ...] | None = None,
    activation: str | None = None,
    residual: jax.Array | None = None,
    post_norm: jax.Array | None = None,
    rows: jax.Array | None = None,
    by_inputs: bool = False,
    total: bool = True,
) -> jax.Array | tuple[jax.Array, ...]:
    """x @ w.T for one weight or for several that share their input.

    Args:
      x: float32 [T, K].
      w: one weight, or a tuple of weights. They may be float32 arrays [N, K] instead: see
        `qjax.ops.floats`; nothing is rounded then.
      batch: says how activations may be rounded (`numerics`), and how many rows of x are not
        padding where x has one row a token.
      norm: float32 [K], RMSNorm of x first.
      norm_eps: of `norm` and `post_norm`.
      bias: float32 [N]; a tuple of these or None where w is a tuple.
      activation: "silu" or "gelu_tanh": w is (gate, up) and the result act(gate) * up.
      residual: float32 [T, N], added last.
      post_norm: float32 [N], RMSNorm of the result before the residual.
      rows: int32 [1], the number of rows that are not padding, where `batch` does not tell.
      by_inputs: where the model is split (`batch.parallel`), each device has some of the columns of
        this x and this one w, not some of the outputs; their products are summed.
      total: whether to sum them here; else what is added comes later too.

    Returns:
      float32 [T, N]; a tuple of them where w is a tuple and there is no activation.
    """
    several = isinstance(w, tuple)
    weights = w if isinstance(w, tuple) else (w,)
    biases = bias if isinstance(bias, tuple) else (bias,) * len(weights)
    if rows is None and x.shape[0] == batch.positions.shape[0]:
        rows = batch.query_start_loc[-1:]
    across = by_inputs and batch.parallel is not None
    product = partial(
        kernels.matmul, activation_dtype=ACTIVATION_DTYPES[batch.numerics], num_rows=rows
    )
    fused = {"norm_eps": norm_eps, "activation": activation}
    fused |= {"residual": residual, "post_norm": post_norm}
    if across:
        exact = batch.numerics == "exact"
        apart = partial(_product_apart, product, x, norm=norm, norm_eps=norm_eps, rows=rows)
        y = apart(weights[0], across=MODEL, exact=exact)
        if not total:
            return y
        outputs = epilogue([summed(y, batch.parallel)], biases=biases, **fused)
        return outputs[0]
    if not isinstance(weights[0], QArray):
        outputs = floats.linear(x, weights, norm=norm, biases=biases, **fused)
        return outputs if several and activation is None else outputs[0]
    if _treated_alike(weights):
        outputs = _product(product, x, weights, norm=norm, biases=biases, rows=rows, **fused)
    else:
        apart = partial(_product_apart, product, x, norm=norm, norm_eps=norm_eps, rows=rows)
        outputs = epilogue([apart(w) for w in weights], biases=biases, **fused)
    return outputs if several and activation is None else outputs[0]


def _treated_alike(weights: tuple[QArray, ...]) -> bool:
    """Whether one call serves all of them: one input, one layout, nothing but the product."""
    if any(w.hadamard[1] or w.aux.keys() & _OUTPUT_AUX for w in weights):
        return False
    if len(weights) == 1 or not any(map(activations.has_own_inputs, weights)):
        return len({(w.act, w.hadamard, w.layout) for w in weights}) == 1
    return _kernel_treats(weights)


def _kernel_treats(weights: tuple[QArray, ...]) -> bool:
    """Whether one call of the kernel can do what these weights want of their inputs."""
    alike = len({w.act for w in weights}) == 1 and not any(w.hadamard[0] for w in weights)
    return alike and kernels.takes_inputs([w.spec for w in weights], weights[0].act)


def _product(
    product: Callable[..., tuple[jax.Array, ...]],
    x: jax.Array,
    weights: tuple[QArray, ...],
    *,
    norm: jax.Array | None,
    rows: jax.Array | None,
    across: tuple[str, ...] = (),
    **fused: Any,
) -> tuple[jax.Array, ...]:
    """Products with weights that take the same inputs; the kernel treats these where it can.

    `across`: axes along which devices have columns of rows whose scales belong to all of them.
    """
    first, pairs = weights[0], [(each.spec, each.arrays) for each in weights]
    if any(map(activations.treats_inputs, weights)):
        whole = across and activations.sees_whole_rows(first)
        if not whole and _kernel_treats(weights):
            fused |= {"act": first.act, "inputs": tuple(map(activations.arrays, weights))}
        else:
            if norm is not None:
                x = rms_norm(x, norm, fused["norm_eps"])
            norm, x = None, activations.inputs(x, first, rows, across)
    return product(x, pairs, norm=norm, **fused)


def _product_apart(
    product: Callable[..., tuple[jax.Array, ...]],
    x: jax.Array,
    w: QArray,
    *,
    norm: jax.Array | None,
    norm_eps: float,
    rows: jax.Array | None,
    across: tuple[str, ...] = (),
    exact: bool = True,
) -> jax.Array:
    """One weight's product with inputs of its own, and what its outputs want: float32 [T, N].

    Where devices have some columns each (`across`), scales of rounded inputs are those of whole
    rows in exact numerics, elsewhere each device's own.
    """
    if "perm" in w.aux and "lora_a" in w.aux and across:
        raise UnsupportedError("a split weight with reordered inputs and an adapter")
    if norm is not None and "lora_a" in w.aux:
        x, norm = rms_norm(x, norm, norm_eps), None
    across = across if exact or "perm" in w.aux else ()
    fused = {"norm_eps": norm_eps, "across": across}
    (y,) = _product(product, x, (w,), norm=norm, rows=rows, **fused)
    if "output_perm" in w.aux:
        y = y[:, w.aux["output_perm"][0]]
    if "lora_a" in w.aux:
        a, b = (w.aux[key].astype(jnp.float32) for key in ("lora_a", "lora_b"))
        scaled = activations.scaled(x, w)
        y += jnp.matmul(jnp.matmul(scaled, a.T, precision="highest"), b.T, precision="highest")
    if w.hadamard[1]:
        y = hadamard(y, w.hadamard[1])
    return y


def prepare(w: QArray) -> QArray:
    """The weight (on the host, canonical) in the layout that this machine's kernels like best."""
    spec, arrays = kernels.prepare(w.spec, WeightArrays(*map(_on_host, w.arrays)))
    return w.with_arrays(spec.layout, arrays)


def unprepare(w: QArray) -> QArray:
    """The canonical weight that `prepare` was given."""
    spec, arrays = kernels.unprepare(w.spec, WeightArrays(*map(_on_host, w.arrays)))
    return w.with_arrays(spec.layout, arrays)


def _on_host(array: Any) -> np.ndarray | None:
    return None if array is None else np.asarray(array)
