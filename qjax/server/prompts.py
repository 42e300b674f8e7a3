"""Texts of any length to token ids, as far as a model could take them."""

from qjax.checkpoint.tokenizer import Tokenizer
from qjax.server.errors import ApiError, invalid

# Characters a token: most texts have fewer, so that a beginning tells that one is too long.
_PER_TOKEN = 8
# The end of a beginning may come to other tokens than it does inside of the text.
_SLACK = 64


def encode_within(
    tokenizer: Tokenizer, text: str, add_special_tokens: bool, max_model_len: int, param: str
) -> tuple[int, ...]:
    """Token ids of a text. One that is far too long is not read to its end: that takes seconds.

    Raises:
      ApiError: it is too long by far; what is too long by little is left to `Work.check`.
    """
    size = _PER_TOKEN * (max_model_len + _SLACK)
    while size < len(text):
        count = len(tokenizer.encode(text[:size], add_special_tokens))
        if count > max_model_len + _SLACK:
            raise too_long(f"more than {max_model_len}", max_model_len, param)
        size *= 4
    return tuple(tokenizer.encode(text, add_special_tokens))


def too_long(count: str, max_model_len: int, param: str) -> ApiError:
    """A prompt has so many tokens, and no room is left for another."""
    return invalid(
        f"{param}: the prompt has {count} tokens, but must have less than max_model_len, which is "
        f"{max_model_len}.",
        param,
        "context_length_exceeded",
    )
