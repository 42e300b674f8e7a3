"""Numbers for Prometheus, under the names that vLLM gives them, with `qjax:` before."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from qjax.engine.stats import EngineStats

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_TTFT += (20, 40, 80, 160, 640, 2560)
_ITL = (
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
_E2E = (
    0.3,
    0.5,
    0.8,
    1,
    1.5,
    2,
    2.5,
    5,
    10,
    15,
    20,
    30,
    40,
    50,
    60,
    120,
    240,
    480,
    960,
    1920,
    7680,
)


class Metrics:
    """A registry of its own, so that several servers in one process do not mix.

    Args:
      model_name: the label of all of them.
      stats: of the engine; None while there is none.
    """

    def __init__(self, model_name: str, stats: Callable[[], EngineStats | None]):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(model_name, stats))

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(
                f"qjax:{name}", what, ["model_name"], buckets=buckets, registry=self._registry
            )
            return made.labels(model_name)

        self._first = histogram("time_to_first_token_seconds", "Time to first token.", _TTFT)
        self._next = histogram("inter_token_latency_seconds", "Time between two tokens.", _ITL)
        self._whole = histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its last token.", _E2E
        )
        self._success = Counter(
            "qjax:request_success",
            "Sequences that ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._model_name = model_name

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def next_tokens(self, seconds: float, count: int) -> None:
        """`count` tokens that came together, `seconds` after those before them."""
        for _ in range(count):
            self._next.observe(seconds / count)

    def ended(self, seconds: float, reason: str) -> None:
        """A sequence ended: "stop", "length" or "abort"."""
        if reason != "abort":
            self._whole.observe(seconds)
        self._success.labels(self._model_name, reason).inc()

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """What the engine counts itself, read when it is asked for."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats | None]):
        self._model_name = model_name
        self._stats = stats

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        stats = self._stats()
        if stats is None:
            return
        used = 1 - stats.num_free_blocks / max(1, stats.num_blocks)
        gauges = {
            "num_requests_running": ("Sequences that run.", stats.num_running),
            "num_requests_waiting": ("Sequences that wait to run.", stats.num_waiting),
            "kv_cache_usage_perc": ("Share of the cache in use, 1 for all of it.", used),
        }
        counters = {
            "prefix_cache_queries": ("Tokens looked up.", stats.prefix_cache_queries),
            "prefix_cache_hits": ("Tokens found.", stats.prefix_cache_hits),
            "num_preemptions": ("Sequences sent back to wait.", stats.num_preemptions),
            "prompt_tokens": ("Tokens of prompts.", stats.prompt_tokens),
            "generation_tokens": ("Generated tokens.", stats.generation_tokens),
        }
        for kind, found in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (what, value) in found.items():
                family = kind(f"qjax:{name}", what, labels=["model_name"])
                family.add_metric([self._model_name], value)
                yield family
