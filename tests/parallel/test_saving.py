"""Split models are saved whole: the same files as from one device, and for any other mesh."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open

import qjax
from qjax.checkpoint import native
from tests.parallel import cases

SOURCES = ("gptq-4b-g32-desc", "ct-int8-w8a8-dyn-asym", "ct-qwen3moe-w4a16-g32", "gguf-qwen2-Q4_0")


def same(one: qjax.Params, other: qjax.Params) -> None:
    for (path, a), (_, b) in zip(
        native.leaves_of(one.tree), native.leaves_of(other.tree), strict=True
    ):
        assert jax.tree.structure(a) == jax.tree.structure(b), path
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert x.dtype == y.dtype
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


@pytest.mark.parametrize("name", SOURCES)
def test_orbax(name: str, tmp_path: Path) -> None:
    """From four devices onto one, two, and four others; bit for bit."""
    source = cases.GOLDEN / name
    expert = 2 if "moe" in name else 1
    four = cases.split(source, 4 // expert, expert)
    qjax.save(four, tmp_path / "saved", format="orbax")
    same(qjax.load(tmp_path / "saved"), qjax.load(source))
    for tensor in (2, 4):
        same(cases.split(tmp_path / "saved", tensor), cases.split(source, tensor))


@pytest.mark.parametrize("name", ["ct-int8-w8a8-dyn-asym", "ct-qwen3moe-w4a16-g32"])
def test_safetensors(name: str, tmp_path: Path) -> None:
    qjax.save(cases.split(cases.GOLDEN / name, 4), tmp_path / "saved")
    with (
        safe_open(cases.GOLDEN / name / "model.safetensors", "np") as before,
        safe_open(tmp_path / "saved" / "model.safetensors", "np") as after,
    ):
        assert set(before.keys()) == set(after.keys())
        for tensor in before.keys():  # noqa: SIM118
            one, other = before.get_slice(tensor), after.get_slice(tensor)
            assert (one.get_dtype(), one.get_shape()) == (other.get_dtype(), other.get_shape())
            if one.get_dtype() != "BF16":
                np.testing.assert_array_equal(before.get_tensor(tensor), after.get_tensor(tensor))


def test_gguf(tmp_path: Path) -> None:
    source = cases.GOLDEN / "gguf-qwen2-Q4_0"
    qjax.save(cases.split(source, 2), tmp_path / "saved.gguf")
    same(qjax.load(tmp_path / "saved.gguf"), qjax.load(source))
