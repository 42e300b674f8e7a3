"""Continuations and documents, against float64 numpy on the logits of whole sequences."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import evaluate
from qjax.evaluate.continuations import continuations
from qjax.evaluate.rolling import rolling_pairs
from tests.evaluate.test_evaluate import log_softmax
from tests.programs import forward

LENGTH = 96


@pytest.fixture(scope="module")
def params(golden) -> qjax.Params:
    return qjax.load(golden / "gguf-Q4_1" / "model.gguf")


@pytest.fixture(scope="module")
def expected(params):
    """log p, and whether it is the likeliest, of each token of a continuation; float64."""

    def of(pairs):
        whole = [(*context, *continuation) for context, continuation in pairs]
        padded = np.zeros((len(pairs), LENGTH), np.int32)
        for row, ids in zip(padded, whole, strict=True):
            row[: len(ids)] = ids
        logits = np.asarray(forward(params, jnp.asarray(padded)), np.float64)
        for ids, rows, (context, continuation) in zip(whole, logits, pairs, strict=True):
            rows = log_softmax(rows[len(context) - 1 : len(ids) - 1])
            chances = rows[np.arange(len(continuation)), continuation]
            yield chances, (rows.argmax(-1) == continuation).all()

    return of


def test_continuations(params, expected):
    """Choices of one token and of several after the same long context, which go once and share
    pages; other contexts, in no order."""
    random = np.random.default_rng(0)
    vocabulary = params.config.vocab_size
    long, other = random.integers(0, vocabulary, (2, 75)).tolist()
    likeliest = int(np.argmax(np.asarray(forward(params, jnp.asarray(long)))[-1]))
    pairs = [
        (long, [likeliest]),
        (other[:3], long[:9]),
        (long, [5]),
        (long, [7, 9, 11]),
        (long[:70], long[70:]),
        (other, [1, 2]),
        ([3], [likeliest]),
        (long[:40] + other[:20], [5, 6]),
    ]
    found = continuations(params, pairs)
    for one, (logprobs, greedy) in zip(found, expected(pairs), strict=True):
        np.testing.assert_allclose(one.logprobs, logprobs, atol=2e-4)
        assert one.greedy is bool(greedy)
    assert found[0].greedy
    assert not found[2].greedy


def test_beginning_is_left_out(params, expected):
    """Of what is longer than the model reads at a time."""
    ids = np.random.default_rng(1).integers(0, params.config.vocab_size, 60).tolist()
    (found,) = continuations(params, [(ids[:56], ids[56:])], max_length=40)
    ((logprobs, _),) = expected([(ids[-41:56], ids[56:])])
    np.testing.assert_allclose(found.logprobs, logprobs, atol=2e-4)


def test_every_token_of_a_document_is_predicted_once():
    assert list(rolling_pairs(range(10), -1, 4)) == [
        ((-1,), (0, 1, 2, 3)),
        ((3,), (4, 5, 6, 7)),
        ((5, 6, 7), (8, 9)),
    ]
    assert list(rolling_pairs([7, 8], -1, 4)) == [((-1,), (7, 8))]
    assert list(rolling_pairs([], -1, 4)) == []


def test_rolling_perplexity(params, expected):
    """Of two documents, one of them longer than the window, words and bytes counted by hand."""
    documents = [
        "The quick brown  fox\njumps.",
        "Über größere Dinge wird später geredet werden. " * 2,
    ]
    found = evaluate.rolling_perplexity(params, documents, window=40)
    ids = [params.tokenizer.encode(text) for text in documents]
    first = [params.tokenizer.bos_id]
    assert 40 < len(ids[1]) <= 80
    assert len(ids[0]) <= 40
    pairs = [
        (first, ids[0]),
        (first, ids[1][:40]),
        (ids[1][-41:40], ids[1][40:]),
    ]
    loss = -sum(logprobs.sum() for logprobs, _ in expected(pairs))
    assert (found.words, found.bytes) == (5 + 15, 27 + 2 * 51)
    assert (found.tokens, found.documents, found.window) == (sum(map(len, ids)), 2, 40)
    assert found.word == pytest.approx(math.exp(loss / found.words), rel=1e-4)
    assert found.byte == pytest.approx(math.exp(loss / found.bytes), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(math.log2(found.byte), rel=1e-9)
    assert found.token == pytest.approx(math.exp(loss / found.tokens), rel=1e-4)


@pytest.mark.parametrize(
    ("pair", "keywords", "message"),
    [
        (([], [1]), {}, "and at least one before it, got 1 after 0"),
        (([1], []), {}, "a continuation must have 1 to"),
        (([1], [2, 3, 4]), {"max_length": 2}, "must have 1 to 2 tokens"),
        (([1], [2]), {"max_length": 0}, "max_length must be in"),
        (([1], [2]), {"numerics": "quick"}, "numerics must be 'fast' or 'exact'"),
    ],
)
def test_errors(params, pair, keywords, message):
    with pytest.raises(qjax.RequestError, match=message):
        continuations(params, [pair], **keywords)


def test_no_text(params):
    with pytest.raises(qjax.RequestError, match="no text to predict"):
        evaluate.rolling_perplexity(params, [" ", "\n"])
