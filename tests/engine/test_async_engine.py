"""Requests from event loops to one engine in a thread: what they get, and what they leave."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qjax
from qjax.engine.async_engine import AsyncEngine

LONG = qjax.SamplingParams(max_tokens=100, ignore_eos=True)
PAGES = 16


@pytest.fixture(scope="module")
def params(golden: Path) -> qjax.Params:
    return qjax.load(golden / "gguf-Q4_1" / "model.gguf")


@pytest.fixture
def engine(params: qjax.Params) -> Iterator[AsyncEngine]:
    with AsyncEngine(engine_of(params)) as engine:
        yield engine


def engine_of(params: qjax.Params) -> qjax.Engine:
    options: dict[str, Any] = {"max_model_len": 128, "numerics": "exact"}
    return qjax.Engine(params, num_blocks=PAGES, max_num_seqs=4, **options)


def pages(engine: AsyncEngine) -> tuple[int, int, int]:
    """Free pages, and how many requests run and wait."""
    assert isinstance(engine.engine, qjax.Engine)
    scheduler = engine.engine.scheduler
    return scheduler.blocks.num_free, len(scheduler.running), len(scheduler.waiting)


async def idle(engine: AsyncEngine) -> None:
    """Waits until the thread has nothing to do."""
    deadline = time.monotonic() + 20
    while engine.engine.busy or pages(engine) != (PAGES, 0, 0):
        assert time.monotonic() < deadline, pages(engine)
        await asyncio.sleep(0.01)


def test_many_at_once(params: qjax.Params, engine: AsyncEngine) -> None:
    """More than run at a time, and than the pages hold: each gets what it gets alone."""
    prompts = [tuple(range(3, 5 + i)) for i in range(12)]
    sampling = qjax.SamplingParams(max_tokens=60, temperature=0.8, seed=5, ignore_eos=True)
    alone = []
    one = engine_of(params)
    for prompt in prompts:
        alone.append(one.add(prompt, sampling))
        while one.busy:
            one.step()

    async def all_at_once() -> list[qjax.GenerationResult]:
        async def late(i: int) -> qjax.GenerationResult:
            await asyncio.sleep(i * 0.005)
            return await engine.generate(prompts[i], sampling)

        found = await asyncio.gather(*(late(i) for i in range(len(prompts))))
        await idle(engine)
        return found

    found = asyncio.run(all_at_once())
    assert [list(each.token_ids) for each in found] == [each.output_ids for each in alone]
    assert [each.text for each in found] == [each.text.text for each in alone]
    assert [each.finish_reason for each in found] == ["length"] * len(prompts)


def test_pieces_make_the_whole(engine: AsyncEngine) -> None:
    sampling = qjax.SamplingParams(max_tokens=24, stop=("zq",), ignore_eos=True)

    async def stream() -> list[Any]:
        return [delta async for delta in engine.stream((4, 5, 6), sampling)]

    deltas = asyncio.run(stream())
    assert len(deltas) > 2
    assert [delta.result is None for delta in deltas] == [True] * (len(deltas) - 1) + [False]
    result = deltas[-1].result
    assert "".join(delta.text for delta in deltas) == result.text
    assert sum((delta.token_ids for delta in deltas), ()) == result.token_ids


@pytest.mark.parametrize("how", ["cancelled", "left", "unsent", "waiting"])
def test_what_is_left_early_frees_its_pages(
    engine: AsyncEngine, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(engine.engine, qjax.Engine)
    step, running, gone = engine.engine.step, engine.engine.scheduler.running, threading.Event()

    def held() -> list[Any]:
        """A step, but what will be left gets no further than its first token before it is."""
        if any(each.prompt_ids == (3, 4) and each.output_ids for each in running):
            assert gone.wait(20)
        return step()

    monkeypatch.setattr(engine.engine, "step", held)

    async def leave() -> qjax.GenerationResult:
        others = [asyncio.create_task(engine.generate((1, 2), LONG)) for _ in range(4)]
        stream = engine.stream((3, 4), LONG)
        if how == "left":
            await anext(stream)
            await stream.aclose()
        else:
            if how == "cancelled":
                await anext(stream)  # it runs, when one of the others is through
            task = asyncio.create_task(collect(stream))
            # At once, so that it comes to the engine together with its end; or behind the others.
            await asyncio.sleep(0 if how == "unsent" else 0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        gone.set()
        for other in others[1:]:
            other.cancel()
        result = await others[0]
        await idle(engine)
        return result

    assert len(asyncio.run(leave()).token_ids) == 100
    engine.check()


async def collect(stream: Any) -> list[Any]:
    return [each async for each in stream]


def test_bad_requests_are_told_to_their_callers_alone(engine: AsyncEngine) -> None:
    async def mixed() -> list[Any]:
        good = qjax.SamplingParams(max_tokens=4, ignore_eos=True)
        prompts = [(1, 2), (), (10_000,), tuple(range(200)), (1, 2)]
        calls = [engine.generate(prompt, good) for prompt in prompts]
        return await asyncio.gather(*calls, return_exceptions=True)

    first, empty, unknown, long, last = asyncio.run(mixed())
    assert first.token_ids == last.token_ids
    assert all(isinstance(each, qjax.RequestError) for each in (empty, unknown, long))
    assert "prompt is empty" in str(empty)


def test_a_failure_reaches_all(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    step, broken = engine.engine.step, threading.Event()

    def fails() -> list[Any]:
        if broken.is_set():
            raise MemoryError("no memory left")
        return step()

    monkeypatch.setattr(engine.engine, "step", fails)

    async def waiting() -> list[Any]:
        tasks = [asyncio.create_task(engine.generate((1, 2), LONG)) for _ in range(6)]
        await anext(engine.stream((3, 4), LONG))
        broken.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    for error in asyncio.run(waiting()):
        assert isinstance(error, qjax.EngineError)
        assert str(error) == "the engine failed: MemoryError: no memory left"
        assert isinstance(error.__cause__, MemoryError)
    with pytest.raises(qjax.EngineError, match="no memory left"):
        engine.check()
    with pytest.raises(qjax.EngineError, match="no memory left"):
        asyncio.run(engine.generate((1, 2), LONG))


def test_close_ends_the_thread_and_tells_who_waits(engine: AsyncEngine) -> None:

    async def waiting() -> list[Any]:
        tasks = [asyncio.create_task(engine.generate((1, 2), LONG)) for _ in range(6)]
        await anext(engine.stream((3, 4), LONG))
        await asyncio.to_thread(engine.close)
        return await asyncio.gather(*tasks, return_exceptions=True)

    for error in asyncio.run(waiting()):
        assert isinstance(error, qjax.EngineError)
        assert str(error) == "the engine is closed"
    assert "engine" not in {thread.name for thread in threading.enumerate()}
    assert pages(engine) == (PAGES, 0, 0)
    engine.close()
    with pytest.raises(qjax.EngineError, match="closed"):
        asyncio.run(engine.generate((1, 2), LONG))


def test_an_event_loop_that_is_gone_keeps_no_pages(engine: AsyncEngine) -> None:
    loop = asyncio.new_event_loop()
    stream = engine.stream((1, 2), LONG)
    loop.run_until_complete(anext(stream))
    loop.close()
    asyncio.run(idle(engine))
