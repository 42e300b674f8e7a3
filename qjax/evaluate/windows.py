"""Windows of a text, as llama.cpp's `llama-perplexity` cuts them.

The whole text is tokenized, with what begins a sequence, and cut into windows of equal length; what
is left over is dropped. Each window is a sequence of its own, whose first token becomes the
beginning-of-sequence token where the model has one in front of a text. Only the tokens of its
second half are predicted, so that all have at least half a window before them.
"""

from __future__ import annotations

import numpy as np

from qjax.errors import RequestError
from qjax.params import Params


def windows(params: Params, text: str, length: int = 512, count: int | None = None) -> np.ndarray:
    """int32 [N, length], N at most `count`.

    Raises:
      RequestError: the text is shorter than two windows, a window has fewer than four tokens or
        more than the model takes, or the model has no tokenizer.
    """
    limit = params.config.max_position_embeddings
    if not 4 <= length <= limit:
        raise RequestError(f"a window must have 4 to {limit} tokens, got {length}.")
    if count is not None and count < 1:
        raise RequestError(f"the number of windows must be at least 1, got {count}.")
    if params.tokenizer is None:
        raise RequestError("the model has no tokenizer, which a text needs.")
    ids = np.array(params.tokenizer.encode(text), np.int32)
    if len(ids) < 2 * length:
        raise RequestError(
            f"the text has {len(ids)} tokens, which is less than two windows of {length}: take a "
            "longer text, or shorter windows."
        )
    found = ids[: len(ids) // length * length].reshape(-1, length)[:count].copy()
    prefix = params.tokenizer.encode("")
    if prefix:
        found[:, 0] = prefix[0]
    return found


def scored(length: int) -> slice:
    """The positions of a window whose logits are read: its second half. Each predicts the token
    after it, but for the last, which has none and does not count."""
    return slice(length // 2, length)


def targets_of(tokens: np.ndarray) -> np.ndarray:
    """The tokens that the positions of a window [T] that are `scored` predict; of the last one some
    token, which does not count."""
    return np.roll(tokens, -1)[scored(len(tokens))]
