"""What a caller may ask of generation: vLLM's names and meanings, checked once.

Two defaults differ from vLLM's: decoding is greedy (temperature 0), and max_tokens is 256.
"""

import difflib
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from qjax.engine.structured_outputs import StructuredOutputs
from qjax.errors import RequestError

MAX_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to pick the tokens of one request.

    The order is vLLM's: penalties and biases on the raw logits, then temperature, min_p, top_k
    and top_p. Logprobs are those of the raw logits.

    Attributes:
      n: number of independent samples of one prompt.
      max_tokens: most tokens to generate; None for as many as the context holds.
      min_tokens: end-of-sequence and stop tokens or strings do not count before this many.
      temperature: 0 picks the likeliest token.
      top_k: sample among the k likeliest tokens; 0 or -1 for all.
      top_p: sample among the likeliest tokens that together hold this share of the probability.
      min_p: drop tokens below this fraction of the likeliest token's probability.
      presence_penalty, frequency_penalty: subtracted from the logit of a generated token, once,
        or for each time that it occurs.
      repetition_penalty: divides positive logits and multiplies negative ones, of tokens in the
        prompt or the output.
      seed: makes sampling repeatable, whatever else is in the batch; None draws a fresh one.
      stop: strings that end the text; they are cut off unless include_stop_str_in_output.
      stop_token_ids: tokens that end it, beside the model's own end-of-sequence tokens.
      ignore_eos: go on past the model's end-of-sequence tokens.
      logprobs: for each token, give this many likeliest alternatives beside the chosen one.
      prompt_logprobs: the same for each prompt token after the first.
      skip_special_tokens: leave special tokens out of the text.
      include_stop_str_in_output: keep the stop string at the end of the text.
      logit_bias: token id to the number added to its logit.
      allowed_token_ids: nothing but these can be generated.
      structured_outputs: a form that the text must have, see `StructuredOutputs`; or its field, as
        a dict. The text ends where the form is complete. Tokens that end it are left out before
        min_tokens, and those of the model with ignore_eos, as long as the form allows another.

    Raises:
      RequestError: a field is out of range or of the wrong type.
    """

    n: int = 1
    max_tokens: int | None = 256
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: Any):
            object.__setattr__(self, name, value)

        stop = self.stop
        # None stands for none of them, as in vLLM.
        put("stop", (stop,) if isinstance(stop, str) else tuple(stop or ()))
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise RequestError(f"stop must hold non-empty strings, got {text!r}.")
        put("stop_token_ids", _ids("stop_token_ids", self.stop_token_ids or ()))
        if self.allowed_token_ids is not None:
            put("allowed_token_ids", _ids("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise RequestError("allowed_token_ids must name at least one token, got none.")
        if self.structured_outputs is not None:
            put("structured_outputs", StructuredOutputs.of(self.structured_outputs))
            if self.allowed_token_ids is not None:
                raise RequestError("give structured_outputs or allowed_token_ids, not both.")
        if self.logit_bias is not None:
            keys = _ids("logit_bias", self.logit_bias)
            values = [_real("logit_bias", value) for value in self.logit_bias.values()]
            put("logit_bias", dict(zip(keys, values, strict=True)))

        for name, low in (("n", 1), ("min_tokens", 0), ("top_k", -1)):
            put(name, _integer(name, getattr(self, name), low))
        if self.max_tokens is not None:
            put("max_tokens", _integer("max_tokens", self.max_tokens, 1))
            if self.min_tokens > self.max_tokens:
                raise RequestError(
                    f"min_tokens must be at most max_tokens ({self.max_tokens}), "
                    f"got {self.min_tokens}."
                )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                put(name, _integer(name, getattr(self, name), 0, MAX_LOGPROBS))
        if self.seed is not None:
            put("seed", _integer("seed", self.seed, 0, 2**64 - 1))

        def between(name: str, interval: str, fits):
            value = _real(name, getattr(self, name))
            if not fits(value):
                raise RequestError(f"{name} must be in {interval}, got {value:g}.")
            put(name, value)

        between("temperature", "[0, inf)", lambda v: v >= 0)
        between("top_p", "(0, 1]", lambda v: 0 < v <= 1)
        between("min_p", "[0, 1]", lambda v: 0 <= v <= 1)
        between("presence_penalty", "[-2, 2]", lambda v: -2 <= v <= 2)
        between("frequency_penalty", "[-2, 2]", lambda v: -2 <= v <= 2)
        between("repetition_penalty", "(0, inf)", lambda v: v > 0)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalized(self) -> bool:
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)

    @classmethod
    def of(cls, **sampling: Any) -> "SamplingParams":
        """SamplingParams from keywords; an unknown one is a RequestError with a suggestion."""
        known = [field.name for field in fields(cls)]
        for name in sampling:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}."
                raise RequestError(f"unknown sampling parameter {name!r}: {hint}")
        return cls(**sampling)


def _integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise RequestError(f"{name} must be an integer, got {value!r}.") from None
    if number < low or (high is not None and number > high):
        wanted = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise RequestError(f"{name} must be {wanted}, got {number}.")
    return number


def _real(name: str, value: Any) -> float:
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise RequestError(f"{name} must be a number, got {value!r}.") from None
    if not math.isfinite(number):
        raise RequestError(f"{name} must be finite, got {number}.")
    return number


def _ids(name: str, values: Any) -> tuple[int, ...]:
    if isinstance(values, str):
        raise RequestError(f"{name} must be a list of token ids, got {values!r}.")
    return tuple(_integer(f"a token id in {name}", value, 0) for value in values)
