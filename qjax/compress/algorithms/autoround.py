"""AutoRound: which way each weight is rounded, and the ranges, are learned from a layer's outputs.

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs"
(arXiv:2309.05516). To each weight, in units of its scale, an offset is added before it is rounded,
and each range is multiplied by a factor; gradients pass straight through the rounding. Steps become
smaller linearly, from 1 / iterations on. Two things differ from the paper, as they lose less in as
many steps: learning starts from codes and scales that another method found, and a step has the size
of the mean gradient over its spread (Kingma and Ba, arXiv:1412.6980), not of its sign alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax.compress.grid import Grid, Scales, nearest_scale, spread, values

# Of the paper's step size, that of offsets and that of the factors of ranges.
_OFFSETS, _RANGES = 0.5, 0.1
_REACH = 1.0  # of offsets
_FACTORS = (0.5, 1.5)  # of ranges
_MEAN, _SPREAD = 0.9, 0.95  # what remains of the running means of gradients and of their squares


class Start(NamedTuple):
    """Where learning starts from, of a weight [N, K].

    Attributes:
      points: float32 [N, K], the weight in units of `scale`, near its codes.
      scale: float32 [groups of rows, groups of columns].
      zero: like scale, the code that means 0; None in a symmetric grid.
    """

    points: jax.Array
    scale: jax.Array
    zero: jax.Array | None


class Learned(NamedTuple):
    """What is learned of a weight.

    Attributes:
      offsets: float32 [N, K], added to points before they are rounded.
      high: float32 [groups of rows, groups of columns], a factor of the range above 0; in a
        symmetric grid, of the scale.
      low: like high, of the range below 0; None in a symmetric grid.
    """

    offsets: jax.Array
    high: jax.Array
    low: jax.Array | None


def start(w: jax.Array, codes: jax.Array, scales: Scales, grid: Grid) -> tuple[Start, Learned]:
    """From a weight float32 [N, K] and codes and scales of it.

    What comes of `rounded` with these are the codes and scales that were given.
    """
    n, k = w.shape
    each = spread(scales, grid, (n, k))
    one = jnp.ones_like(each.scale)
    plain = values(codes, one, each.zero, grid)
    points = plain + _folded(w / each.scale - plain)
    factor = jnp.ones_like(scales.scale)
    low = None if scales.zero is None else factor
    return Start(points, scales.scale, scales.zero), Learned(jnp.zeros_like(w), factor, low)


def _folded(away: jax.Array) -> jax.Array:
    """How far from its code a weight starts, at most half: one that is nearer to another code is as
    far from the border as it was, on this side of it. (Were it put on the border, it would change
    at the first step, with all others there.)"""
    size = jnp.abs(away)
    return jnp.sign(away) * jnp.clip(jnp.minimum(size, 1 - size), 0, 0.5 - 1e-3)


def rounded(start: Start, learned: Learned, grid: Grid) -> tuple[jax.Array, Scales]:
    """Codes float32 [N, K] as `grid.encoded` takes them, and their scales; with the gradients that
    there would be without rounding."""
    bottom, span = _codes(grid)
    if learned.low is None or start.zero is None:
        scale, zero = _held(start.scale * learned.high, grid), None
    else:
        below = -start.zero * start.scale * learned.low
        above = (span - start.zero) * start.scale * learned.high
        scale = _held((above - below) / span, grid)
        zero = jnp.clip(_through(jnp.round, -below / scale), 0, span)
    scales = Scales(scale, zero)
    n, k = start.points.shape
    each = spread(scales, grid, (n, k))
    before = spread(Scales(start.scale), grid, (n, k)).scale
    points = _through(jnp.round, start.points * (before / each.scale) + learned.offsets)
    middle = bottom if each.zero is None else each.zero
    free = points + middle
    held = jnp.clip(free, *_ends(grid))
    # At the ends themselves, the gradient of a clip is a half.
    return jnp.where(free == held, free, held), scales


def dense(start: Start, learned: Learned, grid: Grid) -> jax.Array:
    """The values, float32 [N, K], of `rounded`."""
    n, k = start.points.shape
    codes, scales = rounded(start, learned, grid)
    each = spread(scales, grid, (n, k))
    return values(codes, each.scale, each.zero, grid)


def _codes(grid: Grid) -> tuple[int, int]:
    """The code that means 0 in a symmetric grid, and the largest code less the smallest."""
    return (0 if grid.qtype == "int8" else grid.half), 2 * grid.half - 1


def _ends(grid: Grid) -> tuple[int, int]:
    """The smallest and the largest code."""
    return (-grid.half, grid.half - 1) if grid.qtype == "int8" else (0, 2 * grid.half - 1)


def _held(scale: jax.Array, grid: Grid) -> jax.Array:
    """Scales as they are stored, with the gradient of those before."""
    return _through(lambda s: nearest_scale(s, Scales(s), grid), scale)


def _through(f: Any, x: jax.Array) -> jax.Array:
    """f(x), with the gradient of x itself."""
    return x + lax.stop_gradient(f(x) - x)


class Moments(NamedTuple):
    """Running means of gradients and of their squares, each like what is learned."""

    mean: Any
    square: Any


def no_moments(learned: Any) -> Moments:
    """In front of the first step."""
    zero = jax.tree.map(jnp.zeros_like, learned)
    return Moments(zero, zero)


def step(
    learned: Any, gradients: Any, moments: Moments, number: jax.Array, size: jax.Array
) -> tuple[Any, Moments]:
    """Learned, a tree with `Learned`s in it, after one step.

    Args:
      gradients: like learned.
      number: int32 [], of the step, from 0.
      size: float32 [], the paper's.
    """
    mean = jax.tree.map(lambda m, g: _MEAN * m + (1 - _MEAN) * g, moments.mean, gradients)
    square = jax.tree.map(
        lambda m, g: _SPREAD * m + (1 - _SPREAD) * g * g, moments.square, gradients
    )
    tiny = jnp.finfo(jnp.float32).tiny

    def direction(m: jax.Array, s: jax.Array) -> jax.Array:
        spread = jnp.sqrt(s / (1 - _SPREAD ** (number + 1.0)))
        return m / (1 - _MEAN ** (number + 1.0)) / jnp.maximum(spread, tiny)

    ways = jax.tree.map(direction, mean, square)

    def moved(now: Learned, way: Learned) -> Learned:
        def factor(x: jax.Array | None, d: jax.Array | None) -> jax.Array | None:
            return None if x is None or d is None else jnp.clip(x - _RANGES * size * d, *_FACTORS)

        offsets = jnp.clip(now.offsets - _OFFSETS * size * way.offsets, -_REACH, _REACH)
        high = factor(now.high, way.high)
        assert high is not None
        return Learned(offsets, high, factor(now.low, way.low))

    moves = jax.tree.map(moved, learned, ways, is_leaf=lambda x: isinstance(x, Learned))
    return moves, Moments(mean, square)
