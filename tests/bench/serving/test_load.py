"""When requests are sent: drawn times against those of the distribution, and a virtual clock."""

import asyncio
import math

import numpy as np
import pytest

from qjax.bench.serving.client import Outcome, Sample
from qjax.bench.serving.load import arrivals, run
from qjax.errors import RequestError
from tests.bench.serving.scripted import virtually

SAMPLES = [Sample(str(number), 1, 1) for number in range(20)]


def test_poisson_process() -> None:
    times = np.array(arrivals(20_000, 8.0, seed=1))
    assert times[-1] == pytest.approx(20_000 / 8)
    gaps = np.diff(times)
    assert np.all(gaps >= 0)
    assert gaps.mean() == pytest.approx(1 / 8, rel=1e-3)
    # Of the exponential distribution: its deviation is its mean, its median that times log 2, and
    # gaps do not depend on those before.
    assert gaps.std() == pytest.approx(1 / 8, rel=0.03)
    assert np.median(gaps) == pytest.approx(math.log(2) / 8, rel=0.03)
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 0.03


@pytest.mark.parametrize("burstiness", [0.25, 4.0])
def test_burstiness_is_the_shape_of_a_gamma_distribution(burstiness: float) -> None:
    gaps = np.diff(arrivals(20_000, 2.0, burstiness, seed=2))
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


def test_evenly_spaced_and_all_at_once() -> None:
    np.testing.assert_allclose(arrivals(5, 2.0, math.inf), [0.5, 1.0, 1.5, 2.0, 2.5])
    assert arrivals(3, math.inf) == [0, 0, 0]


def test_seeds() -> None:
    assert arrivals(9, 1.0, seed=3) == arrivals(9, 1.0, seed=3) != arrivals(9, 1.0, seed=4)


@pytest.mark.parametrize(("rate", "burstiness"), [(0, 1), (-1, 1), (math.nan, 1), (1, 0)])
def test_out_of_range(rate: float, burstiness: float) -> None:
    with pytest.raises(RequestError, match="must be positive"):
        arrivals(1, rate, burstiness)


class Server:
    """Takes some seconds for each request; notes when they come and how many there are."""

    def __init__(self, seconds: float):
        self.seconds, self.starts, self.now, self.most = seconds, [], 0, 0

    async def send(self, sample: Sample) -> Outcome:
        start = asyncio.get_running_loop().time()
        self.starts.append(start)
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(self.seconds)
        self.now -= 1
        return Outcome(start, sample.prompt_len, int(sample.prompt), latency=self.seconds)


@pytest.mark.parametrize("seconds", [0.01, 50.0])
def test_arrivals_do_not_wait_for_the_server(seconds: float) -> None:
    times = arrivals(len(SAMPLES), 3.0, seed=5)
    server = Server(seconds)
    outcomes, duration = virtually(run(SAMPLES, times, server.send))
    np.testing.assert_allclose(server.starts, times)
    assert [one.output_len for one in outcomes] == list(range(len(SAMPLES)))
    assert duration == pytest.approx(times[-1] + seconds)
    assert all(one.queued == 0 for one in outcomes)


def test_most_at_a_time() -> None:
    server, done = Server(1.0), []
    outcomes, duration = virtually(
        run(
            SAMPLES,
            [0.0] * len(SAMPLES),
            server.send,
            max_concurrency=8,
            done=lambda: done.append(1),
        )
    )
    assert server.most == 8
    # 20 requests of a second in turns of eight.
    np.testing.assert_allclose(server.starts, [0] * 8 + [1] * 8 + [2] * 4)
    assert duration == pytest.approx(3.0)
    assert [one.queued for one in outcomes] == pytest.approx([0] * 8 + [1] * 8 + [2] * 4)
    assert len(done) == len(SAMPLES)
