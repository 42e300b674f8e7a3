"""Perplexity of documents, as lm-eval counts it: a chance for every token of each of them.

Each document is read on its own. Its tokens are cut into runs of as many as the model reads at a
time, of which the first is predicted from the token that begins a text, the others from the last
token before them; only the last run, which may be shorter, is given more, as much as there is room
for. That is `loglikelihood_rolling` of EleutherAI's lm-evaluation-harness. Likelihood is told by
word and by byte, which does not depend on how the tokenizer cuts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qjax.errors import RequestError
from qjax.evaluate.continuations import continuations
from qjax.evaluate.perplexity import Progress
from qjax.params import Params


@dataclass(frozen=True)
class RollingPerplexity:
    """Attributes:
    word, byte: exp(-log-likelihood / words), and by bytes, of all documents together.
    bits_per_byte: log2 of `byte`.
    token: the same by tokens.
    tokens, words, bytes: how many; words are what whitespace parts.
    documents: how many.
    window: most tokens that the model read at a time.
    """

    word: float
    byte: float
    bits_per_byte: float
    token: float
    tokens: int
    words: int
    bytes: int
    documents: int
    window: int

    def __str__(self) -> str:
        return (
            f"word perplexity {self.word:.4f}, byte perplexity {self.byte:.4f}, "
            f"{self.bits_per_byte:.4f} bits per byte, token perplexity {self.token:.4f} "
            f"({self.tokens} tokens, {self.words} words, {self.bytes} bytes, "
            f"{self.documents} documents, read at most {self.window} tokens at a time)"
        )


def rolling_perplexity(
    params: Params,
    documents: str | Sequence[str],
    *,
    window: int | None = None,
    numerics: str = "exact",
    kv_cache_dtype: str = "auto",
    kv_cache_dtype_skip_layers: Sequence[int | str] = (),
    progress: Progress = iter,
) -> RollingPerplexity:
    """Perplexity of documents, one or more, by lm-eval's convention.

    Args:
      window: most tokens that the model reads at a time; None for as many as it takes.
      numerics, kv_cache_dtype, kv_cache_dtype_skip_layers: see `qjax.generate`.
      progress: goes over the batches, and may tell how far it is.

    Raises:
      RequestError: an argument is out of range, the model has no tokenizer, or there is no text.
    """
    texts = [documents] if isinstance(documents, str) else list(documents)
    length = params.config.max_position_embeddings if window is None else window
    if params.tokenizer is None:
        raise RequestError("the model has no tokenizer, which a text needs.")
    if not any(text.strip() for text in texts):
        raise RequestError("there is no text to predict.")
    prefix = prefix_token(params)
    ids = [params.tokenizer.encode(text) for text in texts]
    pairs = [pair for one in ids for pair in rolling_pairs(one, prefix, length)]
    found = continuations(
        params,
        pairs,
        max_length=length,
        numerics=numerics,
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_dtype_skip_layers=kv_cache_dtype_skip_layers,
        progress=progress,
    )
    loss = -math.fsum(one.logprobs.sum() for one in found)
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    tokens = sum(map(len, ids))
    return RollingPerplexity(
        word=math.exp(loss / words),
        byte=math.exp(loss / size),
        bits_per_byte=loss / size / math.log(2),
        token=math.exp(loss / tokens),
        tokens=tokens,
        words=words,
        bytes=size,
        documents=len(texts),
        window=length,
    )


def prefix_token(params: Params) -> int:
    """What stands before a text of which every token is to be predicted: the token that begins a
    text, or ends one where none does.

    Raises:
      RequestError: the model has neither.
    """
    if params.tokenizer.bos_id is not None:
        return params.tokenizer.bos_id
    if params.tokenizer.eos_id is not None:
        return params.tokenizer.eos_id
    raise RequestError("the model's tokenizer names no token that begins or ends a text.")


def rolling_pairs(
    ids: Sequence[int], prefix: int, length: int
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """(context, continuation) of the runs of a document, see above."""
    whole = (prefix, *ids)  # token i of the document is whole[i + 1]
    for first in range(1, len(whole), length):
        end = min(first + length, len(whole))
        yield whole[max(0, end - 1 - length) : first], whole[first:end]
