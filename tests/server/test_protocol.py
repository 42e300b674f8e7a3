"""What is understood of a request, without a server around it."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qjax
from qjax.engine.sampling_params import SamplingParams
from qjax.errors import CheckpointError, RequestError
from qjax.server import protocol
from qjax.server.chat import Chat
from qjax.server.completions import Completion
from qjax.server.errors import ApiError, as_api_error
from qjax.server.protocol import ChatRequest, CompletionRequest
from qjax.server.sampling import sampling_params
from qjax.server.service import Model
from tests.server.conftest import Running

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def model(running: Running) -> Model:
    return running.service.model


def completion(**fields: Any) -> CompletionRequest:
    return protocol.decode(json.dumps({"prompt": "a", **fields}).encode(), CompletionRequest)


def chat(**fields: Any) -> ChatRequest:
    return protocol.decode(json.dumps({"messages": HELLO, **fields}).encode(), ChatRequest)


@pytest.mark.parametrize("name", sorted(protocol.UNSUPPORTED))
def test_what_does_not_work_here_is_no_secret(name: str) -> None:
    harmless, _ = protocol.UNSUPPORTED[name]
    for value in (None, *harmless):
        completion(**{name: value})
    with pytest.raises(ApiError, match=f"^{name} is not supported") as caught:
        completion(**{name: ["x"]})
    assert (caught.value.status, caught.value.param) == (400, name)


def test_what_changes_nothing_is_let_pass() -> None:
    for name in (*protocol.IGNORED, "unheard_of"):
        assert completion(**{name: {"x": 1}}) == completion()


def test_null_is_not_given() -> None:
    names = set(CompletionRequest.__struct_fields__) - {"prompt"}
    assert completion(**dict.fromkeys(names)) == completion()
    names = set(ChatRequest.__struct_fields__) - {"messages"}
    assert chat(**dict.fromkeys(names)) == chat()


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"n": "1"}, "n: expected int | null, got str.", "n"),
        ({"n": 1.5}, "n: expected int | null, got float.", "n"),
        ({"stream": 1}, "stream: expected bool | null, got int.", "stream"),
        ({"logit_bias": {"3": "x"}}, "logit_bias[...]: expected float, got str.", "logit_bias"),
        ({"response_format": {}}, "response_format.type is required.", "response_format"),
        ({"messages": [{}]}, "messages[0].role is required.", "messages"),
        ({"messages": None}, "messages: expected array, got null.", "messages"),
        (
            {"tools": [{"type": "function"}]},
            "tools[0].function is required.",
            "tools",
        ),
        (
            {"stream_options": {"x": 1}},
            "stream_options: object contains unknown field x.",
            "stream_options",
        ),
    ],
)
def test_wrong_types_name_their_place(fields: Any, message: str, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert caught.value.message == message
    assert caught.value.param == param


def test_missing_prompt() -> None:
    with pytest.raises(ApiError, match=r"^prompt is required\.$"):
        protocol.decode(b"{}", CompletionRequest)


def test_sampling_of_a_request_that_says_nothing() -> None:
    """OpenAI's temperature; and as many tokens as there is room for."""
    assert sampling_params(completion(), {}) == SamplingParams(temperature=1, max_tokens=None)


def test_the_request_goes_before_the_model_and_that_before_openai() -> None:
    defaults = {"temperature": 0.6, "top_k": 20}
    found = sampling_params(completion(top_k=5), defaults)
    assert (found.temperature, found.top_k, found.top_p) == (0.6, 5, 1)
    assert sampling_params(completion(temperature=0), defaults).temperature == 0


def test_every_field_of_sampling_arrives() -> None:
    fields: dict[str, Any] = {
        "n": 2,
        "max_tokens": 7,
        "min_tokens": 3,
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.9,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "seed": 5,
        "stop": ["x"],
        "stop_token_ids": [8],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "logit_bias": {9: 1.5},
        "allowed_token_ids": [9, 10],
    }
    assert sampling_params(completion(**fields), {}) == SamplingParams(**fields)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": {"type": "integer"}},
                }
            },
            {"json": {"type": "integer"}},
        ),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
    ],
)
def test_forms(fields: Any, wanted: dict[str, Any] | None) -> None:
    found = sampling_params(completion(**fields), {})
    assert found.structured_outputs == SamplingParams(structured_outputs=wanted).structured_outputs


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "response_format",
        ),
    ],
)
def test_bad_forms(fields: Any, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        sampling_params(completion(**fields), {})
    assert (caught.value.status, caught.value.param) == (400, param)


def test_max_completion_tokens(model: Model) -> None:
    assert Chat(chat(max_completion_tokens=9), model).work.params.max_tokens == 9
    assert Chat(chat(max_completion_tokens=9, max_tokens=9), model).work.params.max_tokens == 9
    for fields in ({"max_completion_tokens": 0}, {"max_completion_tokens": 9, "max_tokens": 8}):
        with pytest.raises(ApiError) as caught:
            Chat(chat(**fields), model)
        assert caught.value.param == "max_completion_tokens"


def test_salt_and_priority(model: Model) -> None:
    work = Completion(completion(cache_salt="mine", priority=-3), model).work
    assert (work.cache_salt, work.priority) == ("mine", -3)


def test_messages_as_templates_know_them(model: Model) -> None:
    prompt = Chat(chat(messages=[{"role": "developer", "content": "Be brief."}]), model).prompt
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    prompt = Chat(chat(add_generation_prompt=False), model).prompt
    assert prompt == "<|im_start|>user\nhello<|im_end|>\n"


def test_errors_of_templates_keep_the_path_to_themselves() -> None:
    error = CheckpointError("takes too long", file="/models/x.jinja", field="chat_template")
    told = as_api_error(error, {"messages"})
    assert told is not None
    assert (told.status, told.param) == (400, "messages")
    assert told.message == "chat_template: takes too long"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
LIKELY = st.sampled_from(
    [
        *(0, 1, -1, 2**63, 10**30, 0.5, True, "", "x", "auto", [], [0], ["x"], {}, HELLO, [HELLO]),
        *({"type": "text"}, {"type": "function", "function": {"name": "f"}}, {"0": 1}),
        {"regex": "("},
    ]
)


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
@settings(max_examples=150)
@given(data=st.data())
def test_whatever_comes_is_understood_or_refused(model: Model, kind: Any, data: Any) -> None:
    known = [*kind.__struct_fields__, *protocol.UNSUPPORTED]
    fields = data.draw(st.dictionaries(st.sampled_from(known), LIKELY | JSON, max_size=4))
    first = {"prompt": "a"} if kind is CompletionRequest else {"messages": HELLO}
    body = json.dumps({**first, **fields}).encode()
    try:
        request: Any = protocol.decode(body, kind)
        protocol.check(request)
        work = (Chat if kind is ChatRequest else Completion)(request, model).work
    except (ApiError, RequestError, CheckpointError) as error:
        told = as_api_error(error, kind.__struct_fields__)
        assert told is not None
        assert told.status == 400
        assert told.message
        msgspec.json.encode(told.body)
    else:
        assert all(0 < len(ids) < model.max_model_len for ids in work.prompts)


def test_an_error_of_nobody_is_not_told() -> None:
    assert as_api_error(ValueError("a secret"), ()) is None
    assert as_api_error(qjax.EngineError("the engine failed"), ()) is not None
