"""Perplexity and divergence, against float64 numpy on logits that other tools gave."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import evaluate
from qjax.cli.main import main
from qjax.evaluate import logits
from qjax.evaluate.divergence import compare
from qjax.evaluate.logits import reader
from qjax.evaluate.perplexity import window_losses
from qjax.evaluate.windows import targets_of, windows
from tests.programs import forward

TEXT = "The quick brown fox jumps over the lazy dog. " * 12


@pytest.fixture(scope="module")
def params(golden) -> qjax.Params:
    return qjax.load(golden / "gguf-Q4_1" / "model.gguf")


@pytest.fixture(scope="module")
def reference(golden):
    found = np.load(golden / "gguf-Q4_1" / "reference.npz")
    return found["ids_0"], found["logits_0"].astype(np.float64)


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_losses_of_a_window(params, reference):
    ids, logits = reference
    half = len(ids) // 2
    right = -log_softmax(logits)[np.arange(half, len(ids) - 1), ids[half + 1 :]]
    model = reader(params)
    (hidden,) = model.read(ids[None])
    np.testing.assert_allclose(window_losses(model, ids, hidden), right, atol=1e-4)


def test_windows_are_those_of_llama_perplexity(params, monkeypatch):
    """Each begins anew, the tokens go on, and the rest is left out."""
    whole = params.tokenizer.encode(TEXT)
    found = windows(params, TEXT, 32)
    begin = params.tokenizer.encode("")
    flat = np.array(whole[: len(whole) // 32 * 32]).reshape(-1, 32)
    np.testing.assert_array_equal(found[:, 1:], flat[:, 1:])
    np.testing.assert_array_equal(found[:, 0], begin[0] if begin else flat[:, 0])
    np.testing.assert_array_equal(windows(params, TEXT, 32, 2), found[:2])


def test_several_windows_at_a_time(params, monkeypatch):
    """As on an accelerator: two and then the last one."""
    ids = windows(params, TEXT, 48)[:3]
    model = reader(params)
    one_by_one = [np.asarray(hidden) for hidden in model.read(ids)]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(logits, "TOKENS", 100)
    together = [np.asarray(hidden) for hidden in model.read(ids)]
    np.testing.assert_allclose(together, one_by_one, atol=1e-4)


def test_perplexity(params):
    found = evaluate.perplexity(params, TEXT, window=48, max_windows=2)
    ids = windows(params, TEXT, 48, 2)
    logits = np.asarray(forward(params, jnp.asarray(ids)), np.float64)
    losses = -np.take_along_axis(log_softmax(logits)[:, 24:-1], ids[:, 25:, None], -1).reshape(-1)
    assert (found.tokens, found.windows, found.window) == (46, 2, 48)
    assert found.value == pytest.approx(np.exp(losses.mean()), rel=1e-4)
    spread = np.exp(losses.mean()) * losses.std(ddof=1) / np.sqrt(46)
    assert found.error == pytest.approx(spread, rel=1e-3)


def test_divergence_of_known_logits():
    """More positions than go at a time, where the two agree on some of the likeliest tokens."""
    random = np.random.default_rng(0)
    base = (random.standard_normal((150, 50)) * 2).astype(np.float32)
    other = base + random.standard_normal(base.shape).astype(np.float32)
    tokens = random.integers(0, 50, 300).astype(np.int32)
    pairs = [(jnp.asarray(base[i:j]), jnp.asarray(other[i:j])) for i, j in ((0, 128), (128, 150))]
    found = compare(pairs, targets_of(tokens))
    divergence, same, *losses, squares, base_squares, largest = found
    base, other = base[:-1].astype(np.float64), other[:-1].astype(np.float64)
    p, q = log_softmax(base), log_softmax(other)
    np.testing.assert_allclose(divergence, (np.exp(p) * (p - q)).sum(-1), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(same, p.argmax(-1) == q.argmax(-1))
    assert 0 < same.mean() < 1
    for loss, x in zip(losses, (p, q), strict=True):
        np.testing.assert_allclose(loss, -x[np.arange(149), tokens[151:]], rtol=1e-5)
    np.testing.assert_allclose(squares, ((other - base) ** 2).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(base_squares, (base**2).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(largest, np.abs(other - base).max(-1), rtol=1e-5)


def test_divergence_of_a_model(params, golden):
    same = evaluate.kl_divergence(params, params, TEXT, window=48)
    assert same.mean < 1e-9
    assert (same.same_top, same.delta_rms, same.logit_error, same.logit_max) == (1, 0, 0, 0)
    rounded = evaluate.kl_divergence(params, params, TEXT, window=48, kv_cache_dtype="int8")
    assert 1e-6 < rounded.mean < rounded.quantiles[1.0]
    assert rounded.base == same.base
    ids = windows(params, TEXT, 48)
    both = (forward(params, jnp.asarray(ids), kv_cache_dtype=dtype) for dtype in ("auto", "int8"))
    p, q = (np.asarray(logits, np.float64)[:, 24:-1] for logits in both)
    relative = np.sqrt(((q - p) ** 2).sum() / (p**2).sum())
    assert rounded.logit_error == pytest.approx(relative, rel=1e-2)
    assert rounded.logit_max == pytest.approx(np.abs(q - p).max(), rel=1e-2)
    divergence = (np.exp(log_softmax(p)) * (log_softmax(p) - log_softmax(q))).sum(-1)
    assert rounded.mean == pytest.approx(divergence.mean(), rel=1e-2)
    assert list(rounded.quantiles.values()) == sorted(rounded.quantiles.values())
    other = qjax.load(golden / "gguf-mixtral-F32")
    with pytest.raises(qjax.RequestError, match="do not have the same tokens"):
        evaluate.kl_divergence(params, other, TEXT, window=16)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"window": 512}, "tokens, which is less than two windows of 512"),
        ({"window": 3}, "a window must have 4 to"),
        ({"window": 16, "max_windows": 0}, "number of windows must be at least 1, got 0"),
        ({"window": 16, "numerics": "quick"}, "numerics must be 'fast' or 'exact'"),
        ({"window": 16, "kv_cache_dtype": "int3"}, "kv_cache_dtype must be one of"),
    ],
)
def test_errors(params, keywords, message):
    with pytest.raises(qjax.RequestError, match=message):
        evaluate.perplexity(params, TEXT, **keywords)


def test_command_line(params, golden, tmp_path, capsys):
    model = str(golden / "gguf-Q4_1" / "model.gguf")
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    common = ("-f", str(file), "--window", "48", "--max-windows", "2")

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as info:
            main(args)
        return int(info.value.code or 0), *capsys.readouterr()

    found = evaluate.perplexity(params, TEXT, window=48, max_windows=2)
    code, out, _ = run("eval", "ppl", model, *common)
    assert (code, out) == (
        0,
        f"perplexity {found.value:.4f} ± {found.error:.4f} (46 tokens, 2 windows of 48)\n",
    )
    code, out, _ = run("eval", "ppl", model, *common, "--output", "json")
    assert json.loads(out)["tokens"] == 46
    documents = tmp_path / "documents.jsonl"
    documents.write_text('{"text": "One fox."}\n\n{"text": "Two dogs jump."}\n')
    rolling = evaluate.rolling_perplexity(params, ["One fox.", "Two dogs jump."])
    by_lm_eval = ("eval", "ppl", model, "-f", str(documents), "--convention", "lm-eval")
    code, out, _ = run(*by_lm_eval)
    assert (code, out) == (0, f"{rolling}\n")
    assert "2 documents" in out
    code, out, err = run(*by_lm_eval, "--max-windows", "2")
    assert "qjax: --max-windows: lm-eval counts whole documents" in err
    documents.write_text('{"text": "One fox."}\n{"page": "Two dogs jump."}\n')
    code, out, err = run(*by_lm_eval)
    assert 'document 2 is not {"text": "..."}' in err
    other = str(golden / "gguf-Q4_1")
    code, out, _ = run("eval", "kld", model, model, other, *common, "--kv-cache-dtype", "int8")
    assert code == 0
    assert f"| {model} (base) | {found} | | |" in out
    assert [line.partition(" | ")[0] for line in out.splitlines()[-2:]] == [
        f"| {model}",
        f"| {other}",
    ]
    code, out, _ = run("eval", "kld", model, model, *common, "--output", "json")
    assert [(row["model"], row["mean"] < 1e-9, row["tokens"]) for row in json.loads(out)] == [
        (model, True, 46)
    ]
    code, out, err = run("eval", "ppl", model, "-f", str(tmp_path / "none"))
    assert (code, out) == (1, "")
    assert "qjax: cannot read the text" in err
