"""One sequence on its way through the engine, and the text that it has produced."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from qjax.engine.grammar import Matcher, without
from qjax.engine.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Logprob:
    """Natural logarithm of a token's probability, its rank (1 = likeliest), and its text."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True)
class GenerationResult:
    """What one sequence came to. Prints as its text.

    Attributes:
      text: the generated text, without special tokens, cut at the stop string.
      token_ids: the generated tokens, with the one that ended the sequence.
      finish_reason: "stop" (end-of-sequence token, stop token or stop string), "length"
        (max_tokens, or the context is full) or "abort".
      stop_reason: the stop string or stop token id; None for the model's own end of sequence, and
        where structured outputs are complete. With "abort", why they could not be followed on.
      prompt_token_ids: the prompt as the model saw it.
      logprobs: for each generated token {token id: Logprob}, the chosen token first, if asked.
      prompt_logprobs: the same for the prompt, None for its first token, if asked.
      prompt_tps, generation_tps: tokens per second of this sequence, compile time left out;
        generation counts the tokens after the first.
      peak_memory: most resident memory of this process so far, bytes.
      num_cached_tokens: tokens of the prompt that were in the cache already.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None
    prompt_token_ids: tuple[int, ...]
    logprobs: list[dict[int, Logprob]] | None
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    prompt_tps: float
    generation_tps: float
    peak_memory: int
    num_cached_tokens: int = 0

    def __str__(self) -> str:
        return self.text


class OutputText:
    """Text from tokens, one at a time: finds stop strings and holds back what might become one.

    Args:
      tokenizer: gives `stream()`, which never cuts a UTF-8 character in half.
      params: `stop`, `include_stop_str_in_output` and `skip_special_tokens` are read.
    """

    def __init__(self, tokenizer: Any, params: SamplingParams):
        self.text: str = ""
        self._params = params
        self._stream = tokenizer.stream(skip_special_tokens=params.skip_special_tokens)
        self._hold = max((len(stop) for stop in params.stop), default=1) - 1
        self._taken = 0
        self._ended = False

    def push(self, token_id: int) -> None:
        self.text += self._stream.push(token_id)

    def find_stop(self, start: int) -> str | None:
        """The stop string that comes first in text[start - hold:]; the text is cut there."""
        begin = max(0, start - self._hold)
        found = [(at, s) for s in self._params.stop if (at := self.text.find(s, begin)) >= 0]
        if not found:
            return None
        at, stop = min(found)
        self.text = self.text[: at + len(stop) * self._params.include_stop_str_in_output]
        return stop

    def flush(self) -> None:
        """Shows an unfinished character as it is."""
        self.text += self._stream.flush()

    def end(self) -> None:
        """No more tokens will come, so nothing needs to be held back."""
        self._ended = True

    def take(self) -> str:
        """What may be shown by now and has not been taken yet."""
        upto = len(self.text) if self._ended else max(self._taken, len(self.text) - self._hold)
        piece = self.text[self._taken : upto]
        self._taken = upto
        return piece


@dataclass(eq=False)
class Request:
    """A sequence in the engine.

    Tokens are read from the device one step after they were sampled, so three counts differ:
    `num_computed` tokens have been sent through the model, `num_sampled` tokens have been sampled
    on the device, and `output_ids` are those read back. The first `prefill_target` tokens go in
    as prefill; the others are decoded, each fed back on the device.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    text: OutputText
    eos_ids: frozenset[int]
    max_tokens: int
    key: np.ndarray  # uint32 [2], the request's own random key
    number: int = 0  # in the order in which they came to the engine
    priority: int = 0  # lower ones run earlier
    cache_salt: str = ""
    matcher: Matcher | None = None  # of the form that its text must have
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_sampled: int = 0
    prefill_target: int = 0
    blocks: list[int] = field(default_factory=list)
    page_names: list[bytes] = field(default_factory=list)  # of full pages, as far as they are known
    num_named: int = 0  # so many of its pages have been named
    num_cached: int = 0  # tokens whose pages it found when it was last admitted
    num_cached_tokens: int | None = None  # and when it first was
    slot: int | None = None
    draft: tuple[int, ...] = ()  # guessed tokens, which its next step checks
    ngrams: dict[tuple[int, ...], int] = field(default_factory=dict)  # of `num_indexed` tokens
    num_indexed: int = 0
    failed_drafts: int = 0  # in a row; no more guesses before so many tokens as `resume_drafts`
    resume_drafts: int = 0
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=lambda: [None])
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    started: float = 0.0  # engine clock: first dispatch, first token, last token
    first_token: float = 0.0
    last_token: float = 0.0

    def __post_init__(self) -> None:
        self.prefill_target = len(self.prompt_ids)

    @property
    def known_ids(self) -> tuple[int, ...]:
        return self.prompt_ids + tuple(self.output_ids)  # no copy of a prompt alone

    @property
    def wants_prefill(self) -> bool:
        return self.num_computed < self.prefill_target

    @property
    def wants_decode(self) -> bool:
        return not self.wants_prefill and self.num_sampled < self.max_tokens

    def advance(self, count: int, steps: int = 1) -> None:
        """`count` more tokens are on their way through the model, `steps` times over."""
        self.num_computed += count * steps
        self.num_sampled += 0 if self.wants_prefill else steps

    def found(self, num_tokens: int) -> None:
        """It is admitted, and pages of its first tokens are there."""
        self.num_computed = self.num_cached = num_tokens
        if self.num_cached_tokens is None:
            self.num_cached_tokens = num_tokens

    def accept(self, count: int) -> None:
        """So many tokens of the draft, which all went in, were right."""
        self.num_computed -= len(self.draft) - count
        self.num_sampled += count
        self.draft = ()

    def token_mask(self) -> np.ndarray:
        """Of what its form allows next, all that its parameters leave of it."""
        assert self.matcher is not None
        early = set(self.eos_ids) if self.params.ignore_eos else set[int]()
        if len(self.output_ids) < self.params.min_tokens:
            early |= {*self.eos_ids, *self.params.stop_token_ids}
        return without(self.matcher.mask, sorted(early))

    def restart(self) -> None:
        """Its pages are lost: all that is known goes through the model again."""
        self.num_computed = self.num_named = 0
        self.draft = ()
        self.num_sampled = len(self.output_ids)
        self.prefill_target = len(self.prompt_ids) + len(self.output_ids)

    def receive(self, token_id: int, now: float) -> None:
        """Takes the next sampled token and decides whether it ends the sequence."""
        self.output_ids.append(token_id)
        self.first_token = self.first_token or now
        self.last_token = now
        params = self.params
        before = len(self.text.text)
        armed = len(self.output_ids) > params.min_tokens
        form = self.matcher
        # Where a form allowed it, it is the end.
        eos = token_id in self.eos_ids and not (params.ignore_eos and form is None)
        armed = armed or (eos and form is not None)
        if armed and (eos or token_id in params.stop_token_ids):
            if params.include_stop_str_in_output:
                self.text.push(token_id)
            self.text.flush()
            self.finish("stop", None if eos else token_id)
            return
        last = len(self.output_ids) >= self.max_tokens
        if form is not None:
            form.consume(token_id)
            last = last or form.complete or form.error is not None
        self.text.push(token_id)
        if last:
            self.text.flush()
        if armed and (stop := self.text.find_stop(before)) is not None:
            self.finish("stop", stop)
        elif form is not None and form.error is not None:
            self.finish("abort", form.error)
        elif form is not None and form.complete:
            self.finish("stop")
        elif last:
            self.finish("length")

    def finish(self, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        self.finish_reason = reason
        self.stop_reason = stop_reason
        self.text.end()

    def result(self, peak_memory: int) -> GenerationResult:
        prefill = self.first_token - self.started
        decode = self.last_token - self.first_token
        return GenerationResult(
            text=self.text.text,
            token_ids=tuple(self.output_ids),
            finish_reason=self.finish_reason or "abort",
            stop_reason=self.stop_reason,
            prompt_token_ids=self.prompt_ids,
            logprobs=self.logprobs if self.params.logprobs is not None else None,
            prompt_logprobs=(
                self.prompt_logprobs if self.params.prompt_logprobs is not None else None
            ),
            prompt_tps=len(self.prompt_ids) / prefill if prefill > 0 else 0.0,
            generation_tps=(len(self.output_ids) - 1) / decode if decode > 0 else 0.0,
            peak_memory=peak_memory,
            num_cached_tokens=self.num_cached_tokens or 0,
        )
