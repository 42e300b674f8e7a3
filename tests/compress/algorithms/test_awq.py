"""AWQ's scales, against the search written out in float64 with the inputs themselves."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.compress.algorithms import awq
from qjax.compress.grid import Grid
from qjax.compress.mappings import Scaling
from qjax.errors import UnsupportedError

GRID = Grid("uint4b8", (1, 32))
PLAIN = Scaling("input_layernorm", ("q_proj", "k_proj"))


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def inputs(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Some channels much larger than others."""
    sizes = np.exp(1.5 * rng(seed).standard_normal(columns))
    return rng(seed + 1).standard_normal((rows, columns)) * sizes


def reader(w: np.ndarray, x: np.ndarray, rows: np.ndarray | None = None) -> awq.Reader:
    moment = np.einsum("...tk,...tl->...kl", x, x) / x.shape[-2]
    return awq.Reader(
        jnp.asarray(w, jnp.float32),
        jnp.asarray(moment, jnp.float32),
        None if rows is None else jnp.asarray(rows, jnp.float32),
    )


def rounded(w: np.ndarray) -> np.ndarray:
    """4 bits, symmetric, groups of 32, as compressed-tensors does."""
    groups = w.reshape(-1, 32)
    scale = np.abs(groups).max(-1, keepdims=True) / 7.5
    return (np.clip(np.rint(groups / scale), -8, 7) * scale).reshape(w.shape)


def searched(ws: list[np.ndarray], x: np.ndarray, duo: bool, n: int) -> dict[float, np.ndarray]:
    """The scales that LLM Compressor tries (AWQModifier._compute_best_scale), by their losses."""
    mean = np.abs(x).mean(0)
    share = [np.abs(w).reshape(len(w), -1, 32) for w in ws]
    share = [s / (s.max(-1, keepdims=True) + 1e-6) for s in share]
    share = np.concatenate([s.reshape(len(s), -1) for s in share]).mean(0)
    found = {}
    tried = [(i / (n - 2), True) for i in range(n - 1)] if duo else []
    tried = [(0.0, False), *tried] if duo else [(i / (n - 1), False) for i in range(n)]
    for ratio, with_weights in tried:
        s = mean**ratio
        s = np.maximum(s / (share ** (1 - ratio) + 1e-4) if with_weights else s, 1e-4)
        s = s / np.sqrt(s.max() * s.min())
        loss = sum((np.square(x @ (rounded(w * s) / s - w).T)).sum(-1).mean() for w in ws)
        found[loss] = s
    return found


@pytest.mark.parametrize("duo", [True, False])
def test_finds_what_llm_compressor_finds(duo: bool) -> None:
    x = inputs(256, 64)
    ws = [rng(2).standard_normal((48, 64)), rng(3).standard_normal((24, 64)) * 2]
    tried = searched(ws, x, duo, 12)
    readers = [reader(w, x) for w in ws]
    mean = jnp.asarray(np.abs(x).mean(0), jnp.float32)
    found = awq.best_scale(readers, mean, [GRID, GRID], PLAIN, duo, 12, steps=0)
    np.testing.assert_allclose(found.loss, min(tried), rtol=0.01)
    same = [loss for loss, s in tried.items() if np.allclose(found.scale, s, rtol=1e-4)]
    assert same
    assert min(same) < min(tried) * 1.01
    further = awq.best_scale(readers, mean, [GRID, GRID], PLAIN, duo, 12)
    assert further.loss < 0.97 * found.loss < found.before
    # The loss is that of the scale which is returned, in float64. (The largest of a group lies half
    # way between two codes, and may go to either.)
    s = np.asarray(further.scale, np.float64)
    true = sum(np.square(x @ (rounded(w * s) / s - w).T).sum(-1).mean() for w in ws)
    np.testing.assert_allclose(further.loss, true, rtol=0.02)


def test_scales_that_will_be_searched_for_lose_less() -> None:
    x, w = inputs(256, 64), rng(8).standard_normal((48, 64))
    mean = jnp.asarray(np.abs(x).mean(0), jnp.float32)
    extremes = awq.best_scale([reader(w, x)], mean, [GRID], PLAIN, steps=0)
    searched = awq.best_scale([reader(w, x)], mean, [GRID], PLAIN, steps=0, search=True)
    assert searched.before < extremes.before
    assert searched.loss < extremes.loss


def test_outputs_that_count_for_more_lose_less() -> None:
    x, w = inputs(256, 64), rng(4).standard_normal((48, 64)) * np.exp(rng(5).standard_normal(64))
    w[24:] = w[24:, ::-1]
    rows = np.where(np.arange(48) < 24, 100.0, 0.0)
    mean = jnp.asarray(np.abs(x).mean(0), jnp.float32)

    def first_half(counted: np.ndarray | None) -> float:
        found = awq.best_scale([reader(w, x, counted)], mean, [GRID], PLAIN)
        s = np.asarray(found.scale, np.float64)
        return float(np.square(x @ (rounded(w * s) / s - w)[:24].T).mean())

    assert first_half(rows) < first_half(None)


def test_experts_and_repeated_heads() -> None:
    # Two experts that read the same inputs are one layer of all their rows.
    x, w = inputs(128, 64), rng(6).standard_normal((2, 16, 64))
    mean = jnp.asarray(np.abs(x).mean(0), jnp.float32)
    both = awq.best_scale([reader(w, np.stack([x, x]))], mean, [GRID], PLAIN)
    one = awq.best_scale([reader(w.reshape(32, 64), x)], mean, [GRID], PLAIN)
    np.testing.assert_allclose(both.loss, one.loss, rtol=0.02)
    # Channels that two query heads read have one scale.
    repeated = replace(PLAIN, repeat=2, head_dim=16)
    found = awq.best_scale([reader(w[0], x)], mean, [GRID], repeated)
    assert found.scale.shape == (32,)
    s = np.asarray(repeated.columns(found.scale), np.float64)
    true = np.square(x @ (rounded(w[0] * s) / s - w[0]).T).sum(-1).mean()
    np.testing.assert_allclose(found.loss, true, rtol=0.02)
    assert found.loss < found.before


def test_duo_scaling_needs_groups() -> None:
    w = rng(0).standard_normal((8, 64))
    whole = Grid("uint8b128", (8, 64))
    with pytest.raises(UnsupportedError, match="duo_scaling"):
        awq.best_scale([reader(w, inputs(64, 64))], jnp.ones(64), [whole], PLAIN)
