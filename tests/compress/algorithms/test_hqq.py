"""HQQ, against what the hqq package made of the same weights."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.checkpoint.safetensors_io import open_safetensors
from qjax.compress import grid as grids
from qjax.compress.algorithms import hqq
from qjax.compress.grid import Grid
from qjax.errors import UnsupportedError

optimized = jax.jit(hqq.optimized, static_argnums=1)


@pytest.mark.parametrize("bits", [4, 8])
def test_is_what_the_hqq_package_makes(golden: Path, bits: int) -> None:
    with open_safetensors(golden / "base-tiny-llama") as files:
        w = np.array(files.array("model.layers.0.self_attn.k_proj.weight")).astype(np.float32)
    recorded = np.load(golden / "hqq.npz")
    packed, scale, zero = (recorded[f"hqq-{bits}b-g64/{key}"] for key in ("W_q", "scale", "zero"))
    codes = np.concatenate([packed >> 4, packed & 15]) if bits == 4 else packed
    grid = Grid(f"uint{bits}", (1, 64), fractional=True)
    scales = optimized(jnp.asarray(w), grid)
    np.testing.assert_allclose(scales.scale, scale.reshape(64, 2), rtol=1e-5)
    # A weight half way between two codes may go to either, and takes its group's zero along.
    error = np.abs(np.asarray(scales.zero) - zero.reshape(64, 2))
    assert np.quantile(error, 0.95) < 1e-3
    assert error.max() < 0.2
    each = grids.spread(scales, grid, (64, 128))
    ours = np.asarray(grids.nearest(jnp.asarray(w), each.scale, each.zero, grid))
    assert (ours != codes.reshape(64, 128)).mean() < 0.002
    stored = grids.encoded(ours, scales, grid)
    np.testing.assert_array_equal(stored.zero_point, scales.zero)
    wanted = (codes.astype(np.float64) - zero) * scale
    np.testing.assert_allclose(stored.dequantize(), wanted.reshape(64, 128), atol=scale.max() * 1.1)


def test_loses_less_than_the_extremes_do() -> None:
    w = jnp.asarray(np.random.default_rng(0).standard_t(3, (32, 128)).astype(np.float32))

    def loss(scales: grids.Scales) -> float:
        return float((jnp.abs(w - grids.rounded(w, scales, grid)) ** 0.7).mean())

    grid = Grid("uint3", (1, 64), fractional=True)
    assert loss(optimized(w, grid)) < 0.99 * loss(grids.minmax(w, grid))
    whole = optimized(w, Grid("uint3", (1, 64))).zero
    assert (whole == jnp.round(whole)).all()


def test_symmetric_grids_have_no_zero_points_to_choose() -> None:
    with pytest.raises(UnsupportedError, match="asymmetric"):
        hqq.optimized(jnp.ones((8, 64)), Grid("uint4b8", (1, 64)))
