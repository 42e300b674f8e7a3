"""How many bits each layer gets, so that all of them together take no more than a budget.

Each layer has some grids to choose from, of which more bits lose less. Every step takes the change
that makes up for the most loss a bit; over the lower convex hull of each layer's choices, that is
the best there is for the bits that are used (a Lagrangian relaxation of the knapsack problem). What
is left of the budget in the end goes to the best of the changes that still fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax.compress import grid as grids
from qjax.compress.grid import Grid
from qjax.engine.exact_jit import exact_jit
from qjax.errors import UnsupportedError


class Option(NamedTuple):
    """What a layer may become: bits of storage, with scales and all, and what is then lost."""

    bits: float
    loss: float


@exact_jit(static_argnames=("candidates",))
def losses(
    w: jax.Array,
    moment: jax.Array,
    candidates: tuple[Grid, ...],
    rows: jax.Array | None = None,
) -> jax.Array:
    """What rounding to each of several grids does to a layer's outputs.

    Args:
      w: float32 [N, K], or [E, N, K] of experts, which are added up.
      moment: float32 [K, K] or [E, K, K], second moments E[x x^T] of the inputs.
      rows: float32 [N] or [E, N], how much the squared error of each output counts; such as what
        becomes of it in the residual stream, as a share of what is there. None: all outputs
        alike, as a share of their own energy.

    Returns:
      float32 [candidates].
    """
    stacked = w.ndim == 3
    count = w if stacked else w[None]
    moments = moment if stacked else moment[None]
    weights = jnp.ones(count.shape[:2]) if rows is None else rows.reshape(count.shape[:2])

    def energy(change: jax.Array, moment: jax.Array, rows: jax.Array) -> jax.Array:
        through = jnp.matmul(change, moment, precision="high")
        return ((through * change).sum(-1) * rows).sum()

    def one(part: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        w, moment, rows = part
        changes = (w - grids.rounded(w, grids.minmax(w, grid), grid) for grid in candidates)
        lost = [energy(change, moment, rows) for change in changes]
        return jnp.stack([*lost, energy(w, moment, rows)])

    total = lax.map(one, (count, moments, weights)).sum(0)
    return total[:-1] if rows is not None else total[:-1] / jnp.maximum(total[-1], 1e-30)


def allotted(
    options: Mapping[str, Sequence[Option]],
    weights: Mapping[str, int],
    target_bits: float,
    tied: Sequence[Sequence[str]] = (),
) -> dict[str, int]:
    """Which of its options each layer gets.

    Args:
      options: of each layer by name.
      weights: numbers of weights, by the same names.
      target_bits: bits a weight that all layers together may take, on the average.
      tied: layers that get the same option, which they have as many of; runtimes that join q, k and
        v into one product, or gate and up, want these alike.

    Returns:
      name -> index into its options.

    Raises:
      UnsupportedError: the smallest options take more.
    """
    units = [tuple(group) for group in tied]
    joined = {name for unit in units for name in unit}
    units += [(name,) for name in options if name not in joined]
    choices = [
        [
            Option(sum(o.bits for o in same), sum(o.loss for o in same))
            for same in zip(*(options[name] for name in unit), strict=True)
        ]
        for unit in units
    ]
    budget = target_bits * sum(weights[name] for name in options)
    chosen = [min(range(len(each)), key=lambda i: each[i].bits) for each in choices]
    used = sum(each[i].bits for each, i in zip(choices, chosen, strict=True))
    if used > budget * (1 + 1e-9):
        least = used / sum(weights[name] for name in options)
        raise UnsupportedError(
            f"target_bits {target_bits} is less than the smallest types take with their scales, "
            f"{least:.3f} bits a weight; ask for more, or take larger groups"
        )
    while True:
        best = None
        for unit, (each, i) in enumerate(zip(choices, chosen, strict=True)):
            for j, option in enumerate(each):
                more, gain = option.bits - each[i].bits, each[i].loss - option.loss
                if gain <= 0 or used + more > budget * (1 + 1e-9):
                    continue
                rate = gain / more if more > 0 else float("inf")
                if best is None or rate > best[0]:
                    best = rate, unit, j, more
        if best is None:
            break
        _, unit, chosen[unit], more = best
        used += more
    return {name: chosen[i] for i, unit in enumerate(units) for name in unit}
