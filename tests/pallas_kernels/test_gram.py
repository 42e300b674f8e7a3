"""Every implementation sums the products that float64 sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gram import gram

# Rows and columns: less than a vector, and around what the native kernel takes at once.
SHAPES = [(1, 1), (3, 31), (127, 32), (129, 33), (256, 64), (300, 97)]


@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(implementation: str, shape: tuple[int, int]) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x *= np.logspace(-3, 3, shape[1], dtype=np.float32)
    found = np.asarray(jax.jit(lambda x: gram(x))(x))  # compiled anew for each
    exact = x.T.astype(np.float64) @ x
    length = np.sqrt(np.diag(exact))
    np.testing.assert_allclose(found / np.outer(length, length), exact / np.outer(length, length),
                               rtol=0, atol=1e-6)  # fmt: skip
    if implementation == "native":  # computes half of it
        np.testing.assert_array_equal(found, found.T)


def test_without_rows(implementation: str) -> None:
    np.testing.assert_array_equal(gram(jnp.zeros((0, 35))), np.zeros((35, 35)))


def test_several(implementation: str) -> None:
    x = np.random.default_rng(1).standard_normal((3, 40, 5)).astype(np.float32)
    exact = np.einsum("eti,etj->eij", x.astype(np.float64), x)
    np.testing.assert_allclose(jax.vmap(lambda x: gram(x))(x), exact, rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_stays_where_it_is(implementation: str) -> None:
    x = np.ones((130, 50), np.float32)
    x[129, 7] = np.nan
    finite = np.isfinite(gram(jnp.asarray(x)))
    assert not finite[7].any()
    assert not finite[:, 7].any()
    assert finite.sum() == 49 * 49


@pytest.mark.parametrize("x", [np.zeros((2, 3), np.int8), np.zeros(3, np.float32)])
def test_refusals(x: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected float32 \[T, K\]"):
        gram(jnp.asarray(x))
