"""Requests as they come in: OpenAI's fields, and those that vLLM adds.

Types are strict, and null stands for a field that is not given. What is known, but does not work
here, is an error unless it asks for nothing; what nobody knows is ignored, and logged once.
"""

import logging
from typing import Any, TypeVar

import msgspec

from qjax.server.errors import ApiError, invalid

logger = logging.getLogger("qjax.server")
T = TypeVar("T", bound=msgspec.Struct)

_MOST_STOPS = 64  # each is looked for after each token
_LONGEST_STOP = 1024
_MOST_N = 128


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Attributes:
    include_usage: end with a chunk that has no choices, but the usage.
    continuous_usage_stats: with it, the usage so far in every other chunk too.
    """

    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(msgspec.Struct, kw_only=True):
    """A schema with a name; `strict` makes no difference: all are held to exactly."""

    name: str = ""
    schema: dict[str, Any] | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    """Attributes:
    type: "text", "json_object" or "json_schema".
    """

    type: str
    json_schema: JsonSchema | None = None


class Sampling(msgspec.Struct, kw_only=True):
    """What both kinds of requests have; see `qjax.SamplingParams`, and OpenAI's reference."""

    model: str | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = None
    cache_salt: str | None = None


class CompletionRequest(Sampling, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None


class Part(msgspec.Struct, kw_only=True):
    """A part of a message."""

    type: str
    text: str | None = None


class Function(msgspec.Struct, kw_only=True):
    name: str
    arguments: str


class ToolCall(msgspec.Struct, kw_only=True):
    id: str = ""
    type: str = "function"
    function: Function


class Message(msgspec.Struct, kw_only=True):
    """One message of a conversation."""

    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class ToolFunction(msgspec.Struct, kw_only=True, omit_defaults=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True):
    """A function that the model may call."""

    type: str
    function: ToolFunction


class NamedFunction(msgspec.Struct, kw_only=True):
    name: str


class NamedTool(msgspec.Struct, kw_only=True):
    """The function that the model must call."""

    type: str
    function: NamedFunction


class ChatRequest(Sampling, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /tokenize: `prompt`, or `messages` (with `tools`)."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


# Known fields that do nothing here, and need not.
IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "request_id"),
    *("prompt_cache_key", "prompt_cache_retention", "verbosity", "include_reasoning"),
}

_TEMPLATE = "the chat template comes with the model"
_CONSTRAINED = "use structured_outputs or response_format"

# Known fields that do not work here: what they may be all the same, and what helps.
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((), "text is all there is"),
    "bad_words": (([],), "use logit_bias"),
    "best_of": ((1,), "use n"),
    "chat_template": ((), _TEMPLATE),
    "chat_template_kwargs": (({},), _TEMPLATE),
    "continue_final_message": ((False,), "use /v1/completions"),
    "documents": (([],), "put them into messages"),
    "function_call": ((), "use tool_choice"),
    "functions": ((), "use tools"),
    "guided_choice": ((), _CONSTRAINED),
    "guided_grammar": ((), _CONSTRAINED),
    "guided_json": ((), _CONSTRAINED),
    "guided_regex": ((), _CONSTRAINED),
    "kv_transfer_params": ((), ""),
    "length_penalty": ((1,), ""),
    "logits_processors": (([],), "use logit_bias"),
    "mm_processor_kwargs": (({},), "text is all there is"),
    "modalities": ((["text"],), "text is all there is"),
    "prediction": ((), ""),
    "prompt_logprobs": ((), "use echo and logprobs of /v1/completions"),
    "reasoning_effort": ((), ""),
    "return_token_ids": ((False,), "use /tokenize"),
    "return_tokens_as_token_ids": ((False,), ""),
    "spaces_between_special_tokens": ((True,), ""),
    "suffix": (("",), ""),
    "truncate_prompt_tokens": ((), "shorten the prompt"),
    "use_beam_search": ((False,), "use n"),
    "web_search_options": ((), ""),
}

_warned: set[str] = set()


def decode(body: bytes, kind: type[T]) -> T:
    """A request from its body.

    Raises:
      ApiError: it is no JSON, a field has the wrong type, or asks for what does not work here.
    """
    try:
        given = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        request = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise invalid("the body is nested too deep.") from None
    known = kind.__struct_fields__
    for name, value in given.items():
        if name not in known:
            _check_unknown(name, value)
    return request


def check(request: Sampling) -> None:
    """Raises ApiError for what the types of the fields leave open, and `SamplingParams` too."""
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options goes with stream, which is not set.", "stream_options")
    if request.n is not None and request.n > _MOST_N:
        raise invalid(f"n must be at most {_MOST_N}, got {request.n}.", "n")
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > _MOST_STOPS:
        raise invalid(f"stop must hold at most {_MOST_STOPS} strings, got {len(stops)}.", "stop")
    ids = request.stop_token_ids or []
    if len(ids) > _MOST_STOPS:
        raise invalid(
            f"stop_token_ids must hold at most {_MOST_STOPS} ids, got {len(ids)}.",
            "stop_token_ids",
        )
    longest = max(map(len, stops), default=0)
    if longest > _LONGEST_STOP:
        raise invalid(
            f"stop must hold strings of at most {_LONGEST_STOP} characters, got one of {longest}.",
            "stop",
        )


def _check_unknown(name: str, value: msgspec.Raw) -> None:
    if name in UNSUPPORTED:
        harmless, instead = UNSUPPORTED[name]
        found = msgspec.json.decode(value)
        if found is not None and found not in harmless:
            hint = f": {instead}" if instead else ""
            raise invalid(f"{name} is not supported{hint}.", name)
    elif name not in IGNORED and name not in _warned and len(_warned) < 100:
        _warned.add(name)
        logger.warning("unknown field ignored", extra={"field": name[:80]})


def _wrong_type(message: str) -> ApiError:
    """`Expected `int`, got `str` - at `$.n`` in our words."""
    what, _, path = message.replace("`", "").partition(" - at ")
    path = path.removeprefix("$").removeprefix(".")
    what = what[:1].lower() + what[1:]
    if "missing required field " in what:
        path = f"{path}.{what.rpartition(' ')[2]}".removeprefix(".")
        what = "is required"
    if not path:
        return invalid(f"the body is not a request: {what}.")
    param = path.partition(".")[0].partition("[")[0]
    return invalid(f"{path}{' ' if what == 'is required' else ': '}{what}.", param)
