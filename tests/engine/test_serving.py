"""Engines that stay: the size of their cache, and programs that are compiled beforehand."""

from pathlib import Path
from typing import Any

import pytest

import qjax
from qjax.engine import runner
from qjax.engine.engine import Engine
from qjax.engine.serving import serving_engine, warm_up


@pytest.fixture(scope="module")
def params(golden: Path) -> qjax.Params:
    return qjax.load(golden / "gguf-Q4_1" / "model.gguf")


def blocks(params: qjax.Params, **options: Any) -> int:
    engine = serving_engine(params, **options)
    assert isinstance(engine, Engine)
    return engine.scheduler.blocks.num_blocks


def test_cache_is_as_large_as_told(params: qjax.Params) -> None:
    config = params.config
    token = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim  # bfloat16 k and v
    assert blocks(params, max_num_seqs=2, max_model_len=96, kv_cache_memory_bytes=1 << 30) == 6
    assert blocks(params, max_model_len=96, kv_cache_memory_bytes=13 * 32 * token) == 13
    # Of many pages, four binary digits: a program is compiled for each size.
    assert blocks(params, kv_cache_memory_bytes=131 * 32 * token, max_model_len=96) == 96
    assert blocks(params, kv_cache_memory_bytes=77 * 32 * token, max_model_len=96) == 72


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_batched_tokens": 0}, r"max_num_batched_tokens must be in \[1, 8192\], got 0"),
        ({"kv_cache_memory_bytes": 0}, "kv_cache_memory_bytes must be at least 1, got 0"),
        ({"max_model_len": 0}, "max_model_len must be in"),
        ({"kv_cache_memory_bytes": 1}, "room for 0 tokens .*: pass a smaller kv_cache_dtype"),
    ],
)
def test_out_of_range(params: qjax.Params, options: dict[str, Any], message: str) -> None:
    with pytest.raises(qjax.RequestError, match=message):
        serving_engine(params, **options)


def test_what_is_warm_compiles_nothing(
    params: qjax.Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = serving_engine(
        params, max_num_seqs=1, max_model_len=64, max_num_batched_tokens=64, seed=0
    )
    names = warm_up(engine, progress=False)
    sizes = ["decode of 1", "prompts of 64 in 1"]
    assert names == [f"{size}, {kind}" for kind in ("greedy", "sampled", "full") for size in sizes]
    before = set(runner._programs)
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "presence_penalty": 0.5},
        {"logprobs": 3, "logit_bias": {3: 1.0}},
        {"allowed_token_ids": [3, 4, 5], "min_tokens": 2},
    ]
    for kind in kinds:
        sampling = qjax.SamplingParams(max_tokens=12, ignore_eos=True, **kind)
        for i in range(2):
            engine.add((5 + i, 6), sampling)
        while engine.busy:
            engine.step()
    assert set(runner._programs) == before
