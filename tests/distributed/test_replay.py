"""The calls of one engine, made by another: the same tokens, and errors where that cannot be."""

import json
from collections.abc import Iterator

import pytest

import qjax
from qjax.distributed.replay import Recorder, Replay, decode, encode
from qjax.engine.engine import Engine
from qjax.errors import DistributedError


@pytest.fixture(scope="module")
def params(golden) -> qjax.Params:
    return qjax.load(golden / "gguf-Q4_1" / "model.gguf")


@pytest.fixture
def events(params) -> Iterator[list[str]]:
    """What a recorder sends, as it goes over the wire."""
    sent: list[str] = []
    Recorder(params, lambda *event: sent.append(json.dumps(event))).start()
    yield sent
    Recorder.stop()


class Watched(Replay):
    """Keeps the engines and requests that it made."""

    def __init__(self, params: qjax.Params):
        super().__init__(params)
        self.requests = {}
        self.engines = {}

    def carry_out(self, number, call, *arguments):
        super().carry_out(number, call, *arguments)
        self.engines |= self._engines
        for engine, requests in self._requests.items():
            self.requests |= {(engine, n): request for n, request in requests.items()}


def test_the_same_calls_come_to_the_same(params, events):
    """Sampling without seeds, a cache that is too small for all, requests that are cut short."""
    engine = Engine(params, num_blocks=4, block_size=4, max_num_seqs=2, max_model_len=64, seed=None)
    sampled = qjax.SamplingParams(max_tokens=9, temperature=1.0, stop=("zz",))
    longer = qjax.SamplingParams(max_tokens=12, temperature=0.7, ignore_eos=True)
    requests = [engine.add((1, 2, 3), sampled, sample) for sample in range(2)]
    requests += [engine.add((4, 5), longer), engine.add((6,), longer)]
    engine.step()
    requests.append(engine.add((7, 8), sampled))
    engine.step()
    engine.abort(requests[3])
    while engine.busy:
        engine.step()
    Recorder.stop()
    replay = Watched(params)
    for event in events:
        replay.carry_out(*json.loads(event))
    number = json.loads(events[0])[0]
    assert engine.scheduler.num_preemptions > 0
    assert len(replay.requests) == len(requests)
    for request in requests:
        other = replay.requests[number, request.number]
        assert other.output_ids == request.output_ids
        assert other.finish_reason == request.finish_reason
    assert not replay._requests[number]  # what has ended is forgotten
    assert replay.engines[number].digest == engine.digest != 0


def test_engines_come_and_go(params, events):
    qjax.generate(params, [1, 2], max_tokens=2)
    qjax.generate(params, [3, 4], max_tokens=2)
    with pytest.raises(qjax.RequestError):
        Engine(params, num_blocks=4, numerics="quick")
    Engine(params, num_blocks=4)
    Recorder.stop()
    replay = Replay(params)
    for event in events:
        replay.carry_out(*json.loads(event))
    assert len(replay._engines) == 1


def test_other_tokens_are_found(params, events):
    qjax.generate(params, [1, 2, 3], max_tokens=20, ignore_eos=True)
    Recorder.stop()
    replay = Replay(params)
    with pytest.raises(DistributedError, match="other tokens than process 0"):  # noqa: PT012
        for event in events:
            number, call, *arguments = json.loads(event)
            if call == "add":
                arguments[0] = [7, 8, 9]
            replay.carry_out(number, call, *arguments)


def test_an_engine_that_was_there_before_is_refused(params):
    engine = Engine(params, num_blocks=4)
    Recorder(params, lambda *event: None).start()
    with pytest.raises(DistributedError, match=r"made before lead\(\)"):
        engine.add((1, 2), qjax.SamplingParams(max_tokens=4))
    Recorder.stop()


def test_another_model_is_refused(params, golden, events):
    other = qjax.load(golden / "gguf-Q2_K" / "model.gguf")
    with pytest.raises(DistributedError, match="not the one that lead"):
        qjax.generate(other, [1, 2, 3], max_tokens=2)
    assert not events


def test_sampling_parameters_survive():
    for params in (
        qjax.SamplingParams(),
        qjax.SamplingParams(
            n=2,
            max_tokens=None,
            temperature=1 / 3,
            seed=2**64 - 1,
            stop=("\n", "é"),
            stop_token_ids=(1, 2),
            logit_bias={5: -0.1, 6: 1e-30},
            allowed_token_ids=(5, 6),
            prompt_logprobs=0,
        ),
        qjax.SamplingParams(structured_outputs={"choice": ("é", "b")}),
    ):
        assert decode(json.loads(json.dumps(encode(params)))) == params
