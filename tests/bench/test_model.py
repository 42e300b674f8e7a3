"""What `qjax bench` times is work, not memory of earlier work, and all sequences at once."""

from pathlib import Path
from typing import Any

import pytest

import qjax
from qjax import api, bench
from qjax.bench import bandwidth, model
from qjax.bench.clock import QUICK
from qjax.engine.engine import Engine


def test_no_prompt_is_found_in_the_cache(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[Any] = []

    def kept(*arguments: Any, **options: Any) -> Any:
        engines.append(make(*arguments, **options))
        return engines[-1]

    make = model.engine_for
    monkeypatch.setattr(model, "engine_for", kept)
    params = qjax.load(golden / "gguf-Q4_1" / "model.gguf")
    bench.run(params, prompt_lengths=(64,), generate=2, batches=(2,), repeats=2)
    stats = [engine.stats() for engine in engines]
    assert [each.prompt_tokens for each in stats] == [3 * 64, 3 * 2 * model.DECODE_PROMPT]
    assert all(each.prefix_cache_queries for each in stats)
    assert not any(each.prefix_cache_hits for each in stats)


def test_sequences_run_together(golden, monkeypatch):
    """However many there are: who asks for a batch is not told the speed of a part of it."""
    monkeypatch.setattr(api, "MAX_NUM_SEQS", 2)
    monkeypatch.setattr(api, "CACHE_BYTES", 1)
    params = qjax.load(golden / "gguf-Q4_1" / "model.gguf")
    sampling = qjax.SamplingParams(max_tokens=4, ignore_eos=True)
    prompts = [(1, 2, 3)] * 3
    for together in (True, False):
        engine = api.engine_for(params, prompts, sampling, together=together)
        assert isinstance(engine, Engine)
        requests = [engine.add(prompt, sampling) for prompt in prompts]
        while not any(request.finish_reason for request in requests):
            engine.step()
        begun = [len(request.output_ids) > 0 for request in requests]
        assert all(begun) is together


def test_bandwidth():
    """Between a tape's and what no memory gives."""
    assert 1e8 < bandwidth.of_host(1 << 22, repeats=1) < 1e14
    assert 1e5 < bandwidth.of_device((64, 64), QUICK) < 1e14
