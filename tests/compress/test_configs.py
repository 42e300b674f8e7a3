"""The recipes in configs/recipes fit a model, each with what its name says."""

from pathlib import Path

import numpy as np
import pytest

import qjax
from qjax.compress import layers
from qjax.compress.recipe import parse
from qjax.compress.rotation import folded
from qjax.compress.steps import plan

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"
FILES = sorted(RECIPES.glob("*.yaml"))
SAMPLES = np.random.default_rng(0).integers(0, 512, (4, 64))


@pytest.fixture(scope="module")
def base(golden) -> qjax.Params:
    return qjax.load(golden / "base-tiny-llama")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_recipe_fits(file, base):
    modifiers = parse(file)
    folded(modifiers, base.config)
    steps = plan(modifiers, base.config)
    named = {module for step in steps for module in step.schemes}
    if file.stem != "kv_fp8":
        assert len(named) >= 7 * base.config.num_layers


def same_numbers(a: qjax.Params, b: qjax.Params) -> bool:
    """Whether all weights stand for the same numbers (columns may lie in another order)."""
    one, other = (layers.floats_of(layers.flat(params.tree)) for params in (a, b))
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_recipe_runs(file, base, golden, tmp_path):
    """Logits stay near those that transformers gave for the model (2 and 3 bits cost more), and
    weights are the same numbers once they are saved and loaded."""
    reference = np.load(golden / "base-tiny-llama" / "reference.npz")
    ids, expected = reference["ids_0"], reference["logits_0"].astype(np.float64)
    types = any(step.types for step in plan(parse(file), base.config))
    out = tmp_path / ("model.gguf" if types else "model")
    params = qjax.oneshot(base, file, SAMPLES, out, progress=False)
    found = np.asarray(qjax.forward(params, ids))
    assert same_numbers(params, qjax.load(out))
    likeness = np.corrcoef(found.ravel(), expected.ravel())[0, 1]
    assert likeness > (0.8 if file.stem[:2] in ("w2", "q2") else 0.98)
