"""What a report says in words, of figures that are put together here."""

from typing import Any

import pytest

from qjax.bench import BenchRow
from qjax.evaluate import Divergence, Perplexity
from qjax.report import ModelRow, Report, words

BATCHES = (1, 4, 16)


def row(name, bits, megabytes, speeds, perplexity, kl):
    decode = tuple(
        BenchRow("tg8", batch, speed, 0.0, 1.0, "bfloat16", 100, 1e9, 0.5)
        for batch, speed in zip(BATCHES, speeds, strict=True)
    )
    read = Perplexity(perplexity, 0.1, 100, 2, 8)
    divergence = Divergence(read, read, kl, 0.0, {0.99: kl}, 0.9, 0.0, 0.0, 0.0, 100)
    return ModelRow(
        name=name,
        method="",
        qtype="",
        activation="",
        bits=bits,
        weights=1_000_000,
        nbytes=int(megabytes * 1e6),
        stored=0,
        quantize_seconds=None,
        load_seconds=1.0,
        prefill=decode[0],
        decode=decode,
        perplexity={"exact": read, "fast": read},
        divergence={} if name == "bfloat16" else {"exact": divergence, "fast": divergence},
    )


BASE = row("bfloat16", 16, 2.0, (100, 300, 800), 10.0, 0.0)
EIGHT = row("int8", 8.1, 1.0, (150, 500, 1500), 10.1, 0.002)
FOUR = row("gptq", 4.2, 0.6, (250, 600, 900), 11.0, 0.05)
SMALL = row("nvfp4", 4.5, 0.55, (80, 200, 700), 12.0, 0.2)


def report(*rows: ModelRow, numerics: tuple[str, ...] = ("exact", "fast")) -> Report:
    settings: dict[str, Any] = {"batches": list(BATCHES), "numerics": list(numerics)}
    return Report(BASE, rows, {"device": "Abacus", "processors": 2}, settings)


@pytest.mark.parametrize(
    ("ours", "theirs", "at"),
    [
        ((3, 3, 1), (1, 2, 2), 16),
        ((3, 1, 1), (1, 2, 2), 4),
        ((1, 1, 1), (2, 1, 2), 1),
        ((1, 3, 3), (2, 2, 2), None),
        ((3, 1, 1), (1, 2, 1), 4),
        ((1, 3, 1), (2, 2, 2), 16),
    ],
)
def test_overtaken(ours, theirs, at):
    """From there on, not at one batch between two where it leads."""
    assert words.overtaken(BATCHES, ours, theirs) == at


def test_crossover():
    assert words.crossover(report(EIGHT, FOUR, SMALL)) == 16
    assert words.crossing(report(EIGHT, FOUR, SMALL)) == (
        "4-bit weights stop winning at 16 sequences: from there on others are as fast or faster, "
        "there int8, 8 bits a weight."
    )
    assert words.crossover(report(FOUR)) is None
    assert words.crossing(report(FOUR)) == (
        "4-bit weights (gptq) decode fastest at 16 sequences, the largest batch that was measured."
    )
    assert words.crossing(report(SMALL)) == (
        "4-bit weights decode fastest at no batch from 1 on: bfloat16, 16 bits a weight, is faster."
    )
    assert words.crossing(report(EIGHT)) == ""
    assert [words.behind(report(EIGHT, FOUR, SMALL), row) for row in (EIGHT, FOUR, SMALL)] == [
        None,
        None,
        1,
    ]


def test_verdict():
    assert words.verdict(report(EIGHT, FOUR, SMALL)) == (
        "On Abacus, 2 processors: for **latency**, gptq, 250 tokens/s of one sequence, 2.50 times "
        "bfloat16's, at a KL divergence of 0.05 in fast numerics; for **throughput**, int8, 1500 "
        "tokens/s of 16 sequences, 1.88 times bfloat16's, at a KL divergence of 0.002 in fast "
        "numerics; for **size**, nvfp4, 0.6 MB or 28% of bfloat16, at a KL divergence of 0.2; for "
        "**accuracy**, int8, a KL divergence of 0.002 at 50% of the memory. Of those that raise "
        "perplexity by at most 2%, int8 is the fastest at one sequence, and the smallest."
    )


def test_verdict_where_nothing_gains():
    text = words.verdict(report(SMALL))
    assert "for **latency**, bfloat16 itself, 100 tokens/s of one sequence;" in text
    assert "for **throughput**, bfloat16 itself, 800 tokens/s of 16 sequences;" in text
    assert text.endswith("None keeps perplexity within 2% of bfloat16's.")
    assert words.rise(report(SMALL), SMALL, "exact") == pytest.approx(0.2)
