"""POST /v1/completions: texts, or token ids, and how they go on."""

from collections.abc import Iterator, Sequence
from typing import Any

from qjax.checkpoint.tokenizer import Tokenizer
from qjax.engine.async_engine import Delta
from qjax.engine.request import GenerationResult
from qjax.server.errors import invalid
from qjax.server.generation import Work
from qjax.server.logprobs import LegacyLogprobs
from qjax.server.prompts import encode_within
from qjax.server.protocol import CompletionRequest
from qjax.server.sampling import sampling_params
from qjax.server.service import Model


class Completion:
    """A request, and what its answer looks like; see `qjax.server.reply`.

    With `echo` and `logprobs`, the tokens of the prompt get theirs too, and max_tokens may be 0:
    so a client learns how likely a text is.

    Raises:
      ApiError, RequestError: something is out of range.
    """

    kind = "text_completion"
    prefix = "cmpl-"

    def __init__(self, request: CompletionRequest, model: Model):
        self.model = model
        tokenizer: Tokenizer = model.params.tokenizer
        self._echo = bool(request.echo)
        self._logprobs = request.logprobs
        scores = self._echo and self._logprobs is not None
        if scores and request.stream:
            raise invalid("stream does not go with both echo and logprobs.", "stream")
        # One token is generated all the same, and left out.
        self._nothing = self._echo and request.max_tokens == 0
        special = request.add_special_tokens is not False
        prompts = list(_prompts(request.prompt))
        encoded = tuple(
            encode_within(tokenizer, each, special, model.max_model_len, "prompt")
            if isinstance(each, str)
            else tuple(each)
            for each in prompts
        )
        self.prompt = request.prompt
        self.work = Work(
            prompts=encoded,
            params=sampling_params(
                request,
                model.defaults,
                logprobs=self._logprobs,
                prompt_logprobs=self._logprobs if scores else None,
                max_tokens=1 if self._nothing else request.max_tokens,
            ),
            priority=request.priority or 0,
            cache_salt=request.cache_salt or "",
        )
        self.work.check(model, "prompt")
        skip = self.work.params.skip_special_tokens
        self._texts = [
            each if isinstance(each, str) else tokenizer.decode(each, skip)
            for each in prompts
            if self._echo
        ]
        count = len(prompts) * self.work.params.n
        self._offsets = [LegacyLogprobs(tokenizer, skip) for _ in range(count)]

    def whole(self, results: Sequence[GenerationResult]) -> list[dict[str, Any]]:
        """The choices of an answer that is not streamed."""
        return [self._choice(index, result) for index, result in enumerate(results)]

    def opening(self) -> Iterator[dict[str, Any]]:
        """The choices that begin a stream, one a chunk: the prompts, if asked."""
        for prompt, text in enumerate(self._texts):
            for sample in range(self.work.params.n):
                index = prompt * self.work.params.n + sample
                yield {"index": index, "text": text, "logprobs": None, "finish_reason": None}

    def chunks(self, index: int, delta: Delta) -> Iterator[dict[str, Any]]:
        """The choices that a delta makes, one a chunk; the last one says why it finished."""
        logprobs = None
        if delta.logprobs and not self._nothing:
            logprobs = self._offsets[index].of(delta.token_ids, delta.logprobs)
        text = "" if self._nothing else delta.text
        if not text and logprobs is None and delta.result is None:
            return
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}
        if delta.result is not None:
            choice["finish_reason"] = self._reason(delta.result)
            choice["stop_reason"] = delta.result.stop_reason
        yield choice

    def _choice(self, index: int, result: GenerationResult) -> dict[str, Any]:
        text = "" if self._nothing else result.text
        if self._echo:
            text = self._texts[index // self.work.params.n] + text
        logprobs = None
        if self._logprobs is not None:
            entries = [*(result.prompt_logprobs or ()), *(result.logprobs or ())]
            ids = result.token_ids
            if result.prompt_logprobs is not None:
                ids = (*result.prompt_token_ids, *ids)
            kept = len(ids) - self._nothing
            logprobs = self._offsets[index].of(ids[:kept], entries[:kept])
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": self._reason(result),
            "stop_reason": result.stop_reason,
        }

    def _reason(self, result: GenerationResult) -> str:
        return "length" if self._nothing else result.finish_reason


def _prompts(given: str | list[Any]) -> Iterator[str | list[int]]:
    """A text, texts, token ids, or lists of token ids: one by one."""
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given:
        raise invalid("prompt is empty: give at least one token.", "prompt")
    for each in given:
        if isinstance(each, str) != isinstance(given[0], str) or isinstance(each, int):
            raise invalid(
                "prompt must be a string, a list of strings, a list of token ids or a list of "
                "lists of token ids.",
                "prompt",
            )
        if not isinstance(each, str) and not all(isinstance(token, int) for token in each):
            raise invalid("prompt must have integers as token ids.", "prompt")
        yield each
