"""Guessing ahead changes how many steps are taken, and not one token."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qjax
from qjax.engine.draft_model import DraftModel
from qjax.engine.request import Request
from qjax.engine.speculation import PromptLookup, SpeculativeConfig
from tests.engine.pages import leave
from tests.engine.test_scheduler import request_of

SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "seed": 5, "top_p": 0.9},
    {"temperature": 1.5, "seed": 6},
]


@pytest.fixture(scope="module")
def params(golden: Path) -> qjax.Params:
    return qjax.load(golden / "gguf-Q4_1" / "model.gguf")


def run(
    params: qjax.Params,
    speculative: SpeculativeConfig | None,
    prompts: Sequence[tuple[int, ...]],
    new: int = 40,
    pages: int = 32,
    **options: Any,
) -> tuple[list[list[int]], qjax.Engine]:
    options = {"num_blocks": 32, "max_num_seqs": 4, "max_model_len": 128} | options
    engine = qjax.Engine(params, speculative=speculative, **options)
    leave(engine, pages)
    added = []
    for prompt, sampling in zip(prompts, SAMPLINGS, strict=False):
        asked = qjax.SamplingParams(max_tokens=new, ignore_eos=True, **sampling)
        added.append(engine.add(prompt, asked))
    while engine.busy:
        engine.step()
    assert engine.stats().num_free_blocks == pages
    return [request.output_ids for request in added], engine


PROMPTS = [(5, 6, 7, 8, 5, 6, 7), tuple(range(20, 60)) * 2, (9,)]


class Oracle:
    """Guesses what it has been told, of which every fifth token is wrong."""

    def __init__(self, told: dict[tuple[int, ...], list[int]]):
        self.told = told

    def propose(self, requests: Sequence[Request], most: Sequence[int]) -> list[tuple[int, ...]]:
        found = []
        for request, count in zip(requests, most, strict=True):
            done = len(request.output_ids)
            told = self.told[request.prompt_ids][done : done + count]
            found.append(tuple((t + (i % 5 == 4)) % 512 for i, t in enumerate(told, done)))
        return found


def test_guesses_change_nothing(params: qjax.Params) -> None:
    expected, _ = run(params, None, PROMPTS)
    options = SpeculativeConfig(num_speculative_tokens=6)
    found, _ = run(params, options, PROMPTS)
    assert found == expected
    engine = qjax.Engine(
        params, speculative=options, num_blocks=32, max_num_seqs=4, max_model_len=128
    )
    assert engine._speculator is not None
    engine._speculator._proposer = Oracle(dict(zip(PROMPTS, expected, strict=True)))
    added = [
        engine.add(prompt, qjax.SamplingParams(max_tokens=40, ignore_eos=True, **sampling))
        for prompt, sampling in zip(PROMPTS, SAMPLINGS, strict=True)
    ]
    steps = 0
    while engine.busy:
        engine.step()
        steps += 1
    assert [request.output_ids for request in added] == expected
    # Of five tokens guessed right, one wrong: some twelve steps instead of forty.
    assert engine._speculator.num_accepted_tokens > 3 * 25
    assert steps < 20


@pytest.mark.parametrize("name", ["gguf-Q4_1", "base-tiny-llama"])
def test_a_draft_model(params: qjax.Params, golden: Path, name: str) -> None:
    """The same model guesses all that it says itself; one of other weights, little."""
    folder = golden / name
    draft = qjax.load(folder / "model.gguf" if name.startswith("gguf") else folder)
    expected, _ = run(params, None, PROMPTS, numerics="exact")
    config = SpeculativeConfig(model=draft, num_speculative_tokens=4)
    found, engine = run(params, config, PROMPTS, numerics="exact")
    assert found == expected
    speculator = engine._speculator
    assert speculator is not None
    assert speculator.num_draft_tokens > 0
    if name == "gguf-Q4_1":
        assert speculator.num_accepted_tokens == speculator.num_draft_tokens


def test_a_draft_model_with_one_place(params: qjax.Params) -> None:
    """Who was asked for before gives way, and comes to the same when it is back."""
    sizes = {"block_size": 32, "max_num_seqs": 1, "max_model_len": 128}
    draft = DraftModel(params, 512, numerics="exact", kv_cache_dtype="auto", **sizes)
    first, second = request_of((5, 6, 7)), request_of((8, 9))
    guessed = draft.propose([first], [3])
    assert draft.propose([second], [3]) != guessed
    assert draft.propose([first], [3]) == guessed


def test_scarce_pages(params: qjax.Params) -> None:
    expected, _ = run(params, None, PROMPTS, 30)
    config = SpeculativeConfig(num_speculative_tokens=6)
    found, engine = run(params, config, PROMPTS, 30, pages=5)
    assert found == expected
    assert engine.stats().num_preemptions > 0


def test_prompt_lookup() -> None:
    lookup = PromptLookup(3, 2)
    request = request_of((1, 2, 3, 4, 9, 2, 3))
    assert lookup.propose([request], [2]) == [(4, 9)]
    request.output_ids += [4]
    assert lookup.propose([request], [5]) == [(9, 2, 3, 4)]
    request.output_ids += [7, 2, 3]
    # The latest of them counts: 2, 3 was followed by 4, 7.
    assert lookup.propose([request], [2]) == [(4, 7)]
    request.output_ids += [1]
    assert lookup.propose([request], [2]) == [()]


def test_prompt_lookup_against_search() -> None:
    """The same as looking through all that came before, longest match first."""
    rng = np.random.default_rng(0)
    request = request_of(tuple(rng.integers(0, 3, 5).tolist()))
    lookup = PromptLookup(4, 2)
    for _ in range(60):
        ids = request.known_ids
        expected: tuple[int, ...] = ()
        for size in (4, 3, 2):
            ends = [e for e in range(size, len(ids)) if ids[e - size : e] == ids[len(ids) - size :]]
            if len(ids) > size and ends:
                expected = ids[ends[-1] : ends[-1] + 3]
                break
        assert lookup.propose([request], [3]) == [expected]
        request.output_ids += rng.integers(0, 3, rng.integers(1, 4)).tolist()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"method": "eagle"}, "method must be 'ngram' or 'draft_model', got 'eagle'"),
        ({"num_speculative_tokens": 0}, r"num_speculative_tokens must be an integer in \[1, 9\]"),
        ({"prompt_lookup_min": 5}, r"prompt_lookup_max must be an integer in \[5, 64\], got 4"),
        ({"method": "draft_model"}, "goes with model"),
        ({"num_tokens": 3}, "num_tokens: no such key"),
    ],
)
def test_bad_settings(config: dict[str, Any], message: str) -> None:
    with pytest.raises(qjax.RequestError, match=message):
        SpeculativeConfig.of(config)


def test_another_vocabulary_is_refused(params: qjax.Params) -> None:
    draft = replace(params, config=replace(params.config, vocab_size=600))
    with pytest.raises(qjax.RequestError, match="has a vocabulary of"):
        run(params, SpeculativeConfig(model=draft), PROMPTS)
