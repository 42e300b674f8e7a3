"""What `qjax bench` times is work, not memory of earlier work."""

from pathlib import Path
from typing import Any

import pytest

import qjax
from qjax import bench
from qjax.bench import model


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
