"""A sequence's tokens do not depend on what else is served, or on what the cache holds already."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qjax
from qjax.engine.scheduler import Plan
from tests.engine.pages import leave

COUNT, NEW = 64, 20
MODELS = ("gguf-Q4_1/model.gguf", "gguf-gemma3-Q5_0/model.gguf", "ct-int8-w8a8-dyn-asym")
SLOW = pytest.mark.slow


@pytest.fixture(
    scope="module", params=[MODELS[0], *(pytest.param(name, marks=SLOW) for name in MODELS[1:])]
)
def params(golden: Path, request: pytest.FixtureRequest) -> qjax.Params:
    return qjax.load(golden / request.param)


def requests() -> list[tuple[tuple[int, ...], qjax.SamplingParams]]:
    """Prompts of 1 to 64 tokens, many of which begin alike; greedy, sampled, and penalized."""
    rng = np.random.default_rng(3)
    shared = rng.integers(3, 250, 45)
    found = []
    for i in range(COUNT):
        own = rng.integers(3, 250, rng.integers(1, 20))
        ids = (*shared[: rng.choice([0, 32, 40, 45])].tolist(), *own.tolist())
        sampling: dict[str, Any] = {"max_tokens": NEW, "ignore_eos": True}
        if i % 2:
            sampling |= {"temperature": 1.5, "seed": i, "top_p": 0.95}
        if i % 8 == 7:
            sampling |= {"repetition_penalty": 1.3, "presence_penalty": 0.5}
        found.append((ids, qjax.SamplingParams(**sampling)))
    return found


def engine_of(params: qjax.Params, pages: int = 512, **options: Any) -> qjax.Engine:
    options = {"max_num_seqs": 32, "max_model_len": 128, "seed": 0} | options
    engine = qjax.Engine(params, num_blocks=512, **options)
    leave(engine, pages)
    return engine


def tokens(engine: qjax.Engine, late: bool = False) -> list[list[int]]:
    """Of all requests: at once, or one more with every second step."""
    left = requests()
    added = []
    while left or engine.busy:
        while left and not (late and len(added) % 2):
            added.append(engine.add(*left.pop(0)))
            if late:
                break
        engine.step()
        if late and left:
            added.append(engine.add(*left.pop(0)))
    return [request.output_ids for request in added]


@pytest.fixture(scope="module")
def alone(params: qjax.Params) -> list[list[int]]:
    """Each by itself, in an engine without prefix cache."""
    engine = engine_of(params, enable_prefix_caching=False)
    found = []
    for ids, sampling in requests():
        request = engine.add(ids, sampling)
        while engine.busy:
            engine.step()
        found.append(request.output_ids)
    return found


def test_in_any_batch(params: qjax.Params, alone: list[list[int]]) -> None:
    assert tokens(engine_of(params, enable_prefix_caching=False)) == alone
    assert tokens(engine_of(params, enable_prefix_caching=False), late=True) == alone


def test_with_prefix_cache(params: qjax.Params, alone: list[list[int]]) -> None:
    engine = engine_of(params)
    assert tokens(engine) == alone
    first = engine.stats().prefix_cache_hits
    assert first >= COUNT // 2 * 32
    assert tokens(engine, late=True) == alone
    assert engine.stats().prefix_cache_hits - first >= first


@pytest.mark.parametrize("caching", [True, False])
def test_after_preemption(params: qjax.Params, alone: list[list[int]], caching: bool) -> None:
    engine = engine_of(params, pages=20, enable_prefix_caching=caching)
    assert tokens(engine) == alone
    assert engine.stats().num_preemptions > 0
    assert engine.stats().num_free_blocks == 20


def test_few_sequences_replay_what_they_generated(golden: Path) -> None:
    """Their decode rounds other than prefill does: after preemption, too."""
    params = qjax.load(golden / MODELS[0])
    sampling = qjax.SamplingParams(max_tokens=60, ignore_eos=True)

    def several(pages: int) -> tuple[list[list[int]], list[Plan]]:
        engine = engine_of(params, pages, max_num_seqs=3)
        plans: list[Plan] = []
        prepare = engine.runner.prepare
        engine.runner.prepare = lambda plan: (plans.append(plan), prepare(plan))[1]
        added = [engine.add((5 + i, 6, 7), sampling) for i in range(3)]
        while engine.busy:
            engine.step()
        return [request.output_ids for request in added], plans

    (expected, plain), (found, plans) = several(16), several(4)
    assert found == expected
    assert any(plan.replays for plan in plans)
    assert not any(plan.replays for plan in plain)


def test_some_are_ahead(golden: Path) -> None:
    """Of 3 slots, a request with priority gets the first that is free."""
    engine = engine_of(qjax.load(golden / MODELS[0]), max_num_seqs=3)
    sampling = qjax.SamplingParams(max_tokens=4, ignore_eos=True)
    waiting = [engine.add((5,), sampling, priority=1) for _ in range(9)]
    engine.step()
    urgent = engine.add((6,), sampling)
    while urgent.finish_reason is None:
        engine.step()
    assert sum(request.finish_reason is None for request in waiting) == 4
    while engine.busy:
        engine.step()
