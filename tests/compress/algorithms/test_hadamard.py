"""Rotations: they are orthogonal, and models compute the same with them."""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.compress.algorithms import hadamard
from qjax.compress.algorithms.hadamard import Rotation
from qjax.errors import UnsupportedError
from tests.compress.models import flat, floats, logits, put


@pytest.mark.parametrize(
    "rotation",
    [
        Rotation.of(64),
        Rotation.of(576, seed=1),
        Rotation.of(15),
        Rotation.of(96, block=32, seed=2),
    ],
    ids=str,
)
def test_is_orthogonal_and_spreads(rotation: Rotation) -> None:
    q = np.asarray(hadamard.rotated(jnp.eye(rotation.size), rotation), np.float64)
    np.testing.assert_allclose(q @ q.T, np.eye(rotation.size), atol=1e-5)
    span = rotation.size if rotation.mixed else rotation.run
    # Of the entries in a row, none is much larger than a Hadamard matrix would have.
    assert np.abs(q).max() <= np.sqrt(2.001 / span)
    assert (np.abs(q) > 1e-7).sum(1).min() >= span / 2


def test_a_power_of_two_is_sylvesters_matrix() -> None:
    h = np.ones((1, 1))
    while len(h) < 16:
        h = np.block([[h, h], [h, -h]])
    q = hadamard.rotated(jnp.eye(16), Rotation.of(16))
    np.testing.assert_allclose(q, h / 4, atol=1e-6)


@pytest.mark.parametrize("name", ["qwen2", "qwen3moe"])
def test_models_compute_the_same(golden: Path, name: str) -> None:
    params = qjax.load(golden / f"base-tiny-{name}")
    tree = floats(params.tree)
    before = logits(params, tree)
    rotation = Rotation.of(params.config.hidden_size, seed=0)
    for layer in tree["model"]["layers"].values():
        change = hadamard.rotate_layer(params.config, flat(layer), rotation)
        change |= hadamard.rotate_heads(params.config, flat(layer) | change, seed=1)
        for key, value in change.items():
            assert not np.allclose(value, flat(layer)[key])
            put(layer, key, np.asarray(value))
    model = tree["model"]
    head = tree["lm_head"]["weight"] if "lm_head" in tree else None
    ends = (model["embed_tokens"]["weight"], head, model["norm"]["weight"])
    found = map(np.asarray, hadamard.rotate_ends(*ends, rotation))
    model["embed_tokens"]["weight"], head, model["norm"]["weight"] = found
    tree["lm_head"] = {"weight": head}
    config = replace(params.config, tie_word_embeddings=False)
    after = logits(replace(params, config=config), tree)
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())


def test_refuses_what_cannot_be_folded(golden: Path) -> None:
    config = qjax.load(golden / "base-tiny-gemma3").config
    with pytest.raises(UnsupportedError, match="norms what attention and feed-forward add"):
        hadamard.rotate_layer(config, {}, Rotation.of(config.hidden_size))
    with pytest.raises(UnsupportedError, match="powers of two do: 2, 4, 8, 16, 32, 64"):
        Rotation.of(576, block=128)
