"""Tool calls in replies: as models of each kind write them, cut anywhere, and malformed.

The markers and texts are those that the models' own chat templates write, in short.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.checkpoint.chat import ChatTemplate
from qjax.checkpoint.tokenizer import Tokenizer, load_tokenizer
from qjax.engine.grammar import Grammars
from qjax.errors import RequestError
from qjax.server.tool_calls import ContentDelta, ToolCallDelta, ToolCallParser, parse
from qjax.server.tool_formats import ToolFormat, tool_format

HERMES = """{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>{% endif %}
{%- for call in messages[-1].tool_calls %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}"""
LLAMA = """{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument \
name and its value}. Do not use variables.' }}{%- for t in tools %}{{ t | tojson(indent=4) }}
{%- endfor %}{%- set call = messages[-1].tool_calls[0].function %}
{{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- "}" }}"""
MISTRAL_LIST = """{{- "[TOOL_CALLS] [" }}{%- for tool_call in messages[-1].tool_calls %}
{%- set out = tool_call.function | tojson %}{{- out[:-1] }}{{- ', "id": "' + tool_call.id + '"}' }}
{%- endfor %}{{- "]" }}"""
MISTRAL = """{%- for tool_call in messages[-1].tool_calls %}
{%- set arguments = tool_call.function.arguments %}
{%- if arguments is not string %}{%- set arguments = arguments | tojson %}{%- endif %}
{{- '[TOOL_CALLS]' + tool_call.function.name + '[ARGS]' + arguments }}{%- endfor %}"""
GRANITE = """When a tool is required to answer the user's query, respond with <|tool_call|> \
followed by a JSON list of tools used.{{ messages[-1].tool_calls | map(attribute='function') | list
| tojson }}"""
DEEPSEEK = """{%- for tool in messages[-1].tool_calls %}
{{- '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>'
+ tool['function']['name'] + '\n' + '```json' + '\n' + tool['function']['arguments'] + '\n'
+ '```' + '<｜tool▁call▁end｜>' }}{%- endfor %}"""
DEEPSEEK_31 = """{%- for tool in messages[-1].tool_calls %}
{{- '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'
+ tool['function']['name'] + '<｜tool▁sep｜>' + tool['function']['arguments']
+ '<｜tool▁call▁end｜>'}}{%- endfor %}"""
TEMPLATES = {
    "hermes": HERMES,
    "llama": LLAMA,
    "mistral list": MISTRAL_LIST,
    "mistral": MISTRAL,
    "granite": GRANITE,
    "deepseek": DEEPSEEK,
    "deepseek 3.1": DEEPSEEK_31,
}
NAMES = {
    "hermes": "hermes",
    "llama": "llama3_json",
    "mistral list": "mistral",
    "mistral": "mistral",
    "granite": "granite",
    "deepseek": "deepseek_v3",
    "deepseek 3.1": "deepseek_v31",
}
FORMATS: dict[str, ToolFormat] = {
    name: found for name, text in TEMPLATES.items() if (found := tool_format(text)) is not None
}

PARIS = ("get_weather", {"city": "Paris, {é}", "days": 2})
NOW = ("now", {})
BEGIN, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"
# format, text -> content, calls
REPLIES = [
    (
        "hermes",
        'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris, {é}", '
        '"days": 2}}\n</tool_call>\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        ("Let me see.", [PARIS, NOW]),
    ),
    (
        "hermes",
        '<tool_call>[{"name": "now", "arguments": {}}, {"name": "now"}]</tool_call>\n\nDone.  ',
        ("Done.  ", [NOW, NOW]),
    ),
    # No end: the model was stopped, or ended there.
    ("hermes", '<tool_call>\n{"name": "now", "arguments": "{}"}\n', (None, [NOW])),
    (
        "hermes",
        '<tool_call>{"name": "say", "arguments": {"text": "</tool_call> \\" \\\\"}}</tool_call>',
        (None, [("say", {"text": '</tool_call> " \\'})]),
    ),
    (
        "llama",
        '{"name": "get_weather", "parameters": {"city": "Paris, {é}", "days": 2}}; '
        '{"name": "now", "parameters": {}}',
        (None, [PARIS, NOW]),
    ),
    (
        "llama",
        '\n<|python_tag|>{"type": "function", "name": "now", "parameters": {}}',
        (None, [NOW]),
    ),
    (
        "llama",
        'I see {"name": "now", "parameters": {}}',
        ('I see {"name": "now", "parameters": {}}', []),
    ),
    ("llama", '{"name": "Ada", "age": 36}', ('{"name": "Ada", "age": 36}', [])),
    (
        "llama",
        '<|python_tag|>print("{}")',
        ('<|python_tag|>print("{}")', []),
    ),
    (
        "mistral list",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris, {é}", "days": 2}}, '
        '{"name": "now", "arguments": {}}]',
        (None, [PARIS, NOW]),
    ),
    (
        "mistral",
        'So:[TOOL_CALLS]get_weather[ARGS]{"city": "Paris, {é}", "days": 2}'
        "[TOOL_CALLS]now[CALL_ID]aB3[ARGS]{}",
        ("So:", [PARIS, NOW]),
    ),
    ("mistral", "[TOOL_CALLS]now{}", (None, [NOW])),
    (
        "granite",
        '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris, {é}", "days": 2}}]',
        (None, [PARIS]),
    ),
    (
        "deepseek",
        f"Hm.<｜tool▁calls▁begin｜>{BEGIN}function{SEP}get_weather\n```json\n"
        '{"city": "Paris, {é}", "days": 2}\n```<｜tool▁call▁end｜>\n'
        f"{BEGIN}function{SEP}now\n```json\n{{}}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ("Hm.", [PARIS, NOW]),
    ),
    (
        "deepseek 3.1",
        f"<｜tool▁calls▁begin｜>{BEGIN}now{SEP}{{}}<｜tool▁call▁end｜>{BEGIN}get_weather{SEP}"
        '{"city": "Paris, {é}", "days": 2}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        (None, [NOW, PARIS]),
    ),
]
# Of the first format: what is no call.
MALFORMED = [
    "",
    "  Hello. \n",
    "a < b <tool <tool_call",
    "<tool_call>",
    "<tool_call></tool_call>",
    '<tool_call>{"name": "now", "arguments": {}',
    '<tool_call>{"name": "now", "arguments": {"a": "}</tool_call>',
    "<tool_call>{'name': 'now', 'arguments': {}}</tool_call>",
    '<tool_call>{"name": "", "arguments": {}}</tool_call>',
    '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
    '<tool_call>{"name": "a\\nb", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "now", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "now", "arguments": "{"}</tool_call>',
    '<tool_call>{"name": "now", "arguments": {"a": NaN}}</tool_call>',
    '<tool_call>{"name": "now", "arguments": {"a": 1e999}}</tool_call>',
    '<tool_call>{"name": "now", "arguments": {"a": ' + "9" * 5000 + "}}</tool_call>",
    '<tool_call>{"name": "now", "arguments": {"a": ' + "[" * 5000 + "]" * 5000 + "}}</tool_call>",
    '<tool_call>{"name": "now", "arguments": ' + '{"a":' * 5000 + "1" + "}" * 5001,
    "<tool_call>" + "x" * 300 + '{"name": "now", "arguments": {}}</tool_call>',
    '<tool_call>call: {"name": "now", "arguments": {}}',
    "{{{}}}<tool_call>}}}}{",
]

Found = tuple[str | None, list[tuple[str, dict[str, Any]]]]


def calls_of(deltas: list[ToolCallDelta]) -> list[tuple[str, dict[str, Any]]]:
    assert [delta.index for delta in deltas] == list(range(len(deltas)))
    return [(delta.name, json.loads(delta.arguments)) for delta in deltas]


def whole(format: ToolFormat, text: str) -> Found:
    content, calls = parse(format, text)
    return content, calls_of(calls)


def streamed(format: ToolFormat, pieces: list[str]) -> Found:
    parser = ToolCallParser(format)
    deltas = [delta for piece in pieces for delta in parser.push(piece)] + parser.finish()
    content = "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
    calls = calls_of([delta for delta in deltas if isinstance(delta, ToolCallDelta)])
    return content or (None if calls else ""), calls


@pytest.mark.parametrize("name", TEMPLATES)
def test_formats_are_told_by_templates(name: str) -> None:
    assert FORMATS[name].name == NAMES[name]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content }}",
        "<tool_call>\n<function=example>\n<parameter=p>\n1\n</parameter>\n</function> arguments",
        "<tool_call>{name}\n<arg_key>{key}</arg_key>\n<arg_value>{v}</arg_value> arguments",
        "[func_name1(params_name1=params_value1)]",
    ],
)
def test_other_templates_have_none(template: str) -> None:
    assert tool_format(template) is None


@pytest.mark.parametrize(("name", "text", "expected"), REPLIES)
def test_replies(name: str, text: str, expected: Found) -> None:
    """At once, character by character, and cut in two anywhere."""
    format = FORMATS[name]
    assert whole(format, text) == expected
    assert streamed(format, list(text)) == expected
    for at in range(len(text)):
        assert streamed(format, [text[:at], text[at:]]) == expected


@pytest.mark.parametrize("text", MALFORMED)
def test_what_is_no_call_is_content(text: str) -> None:
    assert whole(FORMATS["hermes"], text) == (text, [])
    assert streamed(FORMATS["hermes"], list(text)) == (text, [])


def test_calls_after_malformed_ones_are_found() -> None:
    text = '<tool_call>\n{"name": now}\n</tool_call>\n<tool_call>{"name": "now"}</tool_call>'
    content, calls = whole(FORMATS["hermes"], text)
    assert content == '<tool_call>\n{"name": now}\n</tool_call>'
    assert calls == [NOW]


def test_content_is_held_back_only_while_it_may_be_a_call() -> None:
    parser = ToolCallParser(FORMATS["hermes"])
    assert parser.push("a") == [ContentDelta("a")]
    assert parser.push(" \n<tool") == []
    assert parser.push("s> b") == [ContentDelta(" \n<tools> b")]
    assert parser.push('<tool_call>{"name": "f"') == []
    [call] = parser.push("}")
    assert isinstance(call, ToolCallDelta)
    assert (call.index, call.name, call.arguments) == (0, "f", "{}")


def test_ids() -> None:
    found = [parse(FORMATS[n], t)[1] for n, t, (_, calls) in REPLIES if calls for _ in range(2)]
    ids = {NAMES[n]: each[0].id for (n, _, e), each in zip(REPLIES, found, strict=False) if e[1]}
    assert re.fullmatch("call_[0-9a-f]{24}", ids["hermes"])
    ids = [call.id for calls in found for call in calls]
    assert len(set(ids)) == len(ids)
    [call, _] = parse(FORMATS["mistral"], "[TOOL_CALLS]a[ARGS]{}[TOOL_CALLS]a[ARGS]{}")[1]
    assert re.fullmatch("[0-9a-zA-Z]{9}", call.id)


def test_the_first_call_alone() -> None:
    text = REPLIES[0][1]
    content, calls = parse(FORMATS["hermes"], text, parallel_tool_calls=False)
    assert (content, calls_of(calls)) == ("Let me see.", [PARIS])


def test_arguments_are_json_whatever_is_in_them() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "\\ud800", "b": "line\nline"}}'
    [call] = parse(FORMATS["hermes"], text)[1]
    call.arguments.encode()
    assert json.loads(call.arguments) == {"a": "\ud800", "b": "line\nline"}


MARKS = sorted(
    {mark for format in FORMATS.values() for mark in (*format.begins, *format.ends)}
    | {"{", "}", "[", "]", '"', "\\", ";", ",", "```", "[ARGS]", "\n", " ", "now", "function"}
    | {'"name": "now"', '"arguments": {}', '"parameters": {"a": [1]}', "<tool", SEP, "```json"}
)


@given(
    st.sampled_from(sorted(FORMATS)),
    st.lists(st.sampled_from(MARKS) | st.text(max_size=4), max_size=30),
    st.randoms(use_true_random=False),
)
def test_hostile_texts(name: str, parts: list[str], random: Any) -> None:
    """No text is an error, however it is cut; nothing but white space is lost of content."""
    text = "".join(parts)
    content, calls = whole(FORMATS[name], text)
    pieces, rest = [], text
    while rest:
        size = random.randint(1, 9)
        pieces.append(rest[:size])
        rest = rest[size:]
    assert streamed(FORMATS[name], pieces) == (content, calls)
    if not calls:
        assert content == text


@pytest.mark.parametrize("name", FORMATS)
def test_what_templates_write_is_read_back(name: str) -> None:
    """Calls of an earlier turn, with arguments as OpenAI's clients send them."""
    function = {"name": PARIS[0], "arguments": json.dumps(PARIS[1])}
    call = {"id": "a" * 9, "type": "function", "function": function}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    tools = [{"type": "function", "function": {"name": "now"}}]
    text = ChatTemplate(TEMPLATES[name], {}).render(messages, tools=tools)
    begin = text.rindex(FORMATS[name].begins[0]) if not FORMATS[name].bare else text.rindex('{"na')
    if name == "granite":
        text = text.replace(" followed by a JSON list of tools used.", "")
    assert whole(FORMATS[name], text[begin:]) == (None, [PARIS])


# --- calls that are forced ------------------------------------------------------------------------

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 5},
                "unit": {"$ref": "#/$defs/unit"},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
            "$defs": {"unit": {"enum": ["C", "F"]}},
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "now"}}


@pytest.fixture(scope="module")
def tokenizer(golden: Path) -> Tokenizer:
    return load_tokenizer(golden / "base-tiny-llama")


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids)


def random_text(grammars: Grammars, tokenizer: Tokenizer, outputs: Any, seed: int) -> str:
    """A text of the form, token by token; at its end as soon as it may end, half of the time."""
    random, matcher = np.random.default_rng(seed), grammars.matcher(outputs)
    ids: list[int] = []
    while not matcher.complete:
        bits = np.unpackbits(matcher.mask.view(np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits[: tokenizer.vocab_size])
        if tokenizer.eos_ids & {*allowed.tolist()} and random.random() < 0.5:
            break
        ids.append(int(random.choice([i for i in allowed if i not in tokenizer.eos_ids])))
        matcher.consume(ids[-1])
        assert matcher.error is None
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", FORMATS)
def test_forced_calls_are_well_formed(name: str, grammars: Grammars, tokenizer: Tokenizer) -> None:
    format = FORMATS[name]
    outputs = format.structured_outputs([WEATHER, CLOCK], tokenizer)
    seen = set()
    for seed in range(12):
        content, calls = whole(format, random_text(grammars, tokenizer, outputs, seed))
        assert content is None
        for called, arguments in calls:
            seen.add(called)
            if called == "now":
                assert arguments == {}
            else:
                assert arguments.keys() == {"city", "unit"}
                assert len(arguments["city"]) <= 5
                assert arguments["unit"] in ("C", "F")
        seen.add(len(calls) > 1)
    assert seen == {"now", "get_weather", True, False}


@pytest.mark.parametrize("name", FORMATS)
def test_one_forced_call(name: str, grammars: Grammars, tokenizer: Tokenizer) -> None:
    format = FORMATS[name]
    one: Any = {"parallel_tool_calls": False, "name": "get_weather"}
    outputs = format.structured_outputs([WEATHER, CLOCK], tokenizer, **one)
    for seed in range(4):
        content, [call] = whole(format, random_text(grammars, tokenizer, outputs, seed))
        assert (content, call[0]) == (None, "get_weather")


def test_special_tokens_are_forced_by_id(tokenizer: Tokenizer) -> None:
    """Of a vocabulary in which the mark is a token that no text may spell."""
    mark = tokenizer.decode([min(tokenizer.special_ids)], skip_special_tokens=False)
    format = ToolFormat(
        "", (mark,), (), r"\s*", mark, '{"name": "NAME", "arguments": ARGUMENTS}', "", ""
    )
    grammar = format.structured_outputs([CLOCK], tokenizer).grammar
    assert f"start: <[{min(tokenizer.special_ids)}]> call" in str(grammar)


@pytest.mark.parametrize(
    ("tools", "name", "message"),
    [
        ([CLOCK], "sing", "tool_choice names 'sing'"),
        ([], None, "at least one function"),
        (["now"], None, r"tools\[0\] must have a function"),
        ([CLOCK, {"type": "function"}], None, r"tools\[1\] must have a function"),
        ([{"function": {"name": "a b"}}], None, r"tools\[0\].function.name must be"),
        ([{"function": {"name": 'a"'}}], None, r"tools\[0\].function.name must be"),
        ([{"function": {}}], None, r"tools\[0\].function.name must be"),
        ([{"function": {"name": "a", "parameters": 3}}], None, r"parameters must be a schema"),
    ],
)
def test_bad_tools(tokenizer: Tokenizer, tools: Any, name: str | None, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        FORMATS["hermes"].structured_outputs(tools, tokenizer, name=name)
