"""Trees by a scheme, against what quantizing really makes of the model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import qjax
from qjax.checkpoint import native
from qjax.planning import plan
from qjax.planning.by_scheme import by_scheme
from qjax.planning.held import held
from qjax.qarray import QArray
from qjax.sharding import Parallel


@pytest.mark.parametrize(
    ("name", "schemes"),
    [
        ("base-tiny-llama", ("W4A16_ASYM", "W8A8", "NVFP4A16")),
        ("base-tiny-mixtral", ("FP8_DYNAMIC", "Q4_K_M")),
    ],
)
def test_tree(golden: Path, name: str, schemes: tuple[str, ...]) -> None:
    params = qjax.load(golden / name)
    for scheme in schemes:
        made = qjax.oneshot(params, recipe=scheme)
        config, tree = by_scheme(golden / name / "config.json", scheme)
        assert config == made.config
        leaves = {".".join(path): leaf for path, leaf in native.leaves_of(made.tree)}
        found = {".".join(path): leaf for path, leaf in native.leaves_of(tree)}
        assert found.keys() == leaves.keys()
        for key, leaf in leaves.items():
            if isinstance(leaf, QArray):
                assert (found[key].qtype, found[key].group) == (leaf.qtype, leaf.group), key
                assert (found[key].act, found[key].shape) == (leaf.act, leaf.shape), key
        nbytes = {each.name: each.nbytes for each in held(tree, config, Parallel(1, 1, True))}
        assert nbytes == {key: leaf.nbytes for key, leaf in leaves.items()}


def test_config_alone(golden: Path, tmp_path: Path) -> None:
    shutil.copy(golden / "base-tiny-llama" / "config.json", tmp_path)
    for source in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(qjax.RequestError, match=r"With a scheme \(W4A16, or UNQUANTIZED\)"):
            plan(source, memory=1 << 30)
        with pytest.raises(qjax.RecipeError, match="scheme 'W5' is unknown"):
            plan(source, memory=1 << 30, scheme="W5")
    small, large = (
        plan(tmp_path, memory=1 << 30, tensor_parallel_size=2, scheme=scheme).outcome.memory
        for scheme in ("W4A16", "UNQUANTIZED")
    )
    assert small.weights < large.weights
    assert small.cache == large.cache
