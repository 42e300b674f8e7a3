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


def test_errors(golden: Path) -> None:
    with pytest.raises(qjax.RequestError, match=r"max_num_seqs must be in \[1, 32\], got 0"):
        qjax.LLM(golden / "gguf-Q4_1" / "model.gguf", max_num_seqs=0)
