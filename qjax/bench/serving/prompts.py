"""What is asked: random words cut to so many tokens, or prompts out of a file.

Prompts are text, which every server takes. Short English words are one token each in nearly every
vocabulary; where a way to count tokens is given, prompts come to exactly their length by it.
"""

import itertools
import json
import math
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qjax.bench.serving.client import Sample, Server, ask
from qjax.checkpoint import source
from qjax.checkpoint.gguf_io import read_gguf
from qjax.checkpoint.tokenizer import load_tokenizer
from qjax.errors import RequestError, ServingError

Count = Callable[[str], Coroutine[Any, Any, int]]

WORDS = (
    "the of and to in is was he for it with as his on be at by had not are but from or have an "
    "they which one you were her all she there would their we him been has when who will more "
    "no if out so said what up its about into than them can only other new some could time "
    "these two may then do first any my now such like our over man me even most made after also "
    "did many before must through years where much your way well down should because each just "
    "those people how too little state good very make world still own see men work long get "
    "here between both life being under never day same another know while last might us great "
    "old year off come since against go came right used take three small large find home place "
    "end part house water line name high city school point group case open white night head "
    "hand side look far light"
).split()
# A prompt whose length does not settle is left as it is after so many corrections.
_CORRECTIONS = 8


@dataclass(frozen=True)
class Random:
    """Lengths as in vLLM's random data set, in tokens.

    Attributes:
      input_len, output_len: of the part that differs, and most to generate; each is drawn from
        [L (1 - range_ratio), L (1 + range_ratio)].
      prefix_len: of what all prompts begin with.
    """

    input_len: int = 1024
    output_len: int = 128
    range_ratio: float = 0.0
    prefix_len: int = 0

    def __post_init__(self) -> None:
        for name, least in (("input_len", 0), ("output_len", 1), ("prefix_len", 0)):
            if getattr(self, name) < least:
                raise RequestError(
                    f"random_{name} must be at least {least}, got {getattr(self, name)}."
                )
        if not 0 <= self.range_ratio < 1:
            raise RequestError(f"random_range_ratio must be in [0, 1), got {self.range_ratio:g}.")
        if self.prefix_len + math.floor(self.input_len * (1 - self.range_ratio)) < 1:
            raise RequestError("random_input_len and random_prefix_len leave prompts empty.")


async def random_samples(
    sizes: Random, count: int, seed: int, tokens: Count | None = None
) -> list[Sample]:
    """`count` prompts of random words, the same for the same seed.

    Args:
      tokens: counts those of a text, with what the model puts around it; without one, each word is
        taken for a token.
    """
    rng = np.random.default_rng(seed)

    def lengths(mean: int, least: int) -> list[int]:
        low, high = mean * (1 - sizes.range_ratio), mean * (1 + sizes.range_ratio)
        drawn = rng.integers(max(math.floor(low), least), math.ceil(high) + 1, count)
        return drawn.tolist()

    def words(number: int) -> list[str]:
        return [WORDS[at] for at in rng.integers(0, len(WORDS), number)]

    found = []
    text, _ = await _fitted([], words(sizes.prefix_len), sizes.prefix_len, words, tokens)
    prefix = text.split()
    for inputs, outputs in zip(
        lengths(sizes.input_len, 0), lengths(sizes.output_len, 1), strict=True
    ):
        wanted = sizes.prefix_len + inputs
        text, length = await _fitted(prefix, words(inputs), wanted, words, tokens)
        found.append(Sample(text, length, outputs))
    return found


def file_samples(path: Path, count: int, output_len: int) -> list[Sample]:
    """The prompts of a file, over again where there are fewer than `count`.

    Args:
      path: of a .jsonl, each line is {"prompt": "..."} or {"text": "..."}, and its "output_tokens"
        comes before `output_len`; of any other file, each line that is not blank is a prompt.

    Raises:
      RequestError: it cannot be read, or has no prompts.
    """
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
        prompts = [
            _parsed(line, output_len) if path.suffix == ".jsonl" else (line, output_len)
            for line in lines
        ]
    except (OSError, ValueError) as error:
        raise RequestError(f"dataset_path {path} cannot be read: {error}") from error
    if not prompts:
        raise RequestError(f"dataset_path {path} has no prompts.")
    repeated = itertools.islice(itertools.cycle(prompts), count)
    return [Sample(text, len(text.split()), length) for text, length in repeated]


async def counted_by(server: Server) -> Count | None:
    """A way to count tokens that the server itself offers (/tokenize, as vLLM and qjax have it), or
    None where it has no such thing."""

    async def tokens(text: str) -> int:
        found = await ask(server, "POST", "/tokenize", {"model": server.model, "prompt": text})
        try:
            return int(found["count"])
        except (TypeError, KeyError, ValueError):
            raise ServingError(f"{server.address}/tokenize answers without a count") from None

    try:
        return tokens if await tokens(WORDS[0]) else None
    except ServingError:
        return None


def counted_with(model: str) -> Count:
    """Counts tokens as a model does: its name, or a folder with tokenizer.json.

    Raises:
      CheckpointError, DownloadError: there is none, or its tokenizer cannot be read.
    """
    if (Path(model) / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(model)
    else:
        found = source.resolve(model)
        tokenizer = load_tokenizer(read_gguf(found.path) if found.kind == "gguf" else found.path)

    async def tokens(text: str) -> int:
        return len(tokenizer.encode(text))

    return tokens


def _parsed(line: str, output_len: int) -> tuple[str, int]:
    found = json.loads(line)
    if isinstance(found, dict):
        text = found.get("prompt", found.get("text"))
        length = found.get("output_tokens", output_len)
        if isinstance(text, str) and text and isinstance(length, int) and length > 0:
            return text, length
    raise ValueError(f'not {{"prompt": "..."}} with "output_tokens" at will: {line[:80]}')


async def _fitted(
    prefix: Sequence[str],
    words: list[str],
    wanted: int,
    more: Callable[[int], list[str]],
    tokens: Count | None,
) -> tuple[str, int]:
    """The text of prefix and words, with words dropped or added until it has `wanted` tokens; or,
    where it never has, the nearest that was found, and how many those are."""
    best = " ".join([*prefix, *words]), wanted
    if tokens is None or not wanted:
        return best
    for attempt in range(_CORRECTIONS):
        text = " ".join([*prefix, *words])
        found = await tokens(text)
        if attempt == 0 or abs(found - wanted) < abs(best[1] - wanted):
            best = text, found
        if found == wanted:
            break
        # As many words as they are tokens, on the average of this text, and at least one.
        change = math.ceil(abs(wanted - found) * (len(prefix) + len(words)) / max(found, 1))
        words = words + more(change) if found < wanted else words[: max(len(words) - change, 0)]
    return best
