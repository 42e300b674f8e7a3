"""What comes before and after products, for implementations whose kernel is the product alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.matmul.spec import WeightArrays, WeightSpec

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True)}


def rms_norm(x: jax.Array, weight: jax.Array | None, eps: float) -> jax.Array:
    """RMSNorm of the rows of x; x itself where there is no weight."""
    if weight is None:
        return x
    return x * lax.rsqrt(lax.square(x).mean(axis=-1, keepdims=True) + eps) * weight


def epilogue(
    outputs: Sequence[jax.Array],
    *,
    biases: Sequence[jax.Array | None],
    activation: str | None,
    post_norm: jax.Array | None,
    norm_eps: float,
    residual: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """What `pallas_kernels.matmul.api.matmul` does to products, float32 [T, N_i], in its order."""
    outputs = [y if b is None else y + b for y, b in zip(outputs, biases, strict=True)]
    if activation is not None:
        gate, up = outputs
        outputs = [ACTIVATIONS[activation](gate) * up]
    if post_norm is not None or residual is not None:
        (y,) = outputs
        y = rms_norm(y, post_norm, norm_eps)
        outputs = [y if residual is None else residual + y]
    return tuple(outputs)


def by_products(
    product: Callable[..., jax.Array],
    x: jax.Array,
    weights: Sequence[tuple[WeightSpec, WeightArrays]],
    *,
    norm: jax.Array | None,
    norm_eps: float,
    biases: Sequence[jax.Array | None],
    activation: str | None,
    residual: jax.Array | None,
    post_norm: jax.Array | None,
    activation_dtype: str,
    num_rows: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """What `pallas_kernels.matmul.api.matmul` promises, by `product(x, spec, arrays, num_rows=)`,
    which is given bfloat16 where inputs may be rounded to it, else float32.
    """
    x = rms_norm(x, norm, norm_eps)
    if activation_dtype == "bfloat16":
        x = x.astype(jnp.bfloat16)
    return epilogue(
        [product(x, spec, arrays, num_rows=num_rows) for spec, arrays in weights],
        biases=biases,
        activation=activation,
        post_norm=post_norm,
        norm_eps=norm_eps,
        residual=residual,
    )
