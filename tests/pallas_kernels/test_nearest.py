"""Every implementation finds the entry that float64 finds among all of a grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.iq_grids import grid
from pallas_kernels.nearest import nearest_level, nearest_vector
from pallas_kernels.unpack import IQ4_CODEBOOK

LEVELS = np.asarray(IQ4_CODEBOOK, np.float32)
# By grid: how many entries near a vector the search of scales looks at.
NEAR = {"iq1": 32, "iq2_xxs": 32, "iq2_xs": 32, "iq2_s": 32, "iq3_xxs": 16, "iq3_s": 16}


def test_levels(implementation: str) -> None:
    y = np.random.default_rng(0).uniform(-150, 150, (3, 7, 11)).astype(np.float32)
    y.flat[:4] = [LEVELS[0], -1e6, 1e6, (LEVELS[3] + LEVELS[4]) / 2]  # a tie: the lower one
    found = jax.jit(lambda y: nearest_level(y, LEVELS))(y)
    expected = LEVELS[np.abs(y[..., None].astype(np.float64) - LEVELS).argmin(-1)]
    np.testing.assert_array_equal(found, expected)


def draw(name: str, *leading: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors that the grid was made for, more or less, and very uneven importances."""
    rng = np.random.default_rng(1)
    entries = grid(name)
    y = rng.standard_normal((*leading, entries.shape[1])) * 0.5 * entries.max()
    w = rng.gamma(0.5, 1, y.shape)
    return (y if name == "iq1" else np.abs(y)).astype(np.float32), w.astype(np.float32)


def distances(y: np.ndarray, w: np.ndarray, entries: np.ndarray) -> np.ndarray:
    return (w * np.square(y.astype(np.float64) - entries)).sum(-1)


@pytest.mark.parametrize("name", NEAR)
def test_of_all(implementation: str, name: str) -> None:
    entries = grid(name).astype(np.float32)
    y, w = draw(name, 5, 13)
    found = jax.jit(lambda y, w: nearest_vector(y, w, name))(y, w)
    np.testing.assert_array_equal(found.values, entries[np.asarray(found.index)])
    least = distances(y[..., None, :], w[..., None, :], entries).min(-1)
    # XLA's keeps the last bits of a distance for the index.
    tolerance = len(entries) * 2.0**-22
    np.testing.assert_allclose(found.distance, least, rtol=tolerance)
    np.testing.assert_allclose(distances(y, w, np.asarray(found.values)), least, rtol=tolerance)


@pytest.mark.parametrize(("name", "near"), NEAR.items())
def test_of_those_near(implementation: str, name: str, near: int) -> None:
    entries = grid(name).astype(np.float32)
    y, w = draw(name, 517)
    found = jax.jit(lambda y, w: nearest_vector(y, w, name, near))(y, w)
    np.testing.assert_array_equal(found.values, entries[np.asarray(found.index)])
    distance = distances(y, w, np.asarray(found.values))
    np.testing.assert_allclose(found.distance, distance, rtol=near * 2.0**-22)
    least = distances(y[:, None], w[:, None], entries).min(-1)
    assert least.sum() <= distance.sum() <= 1.04 * least.sum()
    assert np.isclose(distance, least, rtol=1e-5).mean() > 0.85


def test_entries_are_nearest_to_themselves(implementation: str) -> None:
    for name, near in NEAR.items():
        entries = grid(name).astype(np.float32)
        y = entries[: 257 if implementation == "ref" else None]
        found = nearest_vector(jnp.asarray(y), jnp.ones_like(y), name, near)
        np.testing.assert_array_equal(found.index, np.arange(len(y)))
        assert not np.asarray(found.distance).any()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_leads_to_an_entry(implementation: str, poison: float) -> None:
    y, w = draw("iq2_xs", 9)
    y[3, 2], w[5, 1] = poison, np.nan
    found = nearest_vector(jnp.asarray(y), jnp.asarray(w), "iq2_xs", 32)
    entries = grid("iq2_xs")
    np.testing.assert_array_equal(found.values, entries[np.asarray(found.index)])
    sound = [0, 1, 2, 4, 6, 7, 8]
    alone = nearest_vector(jnp.asarray(y[sound]), jnp.asarray(w[sound]), "iq2_xs", 32)
    np.testing.assert_array_equal(np.asarray(found.index)[sound], alone.index)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.zeros((2, 8))}, "expected float32"),
        ({"w": np.zeros((3, 8), np.float32)}, "expected float32"),
        ({"name": "iq3_s"}, "vectors of 8 numbers, those of iq3_s have 4"),
        ({"near": 24}, "a power of two from 16 to 512"),
        ({"near": 1024}, "a power of two from 16 to 512"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    some = np.zeros((2, 8), np.float32)
    with pytest.raises(ValueError, match=message):
        nearest_vector(**({"y": some, "w": some, "name": "iq2_xs", "near": 32} | change))


def test_refused_levels() -> None:
    y = jnp.zeros(3)
    with pytest.raises(ValueError, match="expected 16 in order"):
        nearest_level(y, LEVELS[:8])
    with pytest.raises(ValueError, match="expected 16 in order"):
        nearest_level(y, LEVELS[::-1])


def test_an_implementation_that_is_not_there() -> None:
    with dispatch.use("triton"), pytest.raises(ValueError, match="native, xla, ref"):
        nearest_level(jnp.zeros(3), LEVELS)
