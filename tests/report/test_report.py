"""The page on several models: what it says of them, against references from outside."""

import json
import math
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import qjax
from qjax import evaluate, ops
from qjax.ops.dense import dequantized
from qjax.report import METHODS, making, plots, table

# Its first window has the tokens of the references, see `test_text`.
TEXT = "The capital of \nthe quick brown fox jumps over the lazy dog."
WINDOW = 8
READ: dict[str, Any] = {"text": TEXT, "window": WINDOW, "max_windows": 1}
QUICK: dict[str, Any] = {**READ, "generate": 2, "repeats": 1}
GIVEN = "gptq-4b-g32-desc"
MADE = ("q8_0", "w4a16-rtn", "nf4")

# base-tiny-llama: 3 layers of width 128, 4 heads of 32 with 2 for keys and values, 256 within.
LINEAR = 3 * (128 * 128 + 2 * 64 * 128 + 128 * 128 + 3 * 256 * 128)
EMBEDDINGS, NORMS = 2 * 512 * 128, 7 * 128


@pytest.fixture(scope="module")
def base(golden):
    return golden / "base-tiny-llama"


@pytest.fixture(scope="module")
def given(base, golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "new" / "page"
    return folder, qjax.report(base, [golden / GIVEN], folder, text_name="a fox", **QUICK)


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """Page, folder of models, report."""
    page, models = (tmp_path_factory.mktemp(name) / "new" for name in ("page", "models"))
    history = page.parent / "history.jsonl"
    found = qjax.report(
        base,
        folder=page,
        methods=MADE,
        keep=models,
        batches=(2, 1),
        history=history,
        numerics="exact",
        **QUICK,
    )
    return page, models, found


def logits_of(golden, name):
    """float64 [T, V] of the first prompt, by another engine, and its tokens."""
    with np.load(golden / name / "reference.npz") as file:
        return file["logits_0"].astype(np.float64), file["ids_0"]


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_text(base, golden):
    ids = qjax.load(base).tokenizer.encode(TEXT)
    assert ids[:WINDOW] == logits_of(golden, base)[1].tolist()
    assert len(ids) >= 2 * WINDOW


def test_accuracy(given, golden, base):
    """Perplexity and divergence in float64, of logits by other engines: of the second half of the
    window, the first token of which is predicted by none of it."""
    found = given[1]
    half = slice(WINDOW // 2, WINDOW - 1)
    logits, ids = logits_of(golden, base)
    p, targets = log_softmax(logits)[half], ids[WINDOW // 2 + 1 :]
    rows = np.arange(len(p))
    assert found.base.perplexity["exact"].value == pytest.approx(
        np.exp(-p[rows, targets].mean()), rel=1e-4
    )
    assert set(found.base.divergence) == {"fast"}
    (row,) = found.rows
    q, exact = log_softmax(logits_of(golden, GIVEN)[0])[half], row.divergence["exact"]
    assert row.perplexity["exact"].value == pytest.approx(
        np.exp(-q[rows, targets].mean()), rel=1e-3
    )
    assert exact.mean == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=0.01)
    assert exact.same_top == (p.argmax(-1) == q.argmax(-1)).mean()
    assert row.divergence["fast"].mean != exact.mean
    for row in found.all_rows:
        params = qjax.load(row.name)
        fast = evaluate.perplexity(params, TEXT, window=WINDOW, max_windows=1, numerics="fast")
        assert row.perplexity["fast"].value == pytest.approx(fast.value, rel=1e-5)


def test_rows(given):
    found = given[1]
    assert [(row.method, row.qtype, row.activation) for row in found.all_rows] == [
        ("", "bf16", ""),
        ("gptq", "uint4b8", ""),
    ]
    assert [row.four_bit for row in found.all_rows] == [False, True]
    for row in found.all_rows:
        assert row.quantize_seconds is None
        assert row.load_seconds > 0
        assert row.prefill.tokens_per_second > 0
        assert [each.batch for each in row.decode] == [1]
        assert row.speed(1) == row.decode[0].tokens_per_second > 0


def test_sizes(given, golden):
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
    base, gptq = given[1].all_rows
    weights = sum(math.prod(shape) for shape in shapes.values())
    assert weights == LINEAR + EMBEDDINGS + NORMS
    assert base.weights == gptq.weights == weights
    assert (base.stored, base.nbytes) == (2 * weights, 2 * weights + 2 * NORMS)
    assert base.bits_per_weight == 16 + 16 * NORMS / weights
    words = {"qweight", "qzeros", "g_idx"}  # of 32 bits, the rest of 16
    assert gptq.stored == sum(
        math.prod(shape) * (4 if name.rpartition(".")[2] in words else 2)
        for name, shape in packed.items()
    )
    assert gptq.nbytes <= gptq.stored + 2 * NORMS


def test_sizes_of_what_was_made(made):
    """By hand: codes, and their scales, beside embedding and head in 16 bits and norms in 32."""
    rows = {row.name: row for row in made[2].rows}
    rest = 2 * EMBEDDINGS + 4 * NORMS
    assert made[2].base.name == "bfloat16"
    assert made[2].base.nbytes == 2 * LINEAR + rest
    assert rows["w4a16-rtn"].nbytes == LINEAR // 2 + 2 * LINEAR // 128 + rest
    assert rows["nf4"].nbytes == LINEAR // 2 + 4 * LINEAR // 64 + 21 * 16 * 4 + rest
    # 32 codes and a scale of 16 bits in 34 bytes, embedding and head included.
    assert rows["q8_0"].nbytes == (LINEAR + EMBEDDINGS) // 32 * 34 + 4 * NORMS
    assert rows["nf4"].bits == 8 * (0.5 + 4 / 64 + 21 * 64 / LINEAR)
    for row in made[2].rows:
        assert row.quantize_seconds > 0
        assert row.weights == LINEAR + EMBEDDINGS + NORMS


def test_nf4(made, base):
    """Its codes stand for the nearest of the sixteen numbers, in float64."""
    weight = qjax.load(made[1] / "nf4").tree["model"]["layers"]["0"]["mlp"]["up_proj"]["weight"]
    with safe_open(base / "model.safetensors", "numpy") as file:
        dense = file.get_tensor("model.layers.0.mlp.up_proj.weight").astype(np.float64)
    table = np.asarray(weight.aux["codebook"], np.float64).reshape(-1)
    blocks = dense.reshape(-1, 64)
    values = table * np.abs(blocks).max(-1)[:, None, None]
    nearest = np.take_along_axis(
        values[:, 0], np.abs(blocks[..., None] - values).argmin(-1), axis=-1
    )
    found = np.asarray(dequantized(ops.unprepare(weight)), np.float64).reshape(-1, 64)
    np.testing.assert_allclose(found, nearest, rtol=0.004)


def cells_of(lines):
    """The cells of each line of a table in Markdown, without the line under the heading."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert len({len(line) for line in cells}) == 1
    return [cells[0], *cells[2:]]


def test_page(given):
    folder, found = given
    page = (folder / "report.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert lines == table(found).splitlines()
    heading, *cells = cells_of(lines)
    rows = [dict(zip(heading, row, strict=True)) for row in cells]
    assert [row["model"] for row in rows] == [row.name for row in found.all_rows]
    assert [row["bits per weight"] for row in rows] == [
        f"{row.bits_per_weight:.2f}" for row in found.all_rows
    ]
    assert rows[0]["mean KL divergence"] == ""
    assert rows[0]["mean KL divergence, fast"] == f"{found.base.divergence['fast'].mean:.5f}"
    assert rows[1]["mean KL divergence"] == f"{found.rows[0].divergence['exact'].mean:.5f}"
    assert "of a fox, 3\n  tokens in 1 windows of 8" in page
    for name in ("divergence.png", "speed.png"):
        assert f"]({name})" in page
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert not (folder / "batches.png").exists()
    numbers = json.loads((folder / "report.json").read_text())
    exact = found.rows[0].divergence["exact"]
    assert numbers["rows"][0]["divergence"]["exact"]["mean"] == exact.mean
    assert numbers["device"]


def test_page_of_methods(made):
    """What vLLM's page says stands beside what was measured, and the batches have their table."""
    folder, _, found = made
    page = (folder / "report.md").read_text()
    claims = page[page.index("## Beside vLLM's page") : page.index("## Methods")]
    rows = cells_of([line for line in claims.splitlines() if line.startswith("|")])[1:]
    assert [row[:4] for row in rows] == [
        ["INT4 W4A16", "~25%", "1.1-1.3x", "2-5%"],
        ["q8_0", "", "", ""],
        ["nf4", "", "", ""],
    ]
    by_name = {row.name: row for row in found.rows}
    for row, name in zip(rows, ("w4a16-rtn", "q8_0", "nf4"), strict=True):
        assert row[4] == f"{by_name[name].nbytes / found.base.nbytes:.0%}"
        assert row[5] == f"{by_name[name].speed(1) / found.base.speed(1):.2f}x"
        assert row[6] == f"{by_name[name].speed(2) / found.base.speed(2):.2f}x"
    batches = page[page.index("## Decoding by batch") :]
    rows = cells_of([line for line in batches.splitlines() if line.startswith("|")])
    assert rows[0] == ["model", "1", "2", "behind the base"]
    order = [method.name for method in METHODS if method.name in MADE]
    assert [row[0] for row in rows[1:]] == ["bfloat16", *order]
    assert rows[1][1].startswith(f"{found.base.speed(1):.0f} (")
    assert (folder / "batches.png").read_bytes().startswith(b"\x89PNG")
    assert "for **latency**" in page
    assert "4-bit weights" in batches


def test_history(made):
    (line,) = (made[0].parent / "history.jsonl").read_text().splitlines()
    content = json.loads(line)
    assert content["what"].startswith("report of ")
    assert content["machine"] == made[2].head["device"]
    figures = content["figures"]
    assert list(figures) == [row.name for row in made[2].all_rows]
    for row in made[2].rows:
        assert figures[row.name]["kl"]["exact"] == pytest.approx(
            row.divergence["exact"].mean, rel=1e-3
        )
        assert figures[row.name]["tokens_per_second"]["2"] == pytest.approx(row.speed(2), rel=1e-3)


def test_goes_on(made, base, monkeypatch):
    """What is in report.json is not measured again, nor are models made that are there."""
    folder, models, found = made
    options: dict[str, Any] = {
        "keep": models,
        "batches": (1, 2),
        "numerics": "exact",
        **QUICK,
    }
    monkeypatch.setattr(making, "oneshot", lambda *args, **more: pytest.fail("made again"))
    rows = json.loads((folder / "report.json").read_text())
    again = qjax.report(base, folder=folder, methods=MADE, **options)
    assert again.all_rows == found.all_rows
    # As if cut short before its last two rows:
    cut = {**rows, "rows": [row for row in rows["rows"] if row["name"] == "q8_0"]}
    (folder / "report.json").write_text(json.dumps(cut))
    again = qjax.report(base, folder=folder, methods=MADE, **options)
    assert [row.name for row in again.rows] == [row.name for row in found.rows]
    assert again.base == found.base
    for before, after in zip(found.rows, again.rows, strict=True):
        assert (before == after) is (before.name == "q8_0")
        assert after.quantize_seconds == before.quantize_seconds
        assert after.nbytes == before.nbytes
        assert after.divergence["exact"].mean == before.divergence["exact"].mean


def test_other_runs_in_the_same_folders(made, base, tmp_path):
    folder, models, _ = made
    options: dict[str, Any] = {
        "methods": MADE,
        "batches": (1, 2),
        "numerics": "exact",
        **QUICK,
    }
    with pytest.raises(qjax.RequestError, match=r"settings: window 8, this would be with 10"):
        qjax.report(base, folder=folder, keep=models, **{**options, "window": 10})
    with pytest.raises(
        qjax.RequestError, match=r"made with .*'num_samples': 128.*'num_samples': 7"
    ):
        qjax.report(base, folder=tmp_path, keep=models, num_samples=7, **options)
    with pytest.raises(qjax.RequestError, match="holds something else"):
        qjax.report(base, folder=tmp_path, keep=folder, **options)
    (tmp_path / "report.json").write_text('{"format": 1}')
    with pytest.raises(qjax.RequestError, match="is no report that could go on"):
        qjax.report(base, folder=tmp_path, **options)


def test_errors(base, golden, tmp_path, monkeypatch):
    with pytest.raises(qjax.RequestError, match='needs a model beside the base, or methods="all"'):
        qjax.report(base, [], tmp_path)
    with pytest.raises(qjax.RequestError, match=r"method 'gtpq' is unknown \(did you mean 'gptq'"):
        qjax.report(base, folder=tmp_path, methods=["gtpq"])
    with pytest.raises(qjax.RequestError, match="numerics must be one of both, exact, fast"):
        qjax.report(base, [base], tmp_path, numerics="none")
    with pytest.raises(qjax.RequestError, match=r"batches must be different.*got \[0, 1\]"):
        qjax.report(base, [base], tmp_path, batches=(1, 0))
    with pytest.raises(qjax.RequestError, match=r"fp8 is the name of a method: write ./fp8"):
        qjax.report(base, ["fp8"], tmp_path)
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(qjax.UnsupportedError, match=r"matplotlib.*install 'qjax\[eval\]'"):
        qjax.report(base, [base], tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    with pytest.raises(qjax.RequestError, match="do not have the same tokens"):
        qjax.report(base, [golden / "gguf-mixtral-F32"], tmp_path, **QUICK)
