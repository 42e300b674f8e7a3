"""When requests are sent, and how many at a time."""

import asyncio
import gc
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np

from qjax.bench.serving.client import Outcome, Sample, Server, complete
from qjax.errors import RequestError


@dataclass(frozen=True)
class Run:
    """What was seen: the outcomes in the order of the samples, the seconds from the first request
    to the last answer, and those that this process kept a processor busy meanwhile."""

    outcomes: list[Outcome]
    duration: float
    client_seconds: float


def arrivals(count: int, rate: float, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """Seconds after the start at which requests come, as vLLM's benchmark draws them.

    Args:
      rate: requests a second; infinite sends all at once.
      burstiness: shape of the gamma distribution of the time between two. 1 is a Poisson process,
        less is burstier, and infinite is evenly spaced. Times are scaled so that the last request
        comes after exactly count / rate seconds, whatever was drawn.

    Raises:
      RequestError: something is out of range.
    """
    for name, value in (("request_rate", rate), ("burstiness", burstiness)):
        if not value > 0:
            raise RequestError(f"{name} must be positive or inf, got {value:g}.")
    if math.isinf(rate):
        return [0.0] * count
    if math.isinf(burstiness):
        gaps = np.ones(count)
    else:
        gaps = np.random.default_rng(seed).gamma(burstiness, 1 / burstiness, count)
    times = np.cumsum(gaps)
    return (times * (count / rate / times[-1])).tolist()


async def benchmark(
    server: Server,
    samples: Sequence[Sample],
    times: Sequence[float],
    *,
    warmups: Sequence[Sample] = (),
    max_concurrency: int | None = None,
    done: Callable[[], object] = lambda: None,
) -> Run:
    """Sends `warmups`, which do not count, all at once, and then `samples` at their times.

    Args:
      max_concurrency, done: see `run`.
    """

    async def send(sample: Sample) -> Outcome:
        return await complete(server, sample)

    # Collecting garbage would look through all that was imported, and hold up every stream.
    gc.collect()
    gc.freeze()
    try:
        await run(warmups, [0.0] * len(warmups), send, max_concurrency=max_concurrency)
        start = time.process_time()
        outcomes, duration = await run(
            samples, times, send, max_concurrency=max_concurrency, done=done
        )
    finally:
        gc.unfreeze()
    return Run(outcomes, duration, time.process_time() - start)


async def run(
    samples: Sequence[Sample],
    times: Sequence[float],
    send: Callable[[Sample], Awaitable[Outcome]],
    *,
    max_concurrency: int | None = None,
    done: Callable[[], object] = lambda: None,
) -> tuple[list[Outcome], float]:
    """Sends each sample when its time comes, however the server fares with those before.

    Args:
      times: seconds after the start, ascending, one a sample.
      max_concurrency: most requests at a time; others wait for their turn.
      done: called after each.

    Returns:
      The outcomes, in the order of the samples, and the seconds that all took.
    """
    now = asyncio.get_running_loop().time
    turn = asyncio.Semaphore(max_concurrency) if max_concurrency else nullcontext()

    async def one(sample: Sample, due: float) -> Outcome:
        async with turn:
            outcome = await send(sample)
        done()
        return replace(outcome, queued=outcome.start - due)

    start, tasks = now(), []
    async with asyncio.TaskGroup() as group:
        for sample, due in zip(samples, times, strict=True):
            if (left := start + due - now()) > 0:
                await asyncio.sleep(left)
            tasks.append(group.create_task(one(sample, now())))
    return [task.result() for task in tasks], now() - start
