"""AWQ (arXiv:2306.00978): columns with large inputs are scaled up before weights are rounded.

Linear layers that read the same inputs x compute W x = (W s) (x / s), and rounding W s instead of W
moves the error from the columns where inputs are large to those where they are small. The scale is
chosen by what it does to the outputs: with D the error of a weight and M = E[x x^T] the second
moments of its inputs, E|D x|^2 = trace(D M D^T), which takes neither samples nor runs of the model.

The candidates of AutoAWQ and LLM Compressor, powers of the mean input over powers of the mean
weight, come first. Then comes the best scale under the usual model of rounding, errors that are
independent and evenly spread over a step: there the loss of a group is

    sum over rows n of (max_j |w_nj| s_j)^2 * sum_j M_jj / s_j^2,

a convex function of log s, which a few steps of gradient descent bring down. What is taken is the
best of all by trace(D M D^T).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax.compress import grid as grids
from qjax.compress.grid import Grid
from qjax.compress.mappings import Scaling
from qjax.compress.scale_search import searched
from qjax.engine.exact_jit import exact_jit
from qjax.errors import UnsupportedError


class Reader(NamedTuple):
    """A linear layer that reads the inputs, or its experts.

    Attributes:
      weight: float32 [N, K] or [E, N, K].
      moment: float32 [K, K] or [E, K, K], second moments of its inputs.
      rows: float32 [N] or [E, N], how much the squared error of each output counts; or None.
    """

    weight: jax.Array
    moment: jax.Array
    rows: jax.Array | None = None


class Found(NamedTuple):
    """A scale float32 [C] of channels, and the loss with it and without any."""

    scale: jax.Array
    loss: jax.Array
    before: jax.Array


def candidates(duo_scaling: bool | str, n_grid: int) -> list[tuple[float, bool]]:
    """(power of the inputs, whether weights have a part in it) of all that LLM Compressor tries."""
    if duo_scaling == "both":
        half = max(n_grid // 2, 2)
        return [(i / (half - 1), duo) for i in range(half) for duo in (False, True)]
    if not duo_scaling:
        return [(i / max(n_grid - 1, 1), False) for i in range(n_grid)]
    return [(0.0, False)] + [(i / max(n_grid - 2, 1), True) for i in range(n_grid - 1)]


def best_scale(
    readers: Sequence[Reader],
    absmean: jax.Array,
    grids_: Sequence[Grid],
    scaling: Scaling,
    duo_scaling: bool | str = True,
    n_grid: int = 20,
    steps: int = 40,
    search: bool = False,
) -> Found:
    """The scale of an output's channels with which its readers lose least by rounding.

    Args:
      readers: those that are quantized.
      absmean: float32 [K], the mean magnitude of the inputs.
      grids_: of the readers, in the same order.
      scaling: says which columns share a channel's scale.
      duo_scaling, n_grid: as in `AWQModifier`.
      steps: of gradient descent; 0 leaves it at what LLM Compressor tries.
      search: whether the scales of groups will be searched for, rather than reach to the extremes.

    Raises:
      UnsupportedError: duo_scaling with one scale for a whole tensor.
    """
    for reader, grid in zip(readers, grids_, strict=True):
        if duo_scaling and grid.group == reader.weight.shape[-2:]:
            raise UnsupportedError(
                "duo_scaling needs scales of channels, groups or blocks, not one of a whole "
                "tensor; set duo_scaling to false"
            )
    pairs = _joined(readers, grids_)
    joined, kinds = tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)
    share = _column_means(joined, kinds, scaling) if duo_scaling else None
    size = scaling.channels(absmean)

    def total(s: jax.Array) -> jax.Array:
        columns = scaling.columns(s)
        return jnp.stack([_loss(reader, grid, columns, search) for reader, grid in pairs]).sum()

    ones = jnp.ones_like(size)
    before = total(ones)
    best = Found(ones, before, before)
    for ratio, with_weights in candidates(duo_scaling, n_grid):
        s = size**ratio
        if share is not None and with_weights:
            s = s / (share ** (1 - ratio) + 1e-4)
        best = _better(best, _balanced(jnp.maximum(s, 1e-4)), total)
    if steps:
        first = jnp.log(best.scale)
        least = _descended(joined, kinds, scaling, first, steps)
        for part in (0.25, 0.5, 0.75, 1.0):
            s = _balanced(jnp.exp(first * (1 - part) + least * part))
            best = _better(best, s, total)
    return best


def _balanced(s: jax.Array) -> jax.Array:
    """With 1 in the middle between the smallest and the largest."""
    s = s / jnp.sqrt(s.max() * s.min())
    return jnp.where(jnp.isfinite(s), s, 1)


def _better(best: Found, s: jax.Array, total: Callable[[jax.Array], jax.Array]) -> Found:
    loss = total(s)
    return Found(s, loss, best.before) if loss < best.loss else best


def _joined(readers: Sequence[Reader], grids_: Sequence[Grid]) -> list[tuple[Reader, Grid]]:
    """Those that differ in their rows alone as one: it takes fewer, larger products."""
    found: list[tuple[Reader, Grid]] = []
    for reader, grid in zip(readers, grids_, strict=True):
        for i, (other, kind) in enumerate(found):
            same = other.moment is reader.moment and (other.rows is None) == (reader.rows is None)
            if same and grid == kind and grid.group[0] == 1 and reader.weight.ndim == 2:
                weight = jnp.concatenate([other.weight, reader.weight])
                rows = None
                if other.rows is not None and reader.rows is not None:
                    rows = jnp.concatenate([other.rows, reader.rows])
                found[i] = Reader(weight, reader.moment, rows), grid
                break
        else:
            found.append((reader, grid))
    return found


def _each_expert(reader: Reader) -> Reader:
    """With a leading axis."""
    if reader.weight.ndim == 3:
        return reader
    rows = None if reader.rows is None else reader.rows[None]
    return Reader(reader.weight[None], reader.moment[None], rows)


_FEW = 8  # steps of a search for scales, likewise
_ENOUGH = 384  # rows of a weight, to tell scales apart


@exact_jit(static_argnames=("grid", "search"))
def _loss(reader: Reader, grid: Grid, columns: jax.Array, search: bool) -> jax.Array:
    """sum over outputs of rows * E|D x|^2, after rounding with these factors of the columns. Of
    large weights whose rows are rounded each for itself, some rows stand for all."""
    n = reader.weight.shape[-2]
    every = max(n // _ENOUGH, 1) if grid.group[0] == 1 and grid.scale != "fp8_e4m3" else 1
    if every > 1:
        rows = None if reader.rows is None else reader.rows[..., ::every]
        reader = Reader(reader.weight[..., ::every, :], reader.moment, rows)

    def one(reader: Reader) -> jax.Array:
        scaled = reader.weight * columns
        if search:
            importance = jnp.diag(reader.moment) / jnp.square(columns)
            scales = searched(scaled, grid, importance, steps=_FEW)
        else:
            scales = grids.minmax(scaled, grid)
        error = grids.rounded(scaled, scales, grid) / columns - reader.weight
        through = jnp.matmul(error, reader.moment, precision="high")
        loss = (through * error).sum(-1)
        return (loss if reader.rows is None else loss * reader.rows).sum()

    return lax.map(one, _each_expert(reader)).sum() * every


@partial(jax.jit, static_argnames=("grids_", "scaling"))
def _column_means(
    readers: tuple[Reader, ...], grids_: tuple[Grid, ...], scaling: Scaling
) -> jax.Array:
    """The mean over rows of |w| / the largest of its group: [C]."""
    total, count = jnp.float32(0), 0
    for reader, grid in zip(readers, grids_, strict=True):

        def one(w: jax.Array, grid: Grid = grid) -> jax.Array:
            w = jnp.abs(w)
            top = grids.Scales(grids.largest(w, grid))
            n, k = w.shape
            return (w / (grids.spread(top, grid, (n, k)).scale + 1e-6)).sum(0)

        weights = _each_expert(reader).weight
        total += lax.map(one, weights).sum(0)
        count += weights.shape[0] * weights.shape[1]
    return scaling.channels(total / count)


@partial(jax.jit, static_argnames=("grids_", "scaling", "steps"))
def _descended(
    readers: tuple[Reader, ...],
    grids_: tuple[Grid, ...],
    scaling: Scaling,
    first: jax.Array,
    steps: int,
) -> jax.Array:
    """log s after `steps` steps of Adam on the model's loss (see the top of this file)."""

    def expected(log_scale: jax.Array) -> jax.Array:
        columns = scaling.columns(jnp.exp(log_scale))
        total = jnp.float32(0)
        for reader, grid in zip(readers, grids_, strict=True):

            def one(reader: Reader, grid: Grid = grid) -> jax.Array:
                spans = jnp.square(grids.largest(reader.weight * columns, grid))
                if reader.rows is not None and grid.group[0] == 1:
                    spans = spans * reader.rows[:, None]
                power = jnp.diagonal(reader.moment) / jnp.square(columns)
                size = grid.group[1]
                power = jnp.pad(power, (0, -len(power) % size)).reshape(-1, size).sum(-1)
                return (spans * power).sum()

            total += lax.map(one, _each_expert(reader)).sum()
        return jnp.log(total)

    def step(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        at, mean, square, best, least = state
        loss, slope = jax.value_and_grad(expected)(at)
        best, least = jnp.where(loss < least, at, best), jnp.minimum(loss, least)
        mean, square = 0.8 * mean + 0.2 * slope, 0.95 * square + 0.05 * slope * slope
        fair = mean / (1 - 0.8 ** (i + 1)), square / (1 - 0.95 ** (i + 1))
        rate = 0.1 * 0.02 ** (i / steps)
        return at - rate * fair[0] / (jnp.sqrt(fair[1]) + 1e-12), mean, square, best, least

    zeros = jnp.zeros_like(first)
    state = (first, zeros, zeros, first, jnp.float32(jnp.inf))
    return lax.fori_loop(0, steps, step, state)[3]
