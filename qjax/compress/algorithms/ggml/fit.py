"""Scales, and minima, that make the weighted squared error of a group of codes small.

Weights are x ~ s * q, or s * q - m, where q is the nearest of the numbers that a code can be. For
given q, the best s and m are a least squares fit; for given s and m, the best q is the nearest. A
group is searched from several starts, each fitted once, and the best one is then improved by
turns. Where groups share a larger block, their scales are themselves rounded to a few bits of one
float16: these integers are chosen by the error they lead to, and the float16 is fitted to all
groups of the block at once.

All functions are plain jax.numpy on float32 arrays, weights `x` and importances `w` of the same
shape [..., elements of a group]; scales have a last axis of 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = Any
Nearest = Callable[[Array], Array]  # numbers of any size to the nearest that codes stand for


def integers(low: int, high: int) -> Nearest:
    """Codes that stand for the integers from `low` to `high`."""
    return lambda y: jnp.clip(jnp.round(y), low, high)


def inverse(scale: Array) -> Array:
    """1 / scale, and 0 for scales of 0."""
    return jnp.where(scale == 0, 0, 1 / jnp.where(scale == 0, 1, scale))


def ratio(dividend: Array, divisor: Array, otherwise: Array) -> Array:
    """dividend / divisor, or another value where the divisor is 0."""
    return jnp.where(divisor > 0, dividend / jnp.where(divisor > 0, divisor, 1), otherwise)


def summed(values: Array, axes: int | tuple[int, ...] = -1) -> Array:
    if axes == -1 and values.shape[-1] >= 32:
        # As a product, which a CPU does with vectors; XLA's own sums go number by number.
        # Of fewer numbers that gains nothing.
        ones = np.ones((values.shape[-1], 1), np.float32)
        return jnp.matmul(values, ones, precision="highest")
    return values.sum(axes, keepdims=True)


def rounded_half(values: Array) -> Array:
    """As float16 stores them."""
    return values.astype(jnp.float16).astype(jnp.float32)


# --- groups by themselves ---------------------------------------------------------------------


def scale(
    x: Array,
    w: Array,
    nearest: Nearest,
    starts: np.ndarray,
    *,
    turns: int = 2,
    half: bool = False,
    positive: bool = False,
) -> Array:
    """The scale of each group.

    Args:
      starts: what to divide each group's number of the largest magnitude by, to begin with.
      turns: how often the best is improved.
      half: it must be a float16.
      positive: it may not be below 0.
    """
    largest = jnp.where(x.max(-1, keepdims=True) > -x.min(-1, keepdims=True), 1, -1)
    largest = jnp.abs(x).max(-1, keepdims=True) * (1 if positive else largest)
    stored = rounded_half if half else lambda s: s

    def tried(best: tuple[Array, Array], s: Array) -> tuple[Array, Array]:
        """The better of the best and the scale that suits the codes that `s` leads to."""
        q = nearest(x * inverse(s))
        s = ratio(summed(w * x * q), summed(w * q * q), s)
        s = stored(jnp.maximum(s, 0) if positive else s)
        e = summed(w * jnp.square(s * q - x))
        return jnp.where(e < best[1], s, best[0]), jnp.minimum(e, best[1])

    def turn(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        return tried(best, jnp.where(i < len(starts), largest * factors[i], best[0]))

    factors = jnp.asarray(np.append(1 / starts, np.zeros(turns)), jnp.float32)
    none = jnp.zeros_like(largest), jnp.full_like(largest, jnp.inf)
    return jax.lax.fori_loop(0, len(factors), turn, none)[0]


class Affine(NamedTuple):
    """x ~ scale * q - minimum."""

    scale: Array
    minimum: Array


def affine(
    x: Array, w: Array, highest: int, starts: np.ndarray, *, turns: int = 2, free: bool = False
) -> Affine:
    """The scale and minimum of each group, with codes from 0 to `highest`.

    Args:
      starts: [n, 2], by how much of its width each group's range is cut at its low and at its high
        end, to begin with.
      turns: how often the best is improved.
      free: the minimum may have any sign and both are float16; else neither is below 0.
    """
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    low = low if free else jnp.minimum(low, 0)
    nearest, total = integers(0, highest), summed(w)
    mean = summed(w * x) * inverse(total)
    centred = w * (x - mean)
    stored = rounded_half if free else lambda s: s

    def fitted(q: Array, otherwise: Array) -> tuple[Array, Array]:
        q_mean = summed(w * q) * inverse(total)
        slope = ratio(summed(centred * q), summed(w * jnp.square(q - q_mean)), otherwise)
        m = slope * q_mean - mean
        if free:
            return slope, m
        through_zero = ratio(summed(w * x * q), summed(w * q * q), otherwise)
        return jnp.maximum(jnp.where(m < 0, through_zero, slope), 0), jnp.maximum(m, 0)

    def tried(best: tuple[Array, Array, Array], s: Array, m: Array) -> tuple[Array, Array, Array]:
        q = nearest((x + m) * inverse(s))
        s, m = map(stored, fitted(q, s))
        e = summed(w * jnp.square(s * q - m - x))
        better = e < best[2]
        return (
            jnp.where(better, s, best[0]),
            jnp.where(better, m, best[1]),
            jnp.minimum(e, best[2]),
        )

    width = high - low

    def turn(i: Array, best: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        s = width * ((1 - cuts[i, 0] - cuts[i, 1]) / highest)
        m = -(low + cuts[i, 0] * width)
        first = i < len(starts)
        return tried(best, jnp.where(first, s, best[0]), jnp.where(first, m, best[1]))

    cuts = jnp.asarray(np.concatenate([starts, np.zeros((turns, 2))]), jnp.float32)
    none = jnp.zeros_like(low), -low, jnp.full_like(low, jnp.inf)
    return Affine(*jax.lax.fori_loop(0, len(cuts), turn, none)[:2])


def cuts(each: tuple[float, ...], highest: int) -> np.ndarray:
    """[n, 2] starts of `affine`: each at both ends; and wider by one step, so that an even number
    of steps is among the widths, which numbers that lie on a coarser grid often need."""
    step = -1 / (highest - 1)
    return np.array([*((a, b) for a in each for b in each), (0, step), (step, 0)])


# --- groups that share a block: x, w [..., groups, elements] ------------------------------------


class Block(NamedTuple):
    """float16 d [..., 1, 1], and integers [..., groups, 1] that multiply it."""

    d: Array
    scales: Array


def shared_scale(
    x: Array,
    w: Array,
    s: Array,
    nearest: Nearest,
    bounds: tuple[float, float],
    *,
    starts: np.ndarray,
    turns: int,
    unit: float = 1,
) -> Block:
    """Scales d * i for every group, where i is an integer within `bounds`; or, with bounds between
    two integers, where i is halfway between two.

    Args:
      s: the scales that groups would have by themselves.
      starts: what the largest of them may be an integer of, to begin with.
      turns: how often integers and d are fitted to each other, from each start.
      unit: d times this is the float16.
    """
    low, high = bounds
    between = low % 1
    peak = jnp.where(s.max(-2, keepdims=True) > -s.min(-2, keepdims=True), 1, -1)
    peak = peak * jnp.abs(s).max(-2, keepdims=True)

    def turn(state: tuple[Array, Array, Block, Array]) -> tuple[Array, Array, Block, Array]:
        d, wanted, best, least = state
        d = rounded_half(d * unit) * (1 / unit)
        centre = jnp.round(wanted * inverse(d) - between) + between

        def neighbour(n: Array, chosen: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            i, q, e = chosen
            tried = jnp.clip(centre + (n - 1), low, high)
            nearby = nearest(x * inverse(d * tried))
            found = summed(w * jnp.square(d * tried * nearby - x))
            better = found < e
            return jnp.where(better, tried, i), jnp.where(better, nearby, q), jnp.minimum(found, e)

        none = jnp.zeros_like(s), jnp.zeros_like(x), jnp.full_like(s, jnp.inf)
        i, q, e = jax.lax.fori_loop(0, 3, neighbour, none)
        total = summed(e, -2)
        better = total < least
        best = Block(jnp.where(better, d, best.d), jnp.where(better, i, best.scales))
        a = i * q
        both = (-2, -1)
        refitted = ratio(summed(w * x * a, both), summed(w * a * a, both), d)
        return refitted, d * i, best, jnp.minimum(total, least)

    factors = jnp.asarray(1 / starts, jnp.float32)

    def from_start(n: Array, state: tuple[Block, Array]) -> tuple[Block, Array]:
        start = (peak * factors[n], s, *state)
        return jax.lax.fori_loop(0, turns, lambda _, state: turn(state), start)[2:]

    none = Block(jnp.zeros_like(peak), jnp.zeros_like(s)), jnp.full_like(peak, jnp.inf)
    return jax.lax.fori_loop(0, len(starts), from_start, none)[0]


class AffineBlock(NamedTuple):
    """float16 d and dmin [..., 1, 1], and integers [..., groups, 1] that multiply them."""

    d: Array
    dmin: Array
    scales: Array
    minima: Array


def shared_affine(
    x: Array,
    w: Array,
    group: Affine,
    highest: int,
    most: int,
    *,
    starts: np.ndarray,
    turns: int,
) -> AffineBlock:
    """Scales d * i and minima dmin * j for every group, where i and j are from 0 to `most`.

    Args:
      group: what groups would have by themselves.
      highest: of the codes.
      starts: [n, 2], what the largest scale and the largest minimum may be an integer of, to begin
        with.
      turns: as for `shared_scale`.
    """
    nearest, total = integers(0, highest), summed(w)
    peak_s, peak_m = group.scale.max(-2, keepdims=True), group.minimum.max(-2, keepdims=True)

    def codes(scale: Array, minimum: Array) -> Array:
        return nearest((x + minimum) * inverse(scale))

    def turn(state: Any) -> Any:
        d, dmin, s, m, best, least = state
        d, dmin = rounded_half(d), rounded_half(dmin)
        centre = jnp.round(s * inverse(d))

        def neighbour(n: Array, chosen: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            i, j, e = chosen
            tried = jnp.clip(centre + (n - 1), 0, most)
            scale = d * tried
            # The minimum that suits this scale, by the codes that the last one leads to.
            wanted = summed(w * (scale * codes(scale, m) - x)) * inverse(total)
            minimum = jnp.clip(jnp.round(wanted * inverse(dmin)), 0, most)
            found = summed(
                w * jnp.square(scale * codes(scale, dmin * minimum) - dmin * minimum - x)
            )
            better = found < e
            i, j = jnp.where(better, tried, i), jnp.where(better, minimum, j)
            return i, j, jnp.minimum(found, e)

        none = jnp.zeros_like(s), jnp.zeros_like(s), jnp.full_like(s, jnp.inf)
        i, j, e = jax.lax.fori_loop(0, 3, neighbour, none)
        sum_e = summed(e, -2)
        better = sum_e < least
        best = AffineBlock(
            *(jnp.where(better, new, old) for new, old in zip((d, dmin, i, j), best, strict=True))
        )
        a = i * codes(d * i, dmin * j)
        both = (-2, -1)
        aa, ab, bb = summed(w * a * a, both), summed(w * a * j, both), summed(total * j * j, -2)
        xa, xb = summed(w * x * a, both), summed(w * x * j, both)
        det = aa * bb - ab * ab
        sound = det > 1e-6 * aa * bb
        det = jnp.where(sound, det, 1)
        new_d = jnp.where(sound, (xa * bb - xb * ab) / det, ratio(xa + dmin * ab, aa, d))
        new_dmin = jnp.where(sound, (xa * ab - xb * aa) / det, dmin)
        usable = (new_d > 0) & (new_dmin >= 0)
        new_d, new_dmin = jnp.where(usable, new_d, d), jnp.where(usable, new_dmin, dmin)
        return new_d, new_dmin, d * i, dmin * j, best, jnp.minimum(sum_e, least)

    factors = jnp.asarray(1 / starts, jnp.float32)

    def from_start(n: Array, state: tuple[AffineBlock, Array]) -> tuple[AffineBlock, Array]:
        start = (peak_s * factors[n, 0], peak_m * factors[n, 1], group.scale, group.minimum)
        return jax.lax.fori_loop(0, turns, lambda _, state: turn(state), (*start, *state))[4:]

    zero, none = jnp.zeros_like(peak_s), jnp.zeros_like(group.scale)
    first = AffineBlock(zero, zero, none, none), jnp.full_like(zero, jnp.inf)
    return jax.lax.fori_loop(0, len(starts), from_start, first)[0]
