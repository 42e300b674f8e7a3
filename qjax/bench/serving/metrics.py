"""What serving comes to, by the definitions of vLLM's `bench serve`, under its names.

Per request: TTFT is the time to the first token; E2EL that to the last; TPOT is
(E2EL - TTFT) / (output tokens - 1), of requests with at least two; ITL are the times between two
pieces of a stream, those of all requests in one pool. Failed requests count in `failed` alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qjax.bench.serving.client import Outcome
from qjax.errors import RequestError

# Name -> what it is called above its figures.
TIMES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
OBJECTIVES = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class Spread:
    """Of times, in milliseconds; all are 0 where there is none."""

    mean: float
    median: float
    std: float
    percentiles: dict[float, float]


@dataclass(frozen=True)
class Metrics:
    """Rates are per second of `duration`, which is from the first request to the last answer.

    Attributes:
      total_output_tokens: `counted_by` "usage" of the server, "pieces" of text, or "both".
      request_goodput: requests a second that met all objectives; None where none were given.
      max_output_tokens_per_s: pieces in the best whole second.
      max_concurrent_requests: most at any time.
      times: of each of `TIMES`.
    """

    duration: float
    completed: int
    failed: int
    total_input_tokens: int
    total_cached_tokens: int
    total_output_tokens: int
    counted_by: str
    request_throughput: float
    request_goodput: float | None
    output_throughput: float
    total_token_throughput: float
    max_output_tokens_per_s: float
    max_concurrent_requests: int
    times: dict[str, Spread]


def metrics(
    outcomes: Sequence[Outcome],
    duration: float,
    *,
    percentiles: Sequence[float] = (99,),
    objectives: Mapping[str, float] | None = None,
) -> Metrics:
    """Args:
    duration: seconds. percentiles: in [0, 100].
    objectives: most milliseconds of "ttft", "tpot" or "e2el" of a good request.
    """
    good = [outcome for outcome in outcomes if not outcome.error]
    samples = {
        "ttft": [one.ttft for one in good],
        "tpot": [_tpot(one) for one in good if one.output_len > 1],
        "itl": [time for one in good for time in one.itl],
        "e2el": [one.latency for one in good],
    }
    inputs, outputs = sum(one.prompt_len for one in good), sum(one.output_len for one in good)
    counted = {"usage" if one.usage else "pieces" for one in good}
    return Metrics(
        duration=duration,
        completed=len(good),
        failed=len(outcomes) - len(good),
        total_input_tokens=inputs,
        total_cached_tokens=sum(one.cached for one in good),
        total_output_tokens=outputs,
        counted_by="both" if len(counted) > 1 else "".join(counted),
        request_throughput=len(good) / duration,
        request_goodput=sum(_meets(one, objectives) for one in good) / duration
        if objectives
        else None,
        output_throughput=outputs / duration,
        total_token_throughput=(inputs + outputs) / duration,
        max_output_tokens_per_s=_most_in_a_second(good),
        max_concurrent_requests=_most_at_a_time(good),
        times={name: _spread(samples[name], percentiles) for name in TIMES},
    )


def parse_objectives(pairs: Sequence[str]) -> dict[str, float]:
    """Milliseconds by name, from "ttft:500" and the like.

    Raises:
      RequestError: one of them is something else.
    """
    found = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = math.nan
        if name not in OBJECTIVES or not found[name] >= 0:
            raise RequestError(
                f"goodput must be of {', '.join(OBJECTIVES)}, as ttft:500 in milliseconds, "
                f"got {pair!r}."
            )
    return found


def flat(found: Metrics, times: Sequence[str] = tuple(TIMES)) -> dict[str, Any]:
    """The figures under the names of vLLM's result files."""
    rest = {name: value for name, value in vars(found).items() if name != "times"}
    for name in times:
        spread = found.times[name]
        rest |= {f"{kind}_{name}_ms": getattr(spread, kind) for kind in ("mean", "median", "std")}
        rest |= {f"p{p:g}_{name}_ms": value for p, value in spread.percentiles.items()}
    return rest


def _tpot(one: Outcome) -> float:
    return (one.latency - one.ttft) / (one.output_len - 1)


def _meets(one: Outcome, objectives: Mapping[str, float]) -> bool:
    """One token has no time per further token, and so meets any."""
    tpot = _tpot(one) if one.output_len > 1 else 0.0
    seconds = {"ttft": one.ttft, "tpot": tpot, "e2el": one.latency}
    return all(seconds[name] <= most / 1000 for name, most in objectives.items())


def _spread(seconds: list[float], percentiles: Sequence[float]) -> Spread:
    values = np.array(seconds or [0.0]) * 1000
    return Spread(
        float(values.mean()),
        float(np.median(values)),
        float(values.std()),
        {p: float(np.percentile(values, p)) for p in percentiles},
    )


def _most_in_a_second(good: Sequence[Outcome]) -> float:
    if not good:
        return 0.0
    first = min(one.start for one in good)
    arrived = [one.start - first + one.ttft + np.cumsum([0.0, *one.itl]) for one in good]
    return float(np.bincount(np.concatenate(arrived).astype(int)).max())


def _most_at_a_time(good: Sequence[Outcome]) -> int:
    # Of an end and a start at the same time, the end comes first.
    changes = sorted(
        change for one in good for change in ((one.start, 1), (one.start + one.latency, -1))
    )
    return int(np.cumsum([change for _, change in changes]).max()) if changes else 0
