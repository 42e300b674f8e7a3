"""The recipes in configs/recipes fit a model, each with what its name says."""

from pathlib import Path

import pytest

import qjax
from qjax.compress.recipe import parse
from qjax.compress.rotation import folded
from qjax.compress.steps import plan

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"


FILES = [file for file in sorted(RECIPES.glob("*.yaml")) if "autoround" not in file.stem]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_recipe_fits(file, golden):
    config = qjax.load(golden / "base-tiny-llama").config
    modifiers = parse(file)
    folded(modifiers, config)
    steps = plan(modifiers, config)
    named = {module for step in steps for module in step.schemes}
    if file.stem != "kv_fp8":
        assert len(named) >= 7 * config.num_layers
