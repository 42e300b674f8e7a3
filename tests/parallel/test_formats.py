"""Every format, split: the same logits within 1e-5, and the same tokens, greedy and sampled."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

import pytest

import qjax
from tests.parallel import cases

OUTSIDE = Path(os.environ.get("QJAX_FIXTURES", "") or os.devnull)
# One of each way in which weights are stored and inputs are treated.
FEW = (
    *("base-tiny-gemma3", "gptq-4b-g32-desc", "ct-int8-w8a8-dyn-asym", "ct-nvfp4a16"),
    *("bnb-nf4-dq", "gguf-Q4_1", "hqq-4b-g64-axis0", "quark-mxfp4", "fgfp8-block-64-ue8m0"),
    *("gguf-deepseek-v2-F32", "gguf-gptoss-F32", "gguf-qwen2moe-F32"),
)


def models(root: Path) -> list[Path]:
    """Checkpoints below a folder."""
    found = root.glob("*/") if root.is_dir() else ()
    return sorted(
        folder
        for folder in found
        if (folder / "config.json").is_file() or (folder / "model.gguf").is_file()
    )


@cache
def whole(folder: Path, generate: bool, rounded: bool = True) -> cases.Found:
    params = qjax.load(folder, quantize_activations=rounded)
    return cases.found(params, cases.PLAIN if generate else None)


def compare(folder: Path, tensor: int, generate: bool) -> None:
    params = cases.split(folder, tensor)
    sampling = cases.PLAIN if generate else None
    found = cases.found(params, sampling)
    if not cases.rounds_inputs(params):
        cases.check(whole(folder, generate), found)
        return
    cases.check_rounded(whole(folder, generate), found)
    params = cases.split(folder, tensor, quantize_activations=False)
    cases.check(whole(folder, generate, rounded=False), cases.found(params, sampling))


@pytest.mark.parametrize("name", FEW)
def test_four_devices(name: str) -> None:
    compare(cases.GOLDEN / name, 2 if "fgfp8" in name else 4, generate=False)


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize(
    "folder", [*models(cases.GOLDEN), *models(OUTSIDE)], ids=lambda folder: folder.name
)
def test_all(folder: Path, tensor: int) -> None:
    """A weight that cannot be cut is told by its name: of models so small, those of wide blocks."""
    try:
        compare(folder, tensor, generate=True)
    except qjax.ShardingError as error:
        told = re.search(r"weight: (\d+) (inputs|outputs) in blocks of (\d+) cannot", str(error))
        assert told
        assert int(told[1]) % (int(told[3]) * tensor)


@pytest.mark.slow
def test_default_model() -> None:
    """Nine heads and three of keys: it splits in three."""
    params = qjax.load()
    three = cases.split("smollm2-135m", 3)
    cases.check(cases.found(params, cases.ALL), cases.found(three, cases.ALL))
    with pytest.raises(qjax.ShardingError, match=r"9 attention heads .* over 2 devices: 1, 3, 9"):
        cases.split("smollm2-135m", 2)
