"""Tool calls and other forms of answers, by OpenAI's client."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

import qjax
from qjax.engine.async_engine import Delta
from qjax.engine.request import GenerationResult
from qjax.server import protocol
from qjax.server.chat import Chat
from qjax.server.protocol import ChatRequest
from tests.server.conftest import NAME, Running, engine_of, serving

# As Qwen's and Hermes' templates have it, in short.
TEMPLATE = """
{%- if tools %}<|im_start|>system
# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}
{%- for call in m.tool_calls %}<tool_call>
{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}
"""

COLOURS = ["red", "green", "blue"]
PAINT: Any = {
    "type": "function",
    "function": {
        "name": "paint",
        "description": "Paints the wall.",
        "parameters": {
            "type": "object",
            "properties": {"colour": {"enum": COLOURS}, "twice": {"type": "boolean"}},
            "required": ["colour", "twice"],
            "additionalProperties": False,
        },
    },
}
WAIT: Any = {"type": "function", "function": {"name": "wait"}}
# Tokens are as good as random, which keeps a model that knows little from writing spaces for ever.
RANDOM: Any = {"temperature": 5, "seed": 3}
ASKED: Any = [{"role": "user", "content": "paint it"}]


@pytest.fixture(scope="module")
def folder(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template has tools."""
    folder = tmp_path_factory.mktemp("models") / "tools"
    shutil.copytree(golden / "base-tiny-llama", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    params = qjax.load(folder)
    with serving(lambda: engine_of(params)) as running:
        yield running


def is_painted(arguments: str) -> bool:
    found = json.loads(arguments)
    return found.keys() == {"colour", "twice"} and found["colour"] in COLOURS


def test_a_function_that_must_be_called(client: openai.OpenAI) -> None:
    """Whatever the model would rather write."""
    options: Any = {"model": NAME, "messages": ASKED, "tools": [PAINT, WAIT]}
    options |= RANDOM
    options |= {"tool_choice": {"type": "function", "function": {"name": "paint"}}}
    found = client.chat.completions.create(**options)
    (call,) = found.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.id
    assert call.function.name == "paint"
    assert is_painted(call.function.arguments)
    assert not found.choices[0].message.content
    assert found.choices[0].finish_reason == "stop"  # as OpenAI has it where the call is named
    pieces: list[Any] = [
        each
        for chunk in client.chat.completions.create(stream=True, **options)
        for choice in chunk.choices
        for each in choice.delta.tool_calls or []
    ]
    assert [piece.index for piece in pieces] == [0] * len(pieces)
    assert pieces[0].function.name == "paint"
    assert "".join(piece.function.arguments for piece in pieces) == call.function.arguments


def test_any_call(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model=NAME,
        messages=ASKED,
        tools=[PAINT],
        tool_choice="required",
        parallel_tool_calls=False,
        **RANDOM,
    )
    (choice,) = found.choices
    (call,) = choice.message.tool_calls or []
    assert is_painted(getattr(call, "function").arguments)  # noqa: B009 (a union of types)
    assert choice.finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{**PAINT, "type": "custom"}]}, "tools"),
        (
            {"tools": [{"type": "function", "function": {"name": ""}}], "tool_choice": "required"},
            "tools",
        ),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_bad_tools(client: openai.OpenAI, fields: Any, param: str) -> None:
    options: Any = {"model": NAME, "messages": ASKED, "tools": [PAINT], **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**options)
    assert caught.value.param == param


# --- what a model writes of its own accord --------------------------------------------------------

REPLY = 'I will.\n<tool_call>\n{"name": "paint", "arguments": {"colour": "red", "twice": true}}\n'
REPLY += '</tool_call>\n<tool_call>\n{"name": "wait", "arguments": {}}\n</tool_call>'


def asked(running: Running, **fields: Any) -> Chat:
    body = {"messages": ASKED, "tools": [PAINT, WAIT], **fields}
    request = protocol.decode(json.dumps(body).encode(), ChatRequest)
    return Chat(request, running.service.model)


def result_of(text: str) -> GenerationResult:
    return GenerationResult(
        text=text,
        token_ids=(3,) * 9,
        finish_reason="stop",
        stop_reason=None,
        prompt_token_ids=(4,),
        logprobs=None,
        prompt_logprobs=None,
        prompt_tps=0.0,
        generation_tps=0.0,
        peak_memory=0,
        num_cached_tokens=0,
    )


def test_calls_in_a_reply(running: Running) -> None:
    (choice,) = asked(running).whole([result_of(REPLY)])
    calls = choice["message"]["tool_calls"]
    assert choice["message"]["content"] == "I will."
    assert [call["function"]["name"] for call in calls] == ["paint", "wait"]
    assert json.loads(calls[0]["function"]["arguments"]) == {"colour": "red", "twice": True}
    assert len({call["id"] for call in calls}) == 2
    assert choice["finish_reason"] == "tool_calls"
    (choice,) = asked(running, parallel_tool_calls=False).whole([result_of(REPLY)])
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["paint"]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_in_a_stream(running: Running, size: int) -> None:
    chat = asked(running)
    choices = []
    for start in range(0, len(REPLY), size):
        text = REPLY[start : start + size]
        result = result_of(REPLY) if start + size >= len(REPLY) else None
        choices += chat.chunks(0, Delta(text, (3,), (), result))
    content = "".join(choice["delta"].get("content", "") for choice in choices)
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    assert content == "I will."
    assert [(call["index"], call["function"]["name"]) for call in calls] == [
        (0, "paint"),
        (1, "wait"),
    ]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == [
        "tool_calls"
    ]
    assert choices[-1]["finish_reason"] == "tool_calls"


def test_no_calls_where_none_are_asked_for(running: Running) -> None:
    chat = asked(running, tool_choice="none")
    (choice,) = chat.whole([result_of(REPLY)])
    assert choice["message"]["content"] == REPLY
    assert "tool_calls" not in choice["message"]
    assert "Paints the wall." not in chat.prompt
    assert "Paints the wall." in asked(running).prompt


def test_calls_and_their_results_go_back_into_the_prompt(running: Running) -> None:
    call: dict[str, Any] = {"id": "call_1", "type": "function"}
    call["function"] = {"name": "paint", "arguments": '{"colour": "red", "twice": false}'}
    messages = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "painted"},
    ]
    prompt = asked(running, messages=messages).prompt
    assert '{"name": "paint", "arguments": {"colour": "red", "twice": false}}' in prompt
    assert "<|im_start|>tool\npainted<|im_end|>" in prompt


# --- forms ----------------------------------------------------------------------------------------


def test_json_schema(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model=NAME,
        messages=ASKED,
        **RANDOM,
        response_format={
            "type": "json_schema",
            "json_schema": {
                "name": "wall",
                "strict": True,
                "schema": PAINT["function"]["parameters"],
            },
        },
    )
    assert is_painted(found.choices[0].message.content or "")
    assert found.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "(ab|c)[0-9]{3}"}, "(ab|c)[0-9]{3}"),
        ({"choice": ["left", "right"]}, "left|right"),
        ({"grammar": 'start: "x" /[yz]{4}/'}, "x[yz]{4}"),
    ],
)
def test_structured_outputs(running: Running, form: Any, pattern: str) -> None:
    body = {"prompt": "go", **RANDOM, "structured_outputs": form}
    (choice,) = running.post("/v1/completions", body).json()["choices"]
    assert re.fullmatch(pattern, choice["text"])
    assert choice["finish_reason"] == "stop"
