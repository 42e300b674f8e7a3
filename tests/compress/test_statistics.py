"""Statistics of inputs against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from qjax.compress import statistics


def check(found: statistics.InputStats, rows: np.ndarray) -> None:
    rows = rows.astype(np.float64)
    np.testing.assert_allclose(found.moment, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.absmean, np.abs(rows).mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.absmax, np.abs(rows).max(0), rtol=1e-6)
    np.testing.assert_allclose(found.low, np.minimum(rows.min(0), 0), rtol=1e-6)
    np.testing.assert_allclose(found.high, np.maximum(rows.max(0), 0), rtol=1e-6)
    assert float(found.rows) == len(rows)


def test_of_parts_and_scaled() -> None:
    x = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    parts = [statistics.of_rows(jnp.asarray(part)) for part in (x[:7], x[7:])]
    found = statistics.merge(*parts)
    check(found, x)
    by = np.linspace(0.5, 3, 8).astype(np.float32)
    check(statistics.scaled(found, jnp.asarray(by)), x * by)


def test_of_experts() -> None:
    x = np.random.default_rng(1).normal(size=(20, 8)).astype(np.float32)
    found = statistics.of_experts(jnp.asarray(x), jnp.array([5, 0, 15], jnp.int32))
    check(jax.tree.map(lambda a: a[0], found), x[:5])
    check(jax.tree.map(lambda a: a[2], found), x[5:])
    assert float(found.rows[1]) == 0
    again = statistics.merge(found, statistics.of_experts(jnp.asarray(x), jnp.array([0, 20, 0])))
    check(jax.tree.map(lambda a: a[1], again), x)
