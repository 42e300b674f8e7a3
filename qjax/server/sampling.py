"""From the fields of a request to `SamplingParams`."""

from typing import Any

from qjax.engine.sampling_params import SamplingParams
from qjax.engine.structured_outputs import StructuredOutputs
from qjax.errors import RequestError
from qjax.server.errors import invalid
from qjax.server.protocol import ResponseFormat, Sampling

# Fields that mean the same in both.
_SAME = (
    *("n", "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "stop", "stop_token_ids"),
    *("ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "allowed_token_ids"),
)


def sampling_params(request: Sampling, defaults: dict[str, Any], **more: Any) -> SamplingParams:
    """The sampling parameters of a request.

    What it does not give is by the model's generation_config.json, then by OpenAI: temperature 1,
    and as many tokens as the context holds.

    Args:
      defaults: see `qjax.sampling_defaults`.
      more: parameters that go before the request's own.

    Raises:
      RequestError, ApiError: a field is out of range.
    """
    given = {name: getattr(request, name) for name in _SAME}
    given["logit_bias"] = _logit_bias(request.logit_bias)
    if request.seed is not None:
        if not -(2**63) <= request.seed < 2**64:
            raise invalid(f"seed must be in [-2^63, 2^64), got {request.seed}.", "seed")
        given["seed"] = request.seed % 2**64  # OpenAI's may be negative
    given["structured_outputs"] = _form(request)
    found = {name: value for name, value in {**given, **more}.items() if value is not None}
    return SamplingParams(**{"temperature": 1.0, "max_tokens": None, **defaults, **found})


def _logit_bias(given: dict[str, float] | None) -> dict[int, float] | None:
    if given is None:
        return None
    for key, value in given.items():
        if not key.isdecimal() or len(key) > 10:
            raise invalid(
                f"logit_bias must have token ids as keys, got {key[:40]!r}.", "logit_bias"
            )
        if not -100 <= value <= 100:
            raise invalid(f"logit_bias must be in [-100, 100], got {value:g}.", "logit_bias")
    return {int(key): value for key, value in given.items()}


def _form(request: Sampling) -> StructuredOutputs | None:
    """What the text must be, by response_format or structured_outputs."""
    form = request.response_format
    if form is not None and form.type != "text" and request.structured_outputs is not None:
        raise invalid("give response_format or structured_outputs, not both.", "response_format")
    try:
        if request.structured_outputs is not None:
            return StructuredOutputs.of(request.structured_outputs)
        return None if form is None else _of_response_format(form)
    except RequestError as error:
        name = "response_format" if request.structured_outputs is None else "structured_outputs"
        raise invalid(str(error), name) from None


def _of_response_format(form: ResponseFormat) -> StructuredOutputs | None:
    if form.type == "text":
        return None
    if form.type == "json_object":
        return StructuredOutputs(json_object=True)
    if form.type != "json_schema":
        raise RequestError(
            "response_format.type must be text, json_object or json_schema, "
            f"got {form.type[:40]!r}."
        )
    if form.json_schema is None or form.json_schema.schema is None:
        raise RequestError("response_format.json_schema.schema is required.")
    return StructuredOutputs(json=form.json_schema.schema)
