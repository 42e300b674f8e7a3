"""HQQ (Badri & Shaji 2023, mobiusml.github.io/hqq_blog): zero points without calibration data.

Of the errors W - Q(W), few large ones matter less than many small ones do: their |e| ** p with
p < 1 is brought down, which ignores outliers. With an auxiliary E for the errors, two steps in turn
(half-quadratic splitting): E = shrink(W - Q(W)), then the zero points that are the least-squares
fit to W - E. Scales stay those of the extremes. Constants and the end of the iteration, once the
mean error rises, are those of the hqq package.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from qjax.compress.grid import Grid, Scales, extremes
from qjax.errors import UnsupportedError

_LARGEST = 2e4  # of 1 / scale


def optimized(
    w: jax.Array,
    grid: Grid,
    iterations: int = 20,
    p: float = 0.7,
    beta: float = 10.0,
    growth: float = 1.01,
) -> Scales:
    """Scales and zero points of a weight.

    Args:
      w: float [N, K], taken as float32.
      grid: of integers with zero points; where these are not `fractional`, they are rounded at the
        end.
      p, beta, growth: the norm, how closely E follows the errors at first, and by what factor more
        closely each time.

    Raises:
      UnsupportedError: a grid without zero points, or of blocks of several rows.
    """
    n, k = w.shape
    if grid.symmetric or grid.group[0] != 1:
        raise UnsupportedError(
            f"HQQ chooses zero points of groups within rows, which {grid.qtype} in groups of "
            f"{grid.group} has not; make the scheme asymmetric, with strategy group or channel"
        )
    groups = w.astype(jnp.float32).reshape(n, k // grid.group[1], grid.group[1])
    low, high = (edge[..., None] for edge in extremes(w, grid, zero=False))
    top = grid.span
    inverse = jnp.minimum(top / (high - low), _LARGEST)
    zero = -low * inverse
    if top == 15:  # as the hqq package does with 4 bits
        zero = jnp.round(zero)

    def codes(zero: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(groups * inverse + zero), 0, top)

    def step(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        i, zero, best, _ = state
        q = codes(zero)
        error = groups - (q - zero) / inverse
        size = jnp.abs(error)
        strength = beta * growth**i
        # |e| ** (p - 1) is infinite at 0, where nothing is left to shrink.
        power = jnp.where(size > 0, size, 1) ** (p - 1)
        kept = jnp.sign(error) * jnp.maximum(size - power / strength, 0)
        zero = (q - (groups - kept) * inverse).mean(-1, keepdims=True)
        mean = size.mean()
        return i + 1, zero, jnp.minimum(mean, best), mean < best

    def goes_on(state: tuple[jax.Array, ...]) -> jax.Array:
        return (state[0] < iterations) & state[3]

    start = (jnp.int32(0), zero, jnp.float32(jnp.inf), jnp.bool_(True))
    zero = lax.while_loop(goes_on, step, start)[1][..., 0]
    if not grid.fractional:
        zero = jnp.clip(jnp.round(zero), 0, top)
    return Scales((1 / inverse)[..., 0], zero)
