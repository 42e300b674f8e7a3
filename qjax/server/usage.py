"""How many tokens a request took."""

from collections.abc import Sequence
from typing import Any

from qjax.engine.request import GenerationResult


def usage(results: Sequence[GenerationResult], n: int) -> dict[str, Any]:
    """OpenAI's usage object.

    Args:
      results: n of each prompt, one prompt after the other; prompts count once.
    """
    firsts = results[::n]
    prompt = sum(len(result.prompt_token_ids) for result in firsts)
    generated = sum(len(result.token_ids) for result in results)
    cached = sum(result.num_cached_tokens for result in firsts)
    return counts(prompt, generated) | {"prompt_tokens_details": {"cached_tokens": cached}}


def counts(prompt: int, generated: int) -> dict[str, Any]:
    """The usage object of a stream that is still running."""
    total = prompt + generated
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": total}
