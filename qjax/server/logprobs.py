"""Logarithms of probabilities, in OpenAI's two forms."""

from collections.abc import Sequence
from typing import Any

from qjax.checkpoint.tokenizer import Tokenizer
from qjax.engine.request import Logprob

Entry = dict[int, Logprob]

_LOWEST = -9999.0  # JSON has no infinity


def chat_logprobs(entries: Sequence[Entry], k: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """`logprobs` of a chat choice: the tokens, each with the k likeliest in its place.

    Args:
      entries: of each token {id: Logprob}, the chosen one first.
    """

    def shown(token: int, found: Logprob) -> dict[str, Any]:
        return {
            "token": found.decoded_token,
            "logprob": max(found.logprob, _LOWEST),
            "bytes": list(tokenizer.token_bytes(token)),
        }

    content = []
    for entry in entries:
        chosen = next(iter(entry))
        likeliest = sorted(entry.items(), key=lambda item: item[1].rank)[:k]
        top = [shown(token, found) for token, found in likeliest]
        content.append({**shown(chosen, entry[chosen]), "top_logprobs": top})
    return {"content": content, "refusal": None}


class LegacyLogprobs:
    """`logprobs` of a completion choice, of tokens that may come bit by bit.

    `text_offset` is where a token begins in the whole text, prompt included where that is echoed.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool):
        self._stream = tokenizer.stream(skip_special_tokens)
        self._length = 0

    def of(self, ids: Sequence[int], entries: Sequence[Entry | None]) -> dict[str, list[Any]]:
        """Of the tokens that follow those before; None stands for the first token of a prompt,
        which nothing predicts."""
        found: dict[str, list[Any]] = {
            "text_offset": [],
            "token_logprobs": [],
            "tokens": [],
            "top_logprobs": [],
        }
        for token, entry in zip(ids, entries, strict=True):
            found["text_offset"].append(self._length)
            piece = self._stream.push(token)
            self._length += len(piece)
            found["tokens"].append(piece if entry is None else entry[token].decoded_token)
            found["token_logprobs"].append(
                None if entry is None else max(entry[token].logprob, _LOWEST)
            )
            found["top_logprobs"].append(None if entry is None else _top(entry))
        return found


def _top(entry: Entry) -> dict[str, float]:
    """{text: logprob}; of tokens that read the same, the likeliest."""
    top: dict[str, float] = {}
    for found in entry.values():
        text, logprob = found.decoded_token, max(found.logprob, _LOWEST)
        top[text] = max(logprob, top.get(text, logprob))
    return top
