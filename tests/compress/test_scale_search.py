"""Searches for scales, against float64 numpy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax.compress import grid as grids
from qjax.compress import scale_search
from qjax.compress.grid import Grid, Scales
from qjax.scheme import QuantizationArgs

minmax = jax.jit(grids.minmax, static_argnums=1)
nearest = jax.jit(grids.nearest, static_argnums=3)
rounded = jax.jit(grids.rounded, static_argnums=2)
searched = jax.jit(scale_search.searched, static_argnums=(1, 4))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def loss(w: np.ndarray, scales: Scales, grid: Grid, importance: np.ndarray) -> np.ndarray:
    """Of each row, in float64."""
    error = w.astype(np.float64) - np.asarray(rounded(jnp.asarray(w), scales, grid))
    return (error**2 * importance).sum(-1)


def storable(scales: Scales, part: float) -> np.ndarray:
    """Scales times a number, as bfloat16 or as multiples of the global scale in fp8."""
    scale = np.asarray(scales.scale) * np.float32(part)
    if scales.global_scale is None:
        return scale.astype(ml_dtypes.bfloat16).astype(np.float32)
    unit = np.asarray(scales.global_scale)
    return (scale / unit).clip(0, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * unit


@pytest.mark.parametrize(
    "args",
    [
        QuantizationArgs(2, "int", True, "group", 32),
        QuantizationArgs(4, "int", True, "channel"),
        QuantizationArgs(3, "int", False, "group", 32),
        QuantizationArgs(4, "float", True, "tensor_group", 16),
    ],
    ids=lambda args: f"{args.type}{args.num_bits}-{args.strategy}",
)
def test_searched_is_the_least_of_a_fine_search(args: QuantizationArgs) -> None:
    w = normal(16, 64)
    importance = np.exp(normal(64, seed=1))
    grid = Grid.of(args, (w.shape[0], w.shape[1]), "bfloat16")
    found = searched(jnp.asarray(w), grid, jnp.asarray(importance))
    plain = minmax(jnp.asarray(w), grid)
    got = loss(w, found, grid, importance)
    assert (got <= loss(w, plain, grid, importance) + 1e-6).all()
    # Every scale between 0.3 and 2 of the plain one, zero points as they were found.
    columns = np.arange(64) // grid.group[1]
    total = np.zeros(16)
    for group in range(plain.scale.shape[1]):
        best = np.full(16, np.inf)
        for part in np.linspace(0.3, 2, 171):
            tried = found._replace(scale=jnp.asarray(storable(plain, part)))
            error = loss(w, tried, grid, importance * (columns == group))
            best = np.minimum(best, error)
        total += best
    assert (got <= total * 1.05 + 1e-6).all()
    # What was found can be stored.
    each = grids.spread(found, grid, w.shape)
    codes = nearest(jnp.asarray(w), each.scale, each.zero, grid)
    stored = grids.encoded(codes, found, grid)
    np.testing.assert_allclose(
        stored.dequantize(), grids.values(codes, each.scale, each.zero, grid), rtol=3e-7
    )


def test_searched_by_what_errors_do_together() -> None:
    """With inputs that depend on each other, errors can make up for each other."""
    w, x = normal(32, 64), normal(400, 8, seed=1) @ normal(8, 64, seed=2)
    moment = jnp.asarray(x.T @ x / 400)
    grid = Grid("uint3b4", (1, 32))

    def lost(importance: jax.Array) -> float:
        scales = searched(jnp.asarray(w), grid, importance)
        error = (np.asarray(rounded(jnp.asarray(w), scales, grid)) - w).astype(np.float64)
        parts = error.reshape(32, 2, 32), x.astype(np.float64).reshape(400, 2, 32)
        return float(np.square(np.einsum("ngk,tgk->ngt", *parts)).mean())

    together = lost(scale_search.within_groups(moment, grid))
    assert together < 0.9 * lost(jnp.diag(moment))


def test_a_group_of_zeros_stays_zeros() -> None:
    for args in (
        QuantizationArgs(4, "int", False, "group", 32),
        QuantizationArgs(4, "float", True, "tensor_group", 16),
        QuantizationArgs(4, "float", True, "group", 32),
    ):
        w = normal(2, 64)
        w[:, :32] = 0
        grid = Grid.of(args, (w.shape[0], w.shape[1]), "bfloat16")
        for scales in (minmax(jnp.asarray(w), grid), searched(jnp.asarray(w), grid)):
            result = np.asarray(rounded(jnp.asarray(w), scales, grid))
            assert np.isfinite(result).all()
            assert not result[:, :32].any()


@pytest.mark.parametrize(
    ("size", "dtype"), [(16, ml_dtypes.float8_e4m3fn), (32, ml_dtypes.float8_e8m0fnu)]
)
def test_each_stored_scale_of_two_octaves_is_tried(size: int, dtype: type) -> None:
    """The least of all that 8 bits store from half of the plain scale to its double."""
    w = normal(24, 2 * size, seed=3)
    moment = np.cov(normal(2 * size, 4 * size, seed=4)).astype(np.float32)
    strategy = "tensor_group" if size == 16 else "group"
    args = QuantizationArgs(4, "float", True, strategy, size)
    grid = Grid.of(args, (24, 2 * size))
    moments = scale_search.within_groups(jnp.asarray(moment), grid)
    found = searched(jnp.asarray(w), grid, moments)
    plain = minmax(jnp.asarray(w), grid)
    unit = np.float32(1) if plain.global_scale is None else np.asarray(plain.global_scale)
    codes = np.arange(110, 140) if size == 32 else np.arange(1, 127)
    held = codes.astype(np.uint8).view(dtype).astype(np.float32)

    def lost(scale: np.ndarray) -> np.ndarray:
        tried = plain._replace(scale=jnp.asarray(scale))
        error = (np.asarray(rounded(jnp.asarray(w), tried, grid)) - w).astype(np.float64)
        parts = error.reshape(24, 2, size)
        return np.einsum("rgc,gcd,rgd->rg", parts, np.asarray(moments, np.float64), parts)

    least = np.full((24, 2), np.inf)
    for each in held * unit.reshape(-1)[0]:
        part = each / np.asarray(plain.scale)
        loss = lost(np.full((24, 2), each, np.float32))
        least = np.where((part > 0.499) & (part < 2.001), np.minimum(least, loss), least)
    np.testing.assert_allclose(lost(np.asarray(found.scale)), least, rtol=1e-4)
