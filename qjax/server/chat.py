"""POST /v1/chat/completions: from a conversation to the model's reply."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from qjax.engine.async_engine import Delta
from qjax.engine.request import GenerationResult
from qjax.engine.sampling_params import MAX_LOGPROBS
from qjax.server.errors import invalid
from qjax.server.generation import Work
from qjax.server.logprobs import chat_logprobs
from qjax.server.messages import chat_prompt
from qjax.server.prompts import encode_within
from qjax.server.protocol import ChatRequest, NamedTool
from qjax.server.sampling import sampling_params
from qjax.server.service import Model
from qjax.server.tool_calls import ToolCallDelta, ToolCallParser, parse
from qjax.server.tool_formats import ToolFormat, tool_format


@dataclass(frozen=True)
class _Tools:
    """How calls of tools are read, and whether the reply must be such calls."""

    format: ToolFormat
    parallel: bool
    name: str | None = None
    required: bool = False


class Chat:
    """A request, and what its answer looks like; see `qjax.server.reply`.

    Raises:
      ApiError, RequestError, CheckpointError: something is out of range.
    """

    kind = "chat.completion"
    prefix = "chatcmpl-"

    def __init__(self, request: ChatRequest, model: Model):
        self.model = model
        self._tools = _tools(request, model)
        self._top = _top_logprobs(request)
        offered = request.tools if request.tool_choice != "none" else None
        opens = request.add_generation_prompt is not False
        self.prompt = chat_prompt(model.params.tokenizer, request.messages, offered, opens)
        more: dict[str, Any] = {"logprobs": self._top}
        if request.max_completion_tokens is not None:
            if request.max_tokens not in (None, request.max_completion_tokens):
                raise invalid(
                    "give max_completion_tokens or max_tokens, not both.", "max_completion_tokens"
                )
            if request.max_completion_tokens < 1:
                raise invalid(
                    "max_completion_tokens must be at least 1, "
                    f"got {request.max_completion_tokens}.",
                    "max_completion_tokens",
                )
            more["max_tokens"] = request.max_completion_tokens
        if self._tools is not None:
            # Of some models, special tokens open calls.
            more["skip_special_tokens"] = False
            if self._tools.required:
                more["structured_outputs"] = self._tools.format.structured_outputs(
                    msgspec.to_builtins(request.tools),
                    model.params.tokenizer,
                    name=self._tools.name,
                    parallel_tool_calls=self._tools.parallel,
                )
        ids = encode_within(
            model.params.tokenizer, self.prompt, False, model.max_model_len, "messages"
        )
        self.work = Work(
            prompts=(ids,),
            params=sampling_params(request, model.defaults, **more),
            priority=request.priority or 0,
            cache_salt=request.cache_salt or "",
        )
        self.work.check(model, "messages")
        self._parsers = [
            None
            if self._tools is None
            else ToolCallParser(self._tools.format, self._tools.parallel)
            for _ in range(self.work.params.n)
        ]
        self._called = [False] * self.work.params.n

    def whole(self, results: Sequence[GenerationResult]) -> list[dict[str, Any]]:
        """The choices of an answer that is not streamed."""
        return [self._choice(index, result) for index, result in enumerate(results)]

    def opening(self) -> Iterator[dict[str, Any]]:
        """The choices that begin a stream, one a chunk."""
        for index in range(self.work.params.n):
            yield {
                "index": index,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }

    def chunks(self, index: int, delta: Delta) -> Iterator[dict[str, Any]]:
        """The choices that a delta makes, one a chunk; the last one says why it finished."""
        pieces = self._pieces(index, delta)
        logprobs = None
        if self._top is not None and delta.logprobs:
            logprobs = chat_logprobs(delta.logprobs, self._top, self.model.params.tokenizer)
        if not pieces and (logprobs is not None or delta.result is not None):
            pieces = [{}]
        for i, piece in enumerate(pieces):
            choice = {"index": index, "delta": piece, "logprobs": logprobs, "finish_reason": None}
            logprobs = None
            if delta.result is not None and i == len(pieces) - 1:
                choice["finish_reason"] = self._reason(delta.result, self._called[index])
                choice["stop_reason"] = delta.result.stop_reason
            yield choice

    def _pieces(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """What a delta adds to the message."""
        parser = self._parsers[index]
        if parser is None:
            return [{"content": delta.text}] if delta.text else []
        found = parser.push(delta.text)
        if delta.result is not None:
            found += parser.finish()
        pieces = []
        for each in found:
            if isinstance(each, ToolCallDelta):
                self._called[index] = True
                pieces.append({"tool_calls": [{"index": each.index, **_call(each)}]})
            else:
                pieces.append({"content": each.text})
        return pieces

    def _choice(self, index: int, result: GenerationResult) -> dict[str, Any]:
        content, calls = result.text, []
        if self._tools is not None:
            content, calls = parse(self._tools.format, result.text, self._tools.parallel)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        logprobs = None
        if self._top is not None:
            entries = result.logprobs or ()
            logprobs = chat_logprobs(entries, self._top, self.model.params.tokenizer)
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": self._reason(result, bool(calls)),
            "stop_reason": result.stop_reason,
        }

    def _reason(self, result: GenerationResult, called: bool) -> str:
        # OpenAI says so of a call that the model chose, not of one that the request named.
        named = self._tools is not None and self._tools.name is not None
        if called and not named and result.finish_reason == "stop":
            return "tool_calls"
        return result.finish_reason


def _call(call: ToolCallDelta) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _tools(request: ChatRequest, model: Model) -> _Tools | None:
    """What tools and tool_choice say; None where no calls are to be made."""
    choice = request.tool_choice
    if not request.tools:
        if choice not in (None, "none", "auto"):
            raise invalid("tool_choice goes with tools, which are not given.", "tool_choice")
        return None
    for i, tool in enumerate(request.tools):
        if tool.type != "function":
            raise invalid(f"tools[{i}].type must be function, got {tool.type[:40]!r}.", "tools")
    if choice == "none":
        return None
    template = model.params.tokenizer.chat_template
    format = None if template is None else tool_format(template.text)
    if format is None:
        raise invalid("tools: this model's chat template has no known form for them.", "tools")
    asked = request.response_format is not None and request.response_format.type != "text"
    if asked or request.structured_outputs is not None:
        name = "response_format" if asked else "structured_outputs"
        raise invalid(f"{name} would rule calls out: give it or tools, not both.", name)
    parallel = request.parallel_tool_calls is not False
    if isinstance(choice, NamedTool):
        return _Tools(format, parallel=False, name=choice.function.name, required=True)
    if choice not in (None, "auto", "required"):
        raise invalid(
            f"tool_choice must be none, auto, required or a function, got {choice[:40]!r}.",
            "tool_choice",
        )
    return _Tools(format, parallel, required=choice == "required")


def _top_logprobs(request: ChatRequest) -> int | None:
    """How many of the likeliest tokens to give with each token; None for no logprobs at all."""
    if not request.logprobs:
        if request.top_logprobs:
            raise invalid("top_logprobs goes with logprobs, which is not set.", "top_logprobs")
        return None
    top = request.top_logprobs or 0
    if not 0 <= top <= MAX_LOGPROBS:
        raise invalid(f"top_logprobs must be in [0, {MAX_LOGPROBS}], got {top}.", "top_logprobs")
    return top
