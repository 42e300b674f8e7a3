"""The page on several models: what it says of them, against numpy and against what measures it."""

import json
import math
from typing import Any

import pytest
from safetensors import safe_open

import qjax
from qjax import evaluate
from qjax.report import plots, table

TEXT = "The quick brown fox jumps over the lazy dog. " * 12
OTHERS = ("gptq-4b-g32-desc", "ct-int8-w8a8-dyn-asym")


@pytest.fixture(scope="module")
def made(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "new" / "page"
    models = [golden / name for name in OTHERS]
    options: dict[str, Any] = {"window": 48, "max_windows": 2, "generate": 4, "repeats": 1}
    base = golden / "base-tiny-llama"
    return folder, qjax.report(base, models, folder, text=TEXT, text_name="a fox", **options)


def test_rows(made, golden):
    found = made[1]
    base, *others = found.rows
    assert [row.name for row in found.rows] == [
        str(golden / name) for name in ("base-tiny-llama", *OTHERS)
    ]
    assert base.divergence is None
    params = qjax.load(golden / "base-tiny-llama")
    for row in others:
        right = evaluate.kl_divergence(params, qjax.load(row.name), TEXT, window=48, max_windows=2)
        assert row.divergence.mean == pytest.approx(right.mean, rel=1e-3)
        assert row.divergence.same_top == right.same_top
        assert row.perplexity.value == pytest.approx(right.other.value, rel=1e-5)
        assert base.perplexity.value == pytest.approx(right.base.value, rel=1e-5)
    for row in found.rows:
        assert row.load_seconds > 0
        assert row.prefill.tokens_per_second > 0
        assert row.decode.tokens_per_second > 0
    assert [(row.method, row.qtype, row.activation) for row in found.rows] == [
        ("", "bf16", ""),
        ("gptq", "uint4b8", ""),
        ("compressed-tensors", "int8", "int8"),
    ]


def test_sizes(made, golden):
    """Against what is in the files: all of it is read, and held as it is, but for norms, which are
    float32, and zero points, which are all alike."""
    files = {
        name: safe_open(golden / name / "model.safetensors", "numpy")
        for name in ("base-tiny-llama", "gptq-4b-g32-desc")
    }
    shapes, packed = (
        {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        for file in files.values()
    )
    base, gptq, _ = made[1].rows
    weights = sum(math.prod(shape) for shape in shapes.values())
    norms = sum(math.prod(shape) for shape in shapes.values() if len(shape) == 1)
    assert base.weights == gptq.weights == weights
    assert (base.stored, base.nbytes) == (2 * weights, 2 * weights + 2 * norms)
    assert base.bits_per_weight == 16 + 16 * norms / weights
    words = {"qweight", "qzeros", "g_idx"}  # of 32 bits, the rest of 16
    assert gptq.stored == sum(
        math.prod(shape) * (4 if name.rpartition(".")[2] in words else 2)
        for name, shape in packed.items()
    )
    assert gptq.nbytes <= gptq.stored + 2 * norms


def test_page(made):
    folder, found = made
    page = (folder / "report.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert lines == table(found).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert {len(line) for line in cells} == {14}
    assert [line[0] for line in cells[2:]] == [row.name for row in found.rows]
    assert [line[3] for line in cells[2:]] == [f"{row.bits_per_weight:.2f}" for row in found.rows]
    assert cells[2][10:] == [""] * 4
    assert cells[3][10] == f"{found.rows[1].divergence.mean:.5f}"
    assert "of a fox, 46 tokens in\n  2 windows of 48" in page
    for name in ("divergence.png", "speed.png"):
        assert f"]({name})" in page
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((folder / "report.json").read_text())
    assert numbers["rows"][1]["divergence"]["mean"] == found.rows[1].divergence.mean
    assert numbers["device"]


def test_errors(golden, tmp_path, monkeypatch):
    base = golden / "base-tiny-llama"
    with pytest.raises(qjax.RequestError, match="needs a model beside the base"):
        qjax.report(base, [], tmp_path)
    with pytest.raises(qjax.RequestError, match="do not have the same tokens"):
        qjax.report(base, [golden / "gguf-mixtral-F32"], tmp_path, text=TEXT, window=48)
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(qjax.UnsupportedError, match=r"matplotlib.*install 'qjax\[eval\]'"):
        qjax.report(base, [base], tmp_path)
    assert not list(tmp_path.iterdir())
