"""Tokens guessed ahead of the model, which it then checks in one step: speculative decoding.

A guess is accepted as far as it is what the model comes to itself, so that the tokens are the same
with and without it. Sampling is keyed by the request and the position: also a sampled token is one
certain token, not one of many that a distribution allows (Leviathan et al., 2023, accept by
probability, which keeps the distribution but not the tokens).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from qjax.engine.request import Request
from qjax.engine.step import DECODE_STEPS
from qjax.errors import RequestError, nearest
from qjax.params import Params

# A step of more sequences is bound by arithmetic, of which wrong guesses cost some.
MAX_SEQS = 4
_LONGEST = DECODE_STEPS + 1  # a draft model decodes all but the first at once


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """vLLM's names.

    Attributes:
      method: "ngram" looks for what came after the same tokens before, in prompt and output;
        "draft_model" asks a smaller model with the same vocabulary.
      num_speculative_tokens: most tokens of a guess.
      prompt_lookup_max, prompt_lookup_min: how many tokens have to be the same, for "ngram".
      model: the smaller model.
      disable_by_batch_size: where more sequences run, nothing is guessed.

    Raises:
      RequestError: a field is out of range.
    """

    method: str = ""
    num_speculative_tokens: int = 5
    prompt_lookup_max: int = 4
    prompt_lookup_min: int = 2
    model: Params | None = field(default=None, repr=False)
    disable_by_batch_size: int = MAX_SEQS

    def __post_init__(self) -> None:
        if not self.method:
            object.__setattr__(self, "method", "ngram" if self.model is None else "draft_model")
        if self.method not in ("ngram", "draft_model"):
            raise RequestError(f"method must be 'ngram' or 'draft_model', got {self.method!r:.80}.")
        if (self.method == "draft_model") != (self.model is not None):
            raise RequestError("method 'draft_model' goes with model, and 'ngram' without.")
        limits = {
            "num_speculative_tokens": (1, _LONGEST),
            "prompt_lookup_min": (1, 64),
            "prompt_lookup_max": (self.prompt_lookup_min, 64),
            "disable_by_batch_size": (1, 32),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise RequestError(f"{name} must be an integer in [{low}, {high}], got {value!r}.")

    def as_dict(self) -> dict[str, Any]:
        """What `of` takes, but for a model, which is not written down."""
        return {
            each.name: getattr(self, each.name) for each in fields(self) if each.name != "model"
        }

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> SpeculativeConfig:
        """From a dict; an unknown key is a RequestError with a suggestion."""
        known = [each.name for each in fields(cls)]
        for name in config:
            if name not in known:
                hint = nearest(str(name), known) or f"; known are {', '.join(known)}"
                raise RequestError(f"speculative_config: {name}: no such key{hint}")
        return cls(**config)


class Proposer(Protocol):
    """Guesses what comes next."""

    def propose(self, requests: Sequence[Request], most: Sequence[int]) -> list[tuple[int, ...]]:
        """For each sequence up to so many tokens, maybe none. All their tokens have been read."""
        ...


class PromptLookup:
    """What followed the last tokens when they came before (Saxena, "Prompt Lookup Decoding")."""

    def __init__(self, longest: int, shortest: int):
        self._sizes = range(longest, shortest - 1, -1)

    def propose(self, requests: Sequence[Request], most: Sequence[int]) -> list[tuple[int, ...]]:
        """See `Proposer`."""
        return [self._one(request, count) for request, count in zip(requests, most, strict=True)]

    def _one(self, request: Request, most: int) -> tuple[int, ...]:
        places = request.ngrams
        ids = request.known_ids
        # Each n-gram points to what followed it last; those that end at the last token wait.
        for end in range(max(request.num_indexed, 1), len(ids)):
            for size in self._sizes:
                if size <= end:
                    places[ids[end - size : end]] = end
        request.num_indexed = len(ids)
        for size in self._sizes:
            at = places.get(ids[len(ids) - size :]) if size < len(ids) else None
            if at is not None:
                return ids[at : at + most]
        return ()


def may_speculate(request: Request) -> bool:
    """Whether its tokens depend on nothing but logits, temperature and what filters them."""
    params = request.params
    return not (
        params.penalized
        or params.logit_bias
        or params.allowed_token_ids
        or params.min_tokens
        or params.structured_outputs
        or params.logprobs is not None
    )


class Speculator:
    """Makes guesses where they may pay.

    Args:
      config: how to guess.
      proposer: what guesses.
    """

    def __init__(self, config: SpeculativeConfig, proposer: Proposer):
        self._config = config
        self._proposer = proposer
        self.num_draft_tokens: int = 0
        self.num_accepted_tokens: int = 0

    def wants(self, running: Sequence[Request]) -> bool:
        """Whether to guess for these, once all their tokens have been read."""
        few = 0 < len(running) <= self._config.disable_by_batch_size
        return few and all(r.wants_decode and may_speculate(r) for r in running)

    def propose(self, running: Sequence[Request]) -> None:
        """Sets `draft` of each."""
        most = [
            min(self._config.num_speculative_tokens, r.max_tokens - r.num_sampled - 1)
            * (len(r.output_ids) >= r.resume_drafts)
            for r in running
        ]
        asked = [(r, m) for r, m in zip(running, most, strict=True) if m > 0]
        if not asked:
            return
        drafts = self._proposer.propose([r for r, _ in asked], [m for _, m in asked])
        for (request, _), draft in zip(asked, drafts, strict=True):
            request.draft = draft

    def checked(self, request: Request, accepted: int) -> None:
        """Counts; after a guess that was all wrong, there is a pause, longer each time."""
        self.num_draft_tokens += len(request.draft)
        self.num_accepted_tokens += accepted
        request.failed_drafts = 0 if accepted else min(request.failed_drafts + 1, 5)
        # The step itself gives one token, whatever was guessed.
        request.resume_drafts = len(request.output_ids) + (1 << request.failed_drafts)
