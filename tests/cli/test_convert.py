"""`qjax convert`: what it writes and what it says of it."""

import json
from pathlib import Path

import pytest

from qjax.checkpoint.loader import load
from qjax.checkpoint.save_plan import FORMATS
from tests.checkpoint.test_save_by_name import same_numbers
from tests.cli.conftest import Run


def test_exactly(run: Run, golden: Path, tmp_path: Path) -> None:
    source, target = golden / "gptq-4b-g32-desc", tmp_path / "ct"
    code, out, _ = run("convert", str(source), str(target), "--format", "compressed-tensors")
    assert code == 0
    assert same_numbers(load(target), load(source))
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    stored = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    size = next(line for line in out.splitlines() if line.startswith("size"))
    assert float(size.split()[1]) == pytest.approx(stored / 1e6, abs=0.06)
    # Matrices of 3 layers (7 each), head, embedding; 7 norms.
    assert "exact         30 tensors" in out
    assert "rounded" not in out


def test_rounded(run: Run, golden: Path, tmp_path: Path) -> None:
    source, dtype = golden / "hqq-4b-g64-axis0", ("--dtype", "bfloat16")
    code, out, _ = run("convert", str(source), str(tmp_path / "a"), "-f", "dense", *dtype)
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("rounded"))
    # bfloat16 keeps 8 bits of a number.
    assert 0 < float(line.split("at most ")[1].split()[0]) <= 2.0**-8


def test_refused(run: Run, golden: Path, tmp_path: Path) -> None:
    args = str(golden / "gguf-Q4_1"), str(tmp_path / "a")
    code, out, err = run("convert", *args, "-f", "awq")
    assert (code, out) == (1, "")
    assert "lm_head: AWQ has no layout" in err
    assert "gguf, safetensors (dequantized)" in err
    code, _, err = run("convert", *args, "-f", "exl2")
    assert code == 1
    assert "'exl2'" in err
    assert list(tmp_path.iterdir()) == []


def test_formats_are_listed(run: Run) -> None:
    code, out, _ = run("convert", "--list-formats")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(FORMATS)
