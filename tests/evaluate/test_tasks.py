"""Tasks: their items, and, where lm-eval is installed, lm-eval on qjax."""

import math
import sys

import numpy as np
import pytest

import qjax
from qjax import evaluate
from qjax.cli.main import main
from qjax.evaluate import harness, tasks
from qjax.evaluate.rolling import rolling_pairs

# What lm-eval 0.4.13 gave with its own "hf" model, transformers 5.17 and torch 2.13, float32.
PAIRS = {
    ("The capital of France is", " Paris"): -23.019424438476562,
    ("The capital of France is ", " London now"): -48.10441970825195,
    ("", "Hello there"): -24.448514938354492,
    ("Q: 2+2?\nA:", " 4"): -8.606860160827637,
    ("Q: 2+2?\nA:", " 5"): -10.548559188842773,
}
LICENSE = -6384.403076171875  # the first 3,000 characters
FOX = -38.709266662597656  # "A fox."
GENERATED = {"The capital of France is": " a single", "Once upon": " 10000000000"}


@pytest.fixture(scope="module")
def params(golden) -> qjax.Params:
    return qjax.load(golden / "base-tiny-llama")


def test_items():
    """As many as are told of, no two alike, and with answers that are among the choices."""
    for name, keys in (
        ("qjax_facts", {"question", "choices", "answer"}),
        ("qjax_sense", {"start", "endings", "answer"}),
        ("qjax_cloze", {"text", "last"}),
        ("qjax_sums", {"question", "answer"}),
    ):
        rows = tasks.items(name)
        assert len({tuple(map(str, row.values())) for row in rows}) == len(rows) == 100
        assert all(row.keys() == keys for row in rows)
    for row in tasks.items("qjax_facts"):
        assert len(set(row["choices"])) == 4
        assert 0 <= row["answer"] < 4
    for row in tasks.items("qjax_sense"):
        assert len(set(row["endings"])) == 2
        assert 0 <= row["answer"] < 2
    for row in tasks.items("qjax_cloze"):
        assert row["last"] == row["last"].strip()
        assert row["text"] == row["text"].strip()
    signs = {"plus": int.__add__, "minus": int.__sub__, "times": int.__mul__}
    for row in tasks.items("qjax_sums"):
        left, sign, right = row["question"].split()
        assert row["answer"] == str(signs[sign](int(left), int(right)))


def test_without_lm_eval(monkeypatch, golden, capsys):
    for name in ("lm_eval", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(harness, "model_class", harness.model_class.__wrapped__)
    with pytest.raises(SystemExit) as info:
        main(["eval", "tasks", str(golden / "base-tiny-llama")])
    assert info.value.code == 1
    assert "pip install 'qjax[eval]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def model(params):
    return harness.model_class()(params)


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    return [Instance(kind, {}, args, 0) for args in arguments]


@pytest.mark.peer
def test_model(model):
    text = (tasks.ITEMS.parents[2] / "LICENSE").read_text()[:3000]
    found = model.loglikelihood(requests("loglikelihood", *PAIRS))
    np.testing.assert_allclose([one for one, _ in found], list(PAIRS.values()), atol=1e-3)
    rolling = model.loglikelihood_rolling(requests("loglikelihood_rolling", (text,), ("A fox.",)))
    np.testing.assert_allclose(rolling, [LICENSE, FOX], rtol=1e-6)
    sampling = {"until": ["\n", " the"], "max_gen_toks": 12}
    texts = model.generate_until(
        requests("generate_until", *((prompt, sampling) for prompt in GENERATED))
    )
    assert texts == list(GENERATED.values())


@pytest.mark.peer
def test_perplexity_is_that_of_lm_eval(params):
    """Its own aggregation of the likelihoods that its own model gave."""
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity  # pyright: ignore
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore

    text = (tasks.ITEMS.parents[2] / "LICENSE").read_text()[:3000]
    found = evaluate.rolling_perplexity(params, [text, "A fox."])
    sizes = [len(one.encode()) for one in (text, "A fox.")]
    pairs = list(zip([LICENSE, FOX], sizes, strict=True))
    assert found.byte == pytest.approx(weighted_perplexity(pairs), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(bits_per_byte(pairs), rel=1e-6)
    assert found.word == pytest.approx(math.exp(-(LICENSE + FOX) / found.words), rel=1e-6)
    for count in (1, 7, 8, 9, 30):
        ids = list(range(count))
        windows = get_rolling_token_windows(ids, -1, 8, 1)
        theirs = [tuple(map(tuple, make_disjoint_window(one))) for one in windows]
        assert [tuple(map(tuple, pair)) for pair in rolling_pairs(ids, -1, 8)] == theirs


@pytest.mark.peer
def test_chat(model):
    history = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Well, "}]
    whole = model.apply_chat_template(history[:1])
    assert "Hi." in whole
    begun = model.apply_chat_template(history, add_generation_prompt=False)
    assert begun.endswith("Well,")
    assert model.chat_template(True) == model.params.tokenizer.chat_template.text


@pytest.mark.peer
def test_offline_tasks(golden, capsys):
    """Each kind of request, through lm-eval and its table."""
    common = ("eval", "tasks", str(golden / "base-tiny-llama"), "--limit", "2")
    with pytest.raises(SystemExit) as info:
        main(common)
    out = capsys.readouterr().out
    assert not info.value.code
    for name in tasks.OFFLINE:
        assert f"|{name}" in out
    with pytest.raises(SystemExit):
        main([*common, "--tasks", "qjax_fact,qjax_sums"])
    assert "lm-eval knows no task qjax_fact; without network" in capsys.readouterr().err


@pytest.mark.peer
def test_by_name(golden):
    """As lm-eval's own command asks for it, which always names a device."""
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    harness.model_class()
    found = simple_evaluate(
        model="qjax",
        model_args=f"pretrained={golden / 'base-tiny-llama'},max_length=128",
        device="cuda:0",
        batch_size=1,
        tasks=[tasks.configured("qjax_sense")],
        task_manager=TaskManager(include_defaults=False),
        limit=2,
        bootstrap_iters=0,
    )
    assert found["results"]["qjax_sense"]["acc,none"] in (0, 0.5, 1)
    assert found["samples"]["qjax_sense"][0]["doc"] == tasks.items("qjax_sense")[0]
