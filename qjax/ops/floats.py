"""Products with weights that are float arrays, not QArrays.

A model runs on such a tree too: while it is quantized, whose inputs are then looked at (`watch`),
and where gradients are wanted, which kernels do not have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.matmul.around import epilogue, rms_norm


class Seen(NamedTuple):
    """A product that was traced.

    Attributes:
      weights: those that shared the inputs, float32 [N_i, K], or [E, N_i, K] of experts.
      inputs: float32 [T, K], as they met the weights.
      sizes: int32 [E], how many rows went to each expert, one after the other; None without.
    """

    weights: tuple[jax.Array, ...]
    inputs: jax.Array
    sizes: jax.Array | None = None


_shifting: ContextVar[Iterator[Any] | None] = ContextVar("shifted_products", default=None)
_watching: ContextVar[list[Seen] | None] = ContextVar("watched_products", default=None)


@contextmanager
def watch() -> Iterator[list[Seen]]:
    """The products with float arrays that are traced inside the block."""
    found: list[Seen] = []
    token = _watching.set(found)
    try:
        yield found
    finally:
        _watching.reset(token)


@contextmanager
def shifted(by: Sequence[tuple[jax.Array, ...] | None]) -> Iterator[None]:
    """Adds arrays to the outputs of the products that are traced inside the block, in the order in
    which `watch` sees them: [T, N_i] for each weight; None for those of experts."""
    token = _shifting.set(iter(by))
    try:
        yield
    finally:
        _shifting.reset(token)


def linear(
    x: jax.Array,
    weights: Sequence[Any],
    *,
    norm: jax.Array | None,
    norm_eps: float,
    biases: Sequence[jax.Array | None],
    **around: Any,
) -> tuple[jax.Array, ...]:
    """What `ops.linear` does, float32 throughout: [T, N_i] each."""
    x = rms_norm(x, norm, norm_eps)
    _note(weights, x)
    outputs = [jnp.matmul(x, w.T, precision="highest") for w in weights]
    if (shift := _next_shift()) is not None:
        outputs = [y + each for y, each in zip(outputs, shift, strict=True)]
    return epilogue(outputs, biases=biases, norm_eps=norm_eps, **around)


def grouped(
    x: jax.Array, sizes: jax.Array, w: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """Rows x[T, K] by the experts w[E, N, K] that they go to, `sizes`[e] after another to each."""
    _note((w,), x, sizes)
    _next_shift()
    y = lax.ragged_dot(x, w.swapaxes(-1, -2), sizes, precision="highest")
    if bias is None:
        return y
    owner = jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=len(x))
    return y + bias[owner]


def per_head(x: jax.Array, w: jax.Array) -> jax.Array:
    """float32 [T, H, N] of x [T, H, K] by w [H, N, K]."""
    return jnp.einsum("thk,hnk->thn", x, w, precision="highest")


def _next_shift() -> tuple[jax.Array, ...] | None:
    shifting = _shifting.get()
    return None if shifting is None else next(shifting)


def _note(weights: Sequence[jax.Array], inputs: jax.Array, sizes: jax.Array | None = None) -> None:
    watching = _watching.get()
    if watching is not None:
        watching.append(Seen(tuple(weights), inputs, sizes))
