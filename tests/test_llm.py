"""The class that keeps its engine, against the reference's greedy continuations."""

from pathlib import Path

import numpy as np
import pytest

import qjax


def test_calls_share_an_engine(golden: Path) -> None:
    folder = golden / "gguf-Q4_1"
    reference = np.load(folder / "reference.npz")
    prompts = [reference[f"ids_{i}"].tolist() for i in range(2)]
    expected = [reference[f"greedy_{i}"].tolist()[:8] for i in range(2)]
    llm = qjax.LLM(
        folder / "model.gguf", max_num_seqs=2, numerics="exact", kv_cache_dtype="bfloat16"
    )
    sampling = qjax.SamplingParams(max_tokens=8, ignore_eos=True)
    results = llm.generate(prompts, sampling)
    assert [list(result.token_ids) for result in results] == expected
    assert [r.token_ids for r in llm.generate(prompts[1], sampling)] == [results[1].token_ids]
    blocks = llm.engine.scheduler.blocks
    assert blocks.num_free == blocks.num_blocks
    # A bad prompt ends in an error, and leaves nothing of the good one beside it.
    with pytest.raises(qjax.RequestError, match="token id 512"):
        llm.generate([prompts[0], [512]], sampling)
    assert not llm.engine.busy
    chat = llm.chat([{"role": "user", "content": "hello"}], sampling)
    assert len(chat) == 1
    assert len(chat[0].token_ids) == 8


def test_seed_of_the_engine(golden: Path) -> None:
    """It repeats what requests without a seed get; one of their own goes first."""
    file = golden / "gguf-Q4_1" / "model.gguf"
    sampling = qjax.SamplingParams(max_tokens=8, temperature=1.5, ignore_eos=True)
    own = qjax.SamplingParams(max_tokens=8, temperature=1.5, ignore_eos=True, seed=7)

    def sampled(seed: int) -> list[tuple[int, ...]]:
        llm = qjax.LLM(file, max_num_seqs=2, seed=seed)
        prompts = [[5, 6, 7]] * 2
        calls = [llm.generate(prompts, sampling), llm.generate(prompts[0], own)]
        calls.append(llm.generate(prompts[0], sampling))
        return [result.token_ids for call in calls for result in call]

    first, again, other = sampled(3), sampled(3), sampled(4)
    assert first == again
    assert len({first[0], first[1], first[3]}) == 3
    assert first[2] == other[2]
    assert not {first[0], first[1], first[3]} & {other[0], other[1], other[3]}


def test_errors(golden: Path) -> None:
    with pytest.raises(qjax.RequestError, match=r"max_num_seqs must be in \[1, 512\], got 0"):
        qjax.LLM(golden / "gguf-Q4_1" / "model.gguf", max_num_seqs=0)
    with pytest.raises(qjax.RequestError, match=r"gpu_memory_utilization must be in \(0, 1\]"):
        qjax.LLM(golden / "gguf-Q4_1" / "model.gguf", gpu_memory_utilization=1.5)
    with pytest.raises(qjax.RequestError, match=r"room for 0 tokens.* pass a smaller"):
        qjax.LLM(golden / "gguf-Q4_1" / "model.gguf", kv_cache_memory_bytes=20_000)
    with pytest.raises(qjax.RequestError, match=r"room for 32 tokens.* pass max_model_len=32, "):
        qjax.LLM(golden / "gguf-Q4_1" / "model.gguf", kv_cache_memory_bytes=60_000)
    with pytest.raises(qjax.RequestError, match="seed must be in"):
        qjax.LLM(golden / "gguf-Q4_1" / "model.gguf", seed=-1)


def test_sizes_that_say_nothing(golden: Path) -> None:
    file = golden / "gguf-Q4_1" / "model.gguf"
    with pytest.raises(qjax.RequestError, match="enable_expert_parallel goes with tensor_parallel"):
        qjax.LLM(file, enable_expert_parallel=True)
    with pytest.raises(qjax.RequestError, match="is split where it was loaded"):
        qjax.LLM(qjax.load(file), tensor_parallel_size=2)


def test_guessing_ahead(golden: Path) -> None:
    file = golden / "gguf-Q4_1" / "model.gguf"
    sampling = qjax.SamplingParams(max_tokens=8, ignore_eos=True)
    prompt = [5, 6, 7, 5, 6]
    expected = qjax.LLM(file, max_num_seqs=2).generate(prompt, sampling)
    for config in ({"method": "ngram"}, {"model": file}):
        llm = qjax.LLM(file, max_num_seqs=2, speculative_config=config)
        assert llm.generate(prompt, sampling)[0].token_ids == expected[0].token_ids
