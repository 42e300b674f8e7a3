"""The figures as vLLM's `bench serve` prints them."""

import math
from collections.abc import Sequence

from qjax.bench.serving.metrics import TIMES, Metrics

_WIDTH = 50


def summary(
    found: Metrics,
    *,
    times: Sequence[str] = tuple(TIMES),
    request_rate: float = math.inf,
    max_concurrency: int | None = None,
) -> str:
    """Args:
    times: which of `TIMES` are shown.
    """
    lines = [f"{' Serving Benchmark Result ':=^{_WIDTH}}"]

    def line(name: str, value: float | int | str) -> None:
        lines.append(f"{name:<40} {f'{value:.2f}' if isinstance(value, float) else value:<10}")

    line("Successful requests:", found.completed)
    line("Failed requests:", found.failed)
    if max_concurrency is not None:
        line("Maximum request concurrency:", max_concurrency)
    if not math.isinf(request_rate):
        line("Request rate configured (RPS):", float(request_rate))
    line("Benchmark duration (s):", found.duration)
    line("Total input tokens:", found.total_input_tokens)
    if found.total_cached_tokens:
        line("Of them from the server's cache:", found.total_cached_tokens)
    line("Total generated tokens:", found.total_output_tokens)
    line("Generated tokens counted by:", found.counted_by or "-")
    line("Request throughput (req/s):", found.request_throughput)
    if found.request_goodput is not None:
        line("Request goodput (req/s):", found.request_goodput)
    line("Output token throughput (tok/s):", found.output_throughput)
    line("Peak output token throughput (tok/s):", found.max_output_tokens_per_s)
    line("Peak concurrent requests:", found.max_concurrent_requests)
    line("Total token throughput (tok/s):", found.total_token_throughput)
    for name in times:
        spread = found.times[name]
        lines.append(f"{TIMES[name]:-^{_WIDTH}}")
        line(f"Mean {name.upper()} (ms):", spread.mean)
        line(f"Median {name.upper()} (ms):", spread.median)
        for p, value in spread.percentiles.items():
            line(f"P{p:g} {name.upper()} (ms):", value)
    lines.append("=" * _WIDTH)
    return "\n".join(lines)
