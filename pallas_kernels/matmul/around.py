"""What comes before and after products, for implementations whose kernel is the product alone."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax import lax

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
