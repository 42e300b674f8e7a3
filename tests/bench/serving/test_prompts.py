"""Prompts have the length that was asked for, by whoever counts."""

import asyncio
import json
from itertools import takewhile
from pathlib import Path

import pytest
import tokenizers

from qjax.bench.serving.client import Sample, Server
from qjax.bench.serving.connection import Address
from qjax.bench.serving.prompts import (
    Count,
    Random,
    counted_by,
    counted_with,
    file_samples,
    random_samples,
)
from qjax.errors import RequestError
from tests.bench.serving.scripted import Asked, Scripted, beside, tokens


def drawn(sizes: Random, count: int, seed: int = 0, by: Count | None = None) -> list[Sample]:
    return asyncio.run(random_samples(sizes, count, seed, by))


async def with_bos(text: str) -> int:
    """Words, and two before them."""
    return 2 + len(text.split())


def test_words_are_tokens() -> None:
    found = drawn(Random(5, 7, prefix_len=3), 20)
    assert {len(one.prompt.split()) for one in found} == {8}
    assert {(one.prompt_len, one.output_len) for one in found} == {(8, 7)}
    assert len({" ".join(one.prompt.split()[:3]) for one in found}) == 1
    assert len({one.prompt for one in found}) == 20
    assert found == drawn(Random(5, 7, prefix_len=3), 20)
    assert found != drawn(Random(5, 7, prefix_len=3), 20, seed=1)


def test_lengths_are_as_counted() -> None:
    found = drawn(Random(5, 7, prefix_len=3), 20, by=with_bos)
    assert {(len(one.prompt.split()), one.prompt_len) for one in found} == {(6, 8)}


def test_real_vocabulary(golden: Path) -> None:
    """Of a small vocabulary, where words are of several tokens."""
    folder = golden / "base-tiny-llama"
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = drawn(Random(32, 1, prefix_len=64), 8, by=counted_with(str(folder)))
    lengths = [len(reference.encode(one.prompt).ids) for one in found]
    assert [one.prompt_len for one in found] == lengths
    assert all(abs(length - 96) <= 3 for length in lengths)
    assert lengths.count(96) >= 4
    places = zip(*(one.prompt.split() for one in found), strict=False)
    common = [each[0] for each in takewhile(lambda each: len(set(each)) == 1, places)]
    assert abs(len(reference.encode(" ".join(common)).ids) - 64) <= 6


def test_tokenizer_in_a_file(golden: Path) -> None:
    by = counted_with(str(golden / "gguf-Q4_1" / "model.gguf"))
    assert asyncio.run(by("the")) == asyncio.run(counted_with(str(golden / "gguf-Q4_1"))("the"))


def test_ranges() -> None:
    found = drawn(Random(10, 100, range_ratio=0.3), 2000)
    assert {one.prompt_len for one in found} == set(range(7, 14))
    assert {one.output_len for one in found} == set(range(70, 131))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_len": -1}, "random_input_len must be at least 0, got -1."),
        ({"output_len": 0}, "random_output_len must be at least 1, got 0."),
        ({"range_ratio": 1.0}, r"random_range_ratio must be in \[0, 1\), got 1."),
        ({"input_len": 0}, "leave prompts empty"),
    ],
)
def test_out_of_range(fields: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Random(**fields)


def test_the_server_counts_where_it_can() -> None:
    async def run(scripted: Scripted) -> int | None:
        by = await counted_by(Server(Address.of(scripted.url), "words"))
        return None if by is None else await by("a b c")

    async def other(asked: Asked) -> None:  # as llama.cpp's server answers
        asked.answer(200, {"tokens": []})

    async def nothing(asked: Asked) -> None:
        asked.answer(404, {"detail": "Not Found"})

    assert beside(tokens, run) == 3
    assert beside(other, run) is None
    assert beside(nothing, run) is None


def test_files(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("one two\n\nthree\n")
    assert file_samples(lines, 3, 9) == [
        Sample("one two", 2, 9),
        Sample("three", 1, 9),
        Sample("one two", 2, 9),
    ]
    objects = tmp_path / "prompts.jsonl"
    content = [{"prompt": "a b", "output_tokens": 5}, {"text": "c"}]
    objects.write_text("\n".join(map(json.dumps, content)))
    assert file_samples(objects, 2, 9) == [Sample("a b", 2, 5), Sample("c", 1, 9)]


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"prompt": 5}', '{"prompt": "x", "output_tokens": 0}', "{"]
)
def test_faulty_files(tmp_path: Path, content: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    with pytest.raises(RequestError, match=r"dataset_path .*prompts.jsonl"):
        file_samples(file, 1, 1)
    with pytest.raises(RequestError, match="cannot be read"):
        file_samples(tmp_path / "none.txt", 1, 1)
