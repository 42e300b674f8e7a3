"""Figures of timelines that are made up, against sums by hand, numpy, and vLLM's definitions."""

import json
import math

import numpy as np
import pytest

from qjax.bench.serving.client import Outcome, Sample, Timeline
from qjax.bench.serving.metrics import flat, metrics, parse_objectives
from qjax.bench.serving.summary import summary
from qjax.errors import RequestError, ServingError

# Sent at 10, 10 and 11 s. The first two overlap; the third begins as the first ends.
OUTCOMES = [
    Outcome(10.0, 5, 3, ttft=0.5, itl=(0.25, 0.25), latency=1.0, usage=True),
    Outcome(10.0, 7, 1, ttft=2.0, latency=2.0, usage=True),
    Outcome(11.0, 9, 5, cached=8, ttft=0.25, itl=(0.25, 0.5), latency=1.0, usage=True),
    Outcome(12.0, 100, error="HTTP 500"),
]


def test_by_hand() -> None:
    found = metrics(OUTCOMES, 4.0, percentiles=(50, 99), objectives={"ttft": 500, "tpot": 200})
    assert (found.completed, found.failed) == (3, 1)
    assert (found.total_input_tokens, found.total_output_tokens) == (21, 9)
    assert found.total_cached_tokens == 8
    assert found.request_throughput == 3 / 4
    assert found.output_throughput == 9 / 4
    assert found.total_token_throughput == 30 / 4
    # Time per token of the first is 250 ms, over its 200; the second's first token took 2000 ms.
    assert found.request_goodput == 1 / 4
    assert found.times["ttft"].mean == pytest.approx(2750 / 3)
    assert found.times["ttft"].median == 500
    # (1 - 0.5) / (3 - 1) and (1 - 0.25) / (5 - 1); one token has none.
    assert found.times["tpot"].mean == pytest.approx((250 + 187.5) / 2)
    assert found.times["itl"].mean == pytest.approx((250 + 250 + 250 + 500) / 4)
    assert found.times["itl"].percentiles[50] == 250
    assert found.times["e2el"].mean == pytest.approx(4000 / 3)
    # Pieces come 0.5, 0.75, 1; 2; and 1.25, 1.5, 2 seconds after the first request.
    assert found.max_output_tokens_per_s == 3
    assert found.max_concurrent_requests == 2
    assert found.counted_by == "usage"


def test_spreads_are_numpys() -> None:
    rng = np.random.default_rng(0)
    ttft, latency = rng.uniform(0, 1, 50), rng.uniform(1, 9, 50)
    outcomes = [
        Outcome(0.0, 1, 11, ttft=float(first), latency=float(last))
        for first, last in zip(ttft, latency, strict=True)
    ]
    times = metrics(outcomes, 1.0, percentiles=(25, 99.5)).times
    for name, seconds in {
        "ttft": ttft,
        "tpot": (latency - ttft) / 10,
        "e2el": latency,
    }.items():
        assert times[name].mean == pytest.approx(1000 * np.mean(seconds))
        assert times[name].median == pytest.approx(1000 * np.median(seconds))
        assert times[name].std == pytest.approx(1000 * np.std(seconds))
        assert times[name].percentiles == pytest.approx(
            {25: 1000 * np.percentile(seconds, 25), 99.5: 1000 * np.percentile(seconds, 99.5)}
        )


def test_nothing_succeeded() -> None:
    found = metrics([OUTCOMES[3]], 1.0)
    assert (found.completed, found.failed, found.output_throughput) == (0, 1, 0)
    assert found.times["ttft"].mean == found.times["itl"].percentiles[99] == 0
    assert found.request_goodput is None
    json.dumps(flat(found), allow_nan=False)


def test_one_token_meets_any_time_per_token() -> None:
    assert metrics([OUTCOMES[1]], 1.0, objectives={"tpot": 0}).request_goodput == 1


@pytest.mark.parametrize("pair", ["ttft", "itl:5", "ttft:x", "tpot:-1", "e2el:nan", ":5"])
def test_wrong_objectives(pair: str) -> None:
    with pytest.raises(RequestError, match="goodput"):
        parse_objectives(["ttft:1", pair])
    assert parse_objectives(["ttft:500", "e2el:2.5"]) == {"ttft": 500, "e2el": 2.5}


def test_names_and_block_are_vllms() -> None:
    found = metrics(OUTCOMES, 4.0, percentiles=(50, 99.9), objectives={"ttft": 500})
    figures = flat(found, ["ttft", "e2el"])
    assert {"mean_ttft_ms", "median_ttft_ms", "std_e2el_ms", "p50_ttft_ms", "p99.9_e2el_ms"} <= (
        figures.keys()
    )
    assert not any("itl" in name for name in figures)
    lines = summary(found, times=["ttft"], request_rate=2, max_concurrency=8).splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    for line in (
        "Successful requests:                     3",
        "Failed requests:                         1",
        "Maximum request concurrency:             8",
        "Request rate configured (RPS):           2.00",
        "Total input tokens:                      21",
        "Request goodput (req/s):                 0.50",
        "---------------Time to First Token----------------",
        "Median TTFT (ms):                        500.00",
        "P99.9 TTFT (ms):                         1997.00",
    ):
        assert line in [each.rstrip() for each in lines]
    assert "Inter-token Latency" not in "".join(lines)
    assert "rate configured" not in summary(found, request_rate=math.inf)


def timeline(*events: tuple[float, object]) -> Outcome:
    made = Timeline(Sample("x", 7, 9), 100.0)
    for now, event in events:
        made.add(event if isinstance(event, bytes) else json.dumps(event).encode(), now)
    return made.outcome()


def text(piece: str, reason: str | None = None) -> dict:
    return {"choices": [{"index": 0, "text": piece, "finish_reason": reason}]}


USAGE = {"prompt_tokens": 6, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 2}}


def test_pieces_of_a_stream() -> None:
    found = timeline(
        (101.0, text("a")),
        (101.5, text("")),  # a special token
        (103.0, text("bc")),
        (103.25, text("", "length")),
        (110.0, {"choices": [], "usage": USAGE}),
        (110.0, b"[DONE]"),
    )
    expected = Outcome(100.0, 6, 4, 2, 1.0, (0.5, 1.5, 0.25), 3.25, usage=True)
    assert found == expected


def test_without_usage_pieces_of_text_are_counted() -> None:
    found = timeline((101.0, text("a")), (102.0, text("b")), (102.0, text("", "stop")))
    assert (found.prompt_len, found.output_len, found.usage, found.error) == (7, 2, False, "")


def test_opening_a_chat_message_is_no_token() -> None:
    def delta(**fields: object) -> dict:
        return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}

    found = timeline(
        (100.5, delta(role="assistant", content="")),
        (101.0, delta(content="a")),
        (102.0, delta(tool_calls=[{"index": 0}])),
        (103.0, {"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": USAGE}),
    )
    assert (found.ttft, found.itl, found.latency) == (1.0, (1.0, 1.0), 3.0)
    with_text = timeline((100.5, delta(role="assistant", content="a")), (101.0, b"[DONE]"))
    assert (with_text.ttft, with_text.output_len) == (0.5, 1)


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (b"{", "no JSON"),
        (b"5", "tells of an error"),
        ({"error": {"message": "out of pages", "code": 500}}, "out of pages"),
    ],
)
def test_faulty_events(event: object, message: str) -> None:
    with pytest.raises(ServingError, match=message):
        timeline((101.0, text("a")), (102.0, event))


def test_streams_that_stop_early() -> None:
    assert "without a finish_reason" in timeline((101.0, text("a"))).error
    assert "no token" in timeline((101.0, b"[DONE]")).error
