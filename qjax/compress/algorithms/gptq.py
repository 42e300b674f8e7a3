"""GPTQ: columns are rounded one after the other, and those that follow make up for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (arXiv:2210.17323). Minimized is trace(D M D^T) for the change D of the weight, where
M is the second moment of its inputs (`statistics.InputStats`). A second pass can go on from there:
with all other columns as they are, each is rounded anew to where the error is least (coordinate
descent, Behdin et al., "QuantEase", arXiv:2309.01885), and scales are fitted to the codes by least
squares; neither makes the error larger.

Everything here has columns first, [K, N]: a step then works on whole rows of memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax.compress.grid import Grid, Scales, nearest, nearest_scale, spread, values
from qjax.compress.scale_search import searched
from qjax.engine.exact_jit import exact_jit

BLOCK = 128  # columns between two updates of all that follow


class Rounded(NamedTuple):
    """What became of a weight [N, K].

    Attributes:
      codes: float32 [N, K], as `grid.encoded` takes them.
      scales: of them.
      order: int32 [K], the column of the weight that each column of `codes` is; None for as they
        were.
    """

    codes: jax.Array
    scales: Scales
    order: jax.Array | None = None


@exact_jit()
def relative_error(weight: jax.Array, rounded: jax.Array, moment: jax.Array) -> jax.Array:
    """trace(D M D^T) / trace(W M W^T), float32 []: what the outputs lose."""

    def energy(w: jax.Array) -> jax.Array:
        return jnp.sum(jnp.matmul(w, moment, precision="highest") * w)

    return energy(weight - rounded) / jnp.maximum(energy(weight), jnp.finfo(jnp.float32).tiny)


@exact_jit(static_argnames=("grid", "actorder", "block_size", "sweeps"))
def gptq(
    weight: jax.Array,
    moment: jax.Array,
    grid: Grid,
    *,
    absmax: jax.Array | None = None,
    actorder: str | None = "weight",
    dampening: float = 0.01,
    block_size: int = BLOCK,
    sweeps: int = 0,
) -> Rounded:
    """Rounds a weight so that its outputs change little.

    Args:
      weight: float32 [N, K].
      moment: float32 [K, K], the mean of x x^T over its inputs. Columns whose inputs are always 0
        become 0.
      grid: what it may be.
      absmax: see `grid.minmax`.
      actorder: None: columns are rounded in their order. "weight": those of the largest inputs
        first, but group by group, these too in the order of their largest inputs. "group": those of
        the largest inputs first, and columns that follow each other in that order share a scale
        (which takes a "perm" in the QArray). The scale of a group is found when it is reached.
      dampening: of the mean of the diagonal of the moment, added to all of it.
      block_size: columns that are rounded before those behind them are corrected all at once, where
        no groups are.
      sweeps: so many times, all columns are rounded anew and all scales fitted.

    Returns:
      Codes that are not finite where the moment is so far from positive definite that it takes more
      dampening.
    """
    (n, k), (rows, group) = weight.shape, grid.group
    diagonal = jnp.diag(moment)
    dead = diagonal == 0
    hessian = moment + jnp.diag(jnp.where(dead, 1, dampening * diagonal.mean()))
    weight = jnp.where(dead, 0, weight)
    absmax = jnp.abs(weight).max() if absmax is None else absmax
    grouped = rows == 1 and group < k
    # One scale for all columns is the same in whichever order.
    order = _order(diagonal, group if grouped else k, actorder)
    columns, hessian = weight.T[order], hessian[order][:, order]
    if grouped:
        codes, scales = _by_groups(columns, hessian, replace(grid, group=(1, group)), absmax)
    else:
        scales = searched(weight, grid, diagonal, absmax)
        each = spread(scales, grid, (n, k))
        zero = None if each.zero is None else each.zero.T[order]
        codes = _by_blocks(columns, hessian, each.scale.T[order], zero, grid, block_size)
    back = jnp.argsort(order)
    if grouped and actorder == "weight":
        scales = _take_groups(scales, back[::group] // group)
    if grouped and actorder == "group":
        inside, back = hessian, jnp.arange(k)
    else:
        codes, columns = codes[back], columns[back]
        inside = hessian[back][:, back]
    if sweeps and rows == 1:
        codes, scales = descend(columns, inside, codes, scales, grid, sweeps)
    return Rounded(codes.T, scales, order if grouped and actorder == "group" else None)


def _order(diagonal: jax.Array, group: int, actorder: str | None) -> jax.Array:
    """The columns in the order in which they are rounded, int32 [K]."""
    if actorder is None:
        return jnp.arange(len(diagonal))
    if actorder == "weight":
        parts = diagonal.reshape(-1, group)
        inside = jnp.argsort(-parts, axis=1) + jnp.arange(len(parts))[:, None] * group
        return inside[jnp.argsort(-parts.max(1))].reshape(-1)
    return jnp.argsort(-diagonal)


def _take_groups(scales: Scales, order: jax.Array) -> Scales:
    scale, zero = (None if a is None else a[:, order] for a in scales[:2])
    return Scales(scale, zero, scales.global_scale)


def _inverse_root(hessian: jax.Array) -> jax.Array:
    """The upper triangular U with U^T U = H^-1, whose row i tells how the columns behind i make up
    for an error in i."""
    lower = jnp.linalg.cholesky(hessian[::-1, ::-1])
    upper = lower[::-1, ::-1]  # H = upper upper^T
    return lax.linalg.triangular_solve(
        upper, jnp.eye(len(hessian), dtype=upper.dtype), left_side=True, lower=False
    )


def _round_block(
    columns: jax.Array, root: jax.Array, scale: jax.Array, zero: jax.Array | None, grid: Grid
) -> tuple[jax.Array, jax.Array]:
    """Codes of some columns [B, N], and by what each must be made up for, [B, N]; `root` [B, B] and
    scales [B, N] are theirs."""
    after = jnp.triu(root, 1)

    def step(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        columns, codes, errors = state
        now, s, z = columns[i], scale[i], None if zero is None else zero[i]
        code = nearest(now, s, z, grid)
        error = (now - values(code, s, z, grid)) / root[i, i]
        columns = columns - after[i][:, None] * error
        return columns, codes.at[i].set(code), errors.at[i].set(error)

    empty = jnp.zeros_like(columns)
    return lax.fori_loop(0, len(columns), step, (columns, empty, empty))[1:]


def _by_blocks(
    columns: jax.Array,
    hessian: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    grid: Grid,
    size: int,
) -> jax.Array:
    """Codes [K, N] with scales [K, N] that are known."""
    k = len(columns)
    size = min(size, k)
    root = _inverse_root(hessian)
    missing = -k % size
    columns, scale = (
        jnp.pad(a, ((0, missing), (0, 0)), constant_values=1) for a in (columns, scale)
    )
    zero = None if zero is None else jnp.pad(zero, ((0, missing), (0, 0)))
    root = jnp.pad(root, ((0, missing), (0, missing))) + jnp.diag(
        (jnp.arange(k + missing) >= k).astype(root.dtype)
    )

    def step(block: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        columns, codes = state
        now, s = (_rows(a, block, size) for a in (columns, scale))
        z = None if zero is None else _rows(zero, block, size)
        found, errors = _round_block(
            now, _rows(_rows(root, block, size).T, block, size).T, s, z, grid
        )
        columns = _correct(columns, root, errors, block, size)
        return columns, lax.dynamic_update_slice(codes, found, (block * size, 0))

    codes = lax.fori_loop(0, len(columns) // size, step, (columns, jnp.zeros_like(columns)))[1]
    return codes[:k]


def _by_groups(
    columns: jax.Array, hessian: jax.Array, grid: Grid, absmax: jax.Array
) -> tuple[jax.Array, Scales]:
    """Codes [K, N], and scales that are found for each group of columns as it is then."""
    k, n = columns.shape
    size = grid.group[1]
    root = _inverse_root(hessian)
    weights = 1 / jnp.square(jnp.diag(root))  # what an error costs that others make up for

    def step(columns: jax.Array, block: jax.Array) -> tuple[jax.Array, Any]:
        now = _rows(columns, block, size)
        scales = searched(now.T, grid, _rows(weights[:, None], block, size)[:, 0], absmax)
        s = jnp.broadcast_to(scales.scale.T, (size, n))
        z = None if scales.zero is None else jnp.broadcast_to(scales.zero.T, (size, n))
        found, errors = _round_block(
            now, _rows(_rows(root, block, size).T, block, size).T, s, z, grid
        )
        return _correct(columns, root, errors, block, size), (found, scales)

    _, (codes, scales) = lax.scan(step, columns, jnp.arange(k // size))
    scale, zero = (None if a is None else a[:, :, 0].T for a in scales[:2])
    whole = None if scales.global_scale is None else scales.global_scale[0]
    return codes.reshape(k, n), Scales(scale, zero, whole)


def _rows(a: jax.Array, block: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(a, block * size, size)


def _correct(
    columns: jax.Array, root: jax.Array, errors: jax.Array, block: jax.Array, size: int
) -> jax.Array:
    """All columns behind a block, made up for its errors. (Those before have no use any more.)"""
    return columns - jnp.matmul(_rows(root, block, size).T, errors, precision="highest")


def descend(
    columns: jax.Array,
    hessian: jax.Array,
    codes: jax.Array,
    scales: Scales,
    grid: Grid,
    sweeps: int,
) -> tuple[jax.Array, Scales]:
    """Codes and scales with no larger error, trace(D H D^T), found one after the other.

    Args:
      columns: float32 [K, N], the weight, columns first; hessian: float32 [K, K].
      codes: float32 [K, N]. scales: [N, groups].
      grid: scales of single rows.
    """
    k = len(columns)
    group = grid.group[1]
    size = group if group <= BLOCK and k % group == 0 else k

    def expand(a: jax.Array) -> jax.Array:
        return jnp.repeat(a.T, group, axis=0)[:k]

    zero = None if scales.zero is None else expand(scales.zero)

    def sweep(_: Any, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        codes, scale = state
        wide = expand(scale)
        now = values(codes, wide, zero, grid)
        slope = jnp.matmul(hessian, columns - now, precision="highest")

        def block(b: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            codes, slope, scale = state
            h = _rows(_rows(hessian, b, size).T, b, size)
            s = _rows(wide, b, size)
            z = None if zero is None else _rows(zero, b, size)
            before = _rows(codes, b, size)
            start = values(before, s, z, grid)

            def column(i: jax.Array, inner: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                held, local = inner
                old = values(held[i], s[i], None if z is None else z[i], grid)
                code = nearest(old + local[i] / h[i, i], s[i], None if z is None else z[i], grid)
                new = values(code, s[i], None if z is None else z[i], grid)
                return held.at[i].set(code), local + h[:, i][:, None] * (old - new)

            found, local = lax.fori_loop(0, size, column, (before, _rows(slope, b, size)))
            if group == size:
                plain = values(found, jnp.ones_like(s), z, grid)
                curve = jnp.sum(plain * jnp.matmul(h, plain, precision="highest"), 0)
                wanted = s[0] + jnp.sum(plain * local, 0) / jnp.where(curve > 0, curve, 1)
                fitted = nearest_scale(jnp.where(wanted * s[0] > 0, wanted, s[0]), scales, grid)
                # Rounding the scale may take more than fitting it gave.
                step = fitted - s[0]
                gain = 2 * step * jnp.sum(plain * local, 0) - step * step * curve
                s = jnp.where(gain > 0, fitted, s[0])[None] * jnp.ones_like(s)
                scale = lax.dynamic_update_slice(scale, s[:1].T, (0, b))
            change = start - values(found, s, z, grid)
            across = _rows(hessian, b, size).T
            slope = slope + jnp.matmul(across, change, precision="highest")
            return lax.dynamic_update_slice(codes, found, (b * size, 0)), slope, scale

        codes, _, scale = lax.fori_loop(0, k // size, block, (codes, slope, scale))
        return codes, scale

    codes, scale = lax.fori_loop(0, sweeps, sweep, (codes, scales.scale))
    return codes, scales._replace(scale=scale)
