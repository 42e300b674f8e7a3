"""GPTQ against the algorithm as the paper states it, in float64."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.compress import grid as grids
from qjax.compress.algorithms.gptq import Rounded, descend, gptq, relative_error
from qjax.compress.grid import Grid
from qjax.scheme import QuantizationArgs

N, K, GROUP = 24, 64, 16
CHANNEL = Grid.of(QuantizationArgs(4, strategy="channel"), (N, K))
GROUPS = Grid.of(QuantizationArgs(4, group_size=GROUP), (N, K))
ASYMMETRIC = Grid.of(QuantizationArgs(3, symmetric=False, group_size=GROUP), (N, K))


@pytest.fixture(scope="module")
def case() -> tuple[np.ndarray, np.ndarray]:
    """A weight, and the second moment of inputs that depend on each other and differ in size."""
    random = np.random.default_rng(7)
    mix = random.normal(size=(K, K)) * np.exp(random.normal(size=K))
    x = random.normal(size=(4 * K, K)) @ mix
    return random.normal(size=(N, K)).astype(np.float32), (x.T @ x / len(x)).astype(np.float32)


def values_of(found: Rounded, grid: Grid) -> np.ndarray:
    """The weight, columns in their usual order."""
    each = grids.spread(found.scales, grid, (N, K))
    rounded = np.asarray(grids.values(found.codes, each.scale, each.zero, grid))
    if found.order is None:
        return rounded
    usual = np.empty_like(rounded)
    usual[:, np.asarray(found.order)] = rounded
    return usual


def loss(weight: np.ndarray, rounded: np.ndarray, moment: np.ndarray) -> float:
    change = np.asarray(weight, np.float64) - np.asarray(rounded, np.float64)
    return float(np.trace(change @ moment.astype(np.float64) @ change.T))


def paper(
    weight: np.ndarray, moment: np.ndarray, scale: np.ndarray, dampening: float
) -> np.ndarray:
    """Frantar et al., algorithm 1, column by column, with scales that are given: values."""
    hessian = moment.astype(np.float64) + dampening * np.diag(moment).mean() * np.eye(K)
    root = np.linalg.cholesky(np.linalg.inv(hessian)).T
    left, out = weight.astype(np.float64), np.empty((N, K))
    for j in range(K):
        codes = np.clip(np.rint(left[:, j] / scale[:, 0]), -8, 7)
        out[:, j] = codes * scale[:, 0]
        error = (left[:, j] - out[:, j]) / root[j, j]
        left[:, j:] -= error[:, None] * root[j, j:]
    return out


@pytest.mark.parametrize("block_size", [7, 64])
def test_is_the_algorithm_of_the_paper(case, block_size: int) -> None:
    weight, moment = case
    found = gptq(weight, moment, CHANNEL, actorder=None, block_size=block_size)
    wanted = paper(weight, moment, np.asarray(found.scales.scale, np.float64), 0.01)
    ours = values_of(found, CHANNEL)
    # Where a column lies half way between two codes, float32 may take the other one.
    assert (np.abs(ours - wanted) < 1e-5).mean() > 0.98
    assert loss(weight, ours, moment) == pytest.approx(loss(weight, wanted, moment), rel=0.01)


@pytest.mark.parametrize("actorder", [None, "weight", "group"])
@pytest.mark.parametrize("grid", [GROUPS, ASYMMETRIC], ids=["symmetric", "asymmetric"])
def test_loses_less_than_nearest(case, grid: Grid, actorder: str | None) -> None:
    weight, moment = case
    plain = grids.rounded(jnp.asarray(weight), grids.minmax(jnp.asarray(weight), grid), grid)
    found = gptq(weight, moment, grid, actorder=actorder)
    swept = gptq(weight, moment, grid, actorder=actorder, sweeps=2)
    losses = [
        loss(weight, each, moment)
        for each in (values_of(swept, grid), values_of(found, grid), np.asarray(plain))
    ]
    assert losses[0] <= losses[1] < 0.6 * losses[2]
    assert (found.order is not None) == (actorder == "group")


def test_descent_never_makes_it_worse(case) -> None:
    weight, moment = (jnp.asarray(a) for a in case)
    scales = grids.minmax(weight, GROUPS)
    each = grids.spread(scales, GROUPS, (N, K))
    codes = grids.nearest(weight, each.scale, each.zero, GROUPS)
    last = loss(case[0], values_of(Rounded(codes, scales), GROUPS), case[1])
    for sweeps in (1, 2, 5):
        columns, new = descend(weight.T, moment, codes.T, scales, GROUPS, sweeps)
        found = loss(case[0], values_of(Rounded(columns.T, new), GROUPS), case[1])
        assert found < last
        last = found


def test_columns_that_are_always_zero_become_zero(case) -> None:
    weight, moment = case
    moment = moment.copy()
    moment[5] = moment[:, 5] = 0
    rounded = values_of(gptq(weight, moment, GROUPS), GROUPS)
    assert (rounded[:, 5] == 0).all()
    assert np.isfinite(rounded).all()


def test_relative_error(case) -> None:
    weight, moment = case
    rounded = np.round(weight)
    whole = loss(weight, 0 * weight, moment)
    found = relative_error(jnp.asarray(weight), jnp.asarray(rounded), jnp.asarray(moment))
    assert float(found) == pytest.approx(loss(weight, rounded, moment) / whole, rel=1e-4)
