"""The recipes in configs/recipes fit a model, each with what its name says."""

import re
from pathlib import Path

import numpy as np
import pytest

import qjax
from qjax.compress import layers
from qjax.compress.modifiers import (
    AutoRoundModifier,
    AWQModifier,
    GPTQModifier,
    HQQModifier,
    SmoothQuantModifier,
    SpinQuantModifier,
)
from qjax.compress.presets import GGML
from qjax.compress.recipe import parse
from qjax.compress.rotation import folded
from qjax.compress.steps import plan

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"
FILES = sorted(RECIPES.glob("*.yaml"))
SAMPLES = np.random.default_rng(0).integers(0, 512, (4, 64))


@pytest.fixture(scope="module")
def base(golden) -> qjax.Params:
    return qjax.load(golden / "base-tiny-llama")


METHODS = {
    "gptq": GPTQModifier,
    "awq": AWQModifier,
    "smoothquant": SmoothQuantModifier,
    "autoround": AutoRoundModifier,
    "hqq": HQQModifier,
    "spinquant": SpinQuantModifier,
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_name_of_recipe(file):
    """Each is what its name says."""
    found = parse(file)
    schemes = [scheme for m in found for scheme in getattr(m, "schemes", ())]
    caches = [m for m in found if getattr(m, "kv_cache_scheme", None) is not None]
    assert bool(caches) == ("kv" in file.stem)
    assert schemes or file.stem == "kv_fp8"
    for method, kind in METHODS.items():
        assert method not in file.stem or any(isinstance(m, kind) for m in found)
    if bits := re.match(r"w(\d)a", file.stem):
        assert {scheme.weights.num_bits for scheme in schemes} == {int(bits[1])}
    elif file.stem.upper() in GGML:
        assert [scheme.ggml for scheme in schemes] == [file.stem.upper()]
    elif file.stem.startswith(("fp8", "nvfp4", "mxfp")):
        assert {scheme.weights.type for scheme in schemes} == {"float"}


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
