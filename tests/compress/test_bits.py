"""Bits for each layer, against all the ways there are."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.compress import bits
from qjax.compress.bits import Option
from qjax.compress.grid import Grid
from qjax.errors import UnsupportedError


def convex(seed: int, layers: int) -> dict[str, list[Option]]:
    """Layers of equal size; each bit more leaves a quarter of the loss."""
    sizes = np.exp(2 * np.random.default_rng(seed).standard_normal(layers))
    return {
        f"layer{i}": [Option(100.0 * b, float(size * 4.0**-b)) for b in (2, 3, 4, 8)]
        for i, size in enumerate(sizes)
    }


@pytest.mark.parametrize("seed", range(4))
def test_is_near_the_best_of_all(seed: int) -> None:
    options = convex(seed, 6)
    weights = dict.fromkeys(options, 100)
    found = bits.allotted(options, weights, 3.5)
    names = list(options)

    def total(chosen: tuple[int, ...]) -> tuple[float, float]:
        taken = [options[name][i] for name, i in zip(names, chosen, strict=True)]
        return sum(o.bits for o in taken), sum(o.loss for o in taken)

    used, loss = total(tuple(found[name] for name in names))
    assert used <= 3.5 * 600
    every = map(total, itertools.product(range(4), repeat=6))
    best = min(lost for used, lost in every if used <= 3.5 * 600)
    # Of the relaxation, with all of the budget used but what one change takes.
    assert loss <= best * 1.15
    # More sensitive layers never get fewer bits.
    order = sorted(names, key=lambda name: options[name][0].loss)
    assert [found[name] for name in order] == sorted(found.values())


def test_tied_layers_get_the_same() -> None:
    options = convex(0, 4)
    tied = [("layer0", "layer3")]
    found = bits.allotted(options, dict.fromkeys(options, 100), 3.3, tied)
    assert found["layer0"] == found["layer3"]
    assert len(set(found.values())) > 1


def test_too_few_bits() -> None:
    with pytest.raises(UnsupportedError, match=r"2\.000 bits a weight"):
        bits.allotted(convex(0, 3), dict.fromkeys(convex(0, 3), 100), 1.9)


def test_losses_against_float64() -> None:
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((24, 64)), rng.standard_normal((200, 64)) * np.arange(1, 65)
    rows = rng.random(24)
    moment = jnp.asarray(x.T @ x / 200, jnp.float32)
    candidates = tuple(Grid(f"uint{b}", (1, 32)) for b in (3, 4, 8))
    found = bits.losses(jnp.asarray(w, jnp.float32), moment, candidates, jnp.asarray(rows))
    share = bits.losses(jnp.asarray(w, jnp.float32), moment, candidates)
    groups = w.reshape(24, 2, 32)
    for i, b in enumerate((3, 4, 8)):
        low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
        scale = (high - low) / (2**b - 1)
        zero = np.rint(-low / scale)
        codes = np.clip(np.rint(groups / scale) + zero, 0, 2**b - 1)
        error = ((codes - zero) * scale - groups).reshape(24, 64)
        lost = np.square(x @ error.T).mean(0)
        np.testing.assert_allclose(found[i], (lost * rows).sum(), rtol=2e-2)
        np.testing.assert_allclose(
            share[i], lost.sum() / np.square(x @ w.T).mean(0).sum(), rtol=2e-2
        )
    # Two experts are the sum of both.
    both = bits.losses(
        jnp.asarray(np.stack([w, w]), jnp.float32),
        jnp.stack([moment, moment]),
        candidates,
        jnp.asarray(np.stack([rows, rows])),
    )
    np.testing.assert_allclose(both, 2 * found, rtol=1e-4)
