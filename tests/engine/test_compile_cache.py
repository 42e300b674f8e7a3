"""Programs on disk: found again, made anew when damaged, and never written from jax's own copy."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from qjax.engine.compile_cache import load_or_compile

SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    before = [jax.config.values[name] for name in SETTINGS]
    set_cache(str(tmp_path), 0.0)
    yield tmp_path
    set_cache(*before)


def set_cache(*values: Any) -> None:
    for name, value in zip(SETTINGS, values, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def stored(folder: Path) -> list[Path]:
    return [path for path in (folder / "steps").rglob("*") if path.is_file()]


def program(compiled: list[str]) -> jax.stages.Compiled:
    x = jax.ShapeDtypeStruct((8,), jnp.float32)

    def compile_it() -> jax.stages.Compiled:
        compiled.append("again")
        return jax.jit(lambda x: {"y": jnp.cos(x).sum()}).lower(x).compile()

    return load_or_compile("key", ((x,), {}), {"y": 0}, compile_it)


def test_a_program_is_compiled_once(folder: Path) -> None:
    compiled: list[str] = []
    for _ in range(3):
        assert program(compiled)(jnp.zeros(8)) == {"y": 8}
    assert len(compiled) == 1
    assert len(stored(folder)) == 1


@pytest.mark.parametrize("damage", [b"", b"not a program", None])
def test_a_damaged_file_is_made_anew(folder: Path, damage: bytes | None) -> None:
    compiled: list[str] = []
    program(compiled)
    (path,) = stored(folder)
    path.write_bytes(path.read_bytes()[:1000] if damage is None else damage)
    assert program(compiled)(jnp.zeros(8)) == {"y": 8}
    assert len(compiled) == 2


def test_what_jax_has_loaded_is_not_written_out(folder: Path) -> None:
    compiled: list[str] = []
    program(compiled)
    (path,) = stored(folder)
    path.unlink()
    assert program(compiled)(jnp.zeros(8)) == {"y": 8}
    assert stored(folder) == []


def test_a_full_disk_costs_time_only(folder: Path) -> None:
    (folder / "steps").write_text("a file where a folder should be")
    assert program([])(jnp.zeros(8)) == {"y": 8}


def test_importing_qjax_imports_nothing() -> None:
    code = "import sys, qjax; print([m for m in ('jax', 'numpy', 'flax') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
