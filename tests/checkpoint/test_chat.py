"""Chat templates: what they make, and that hostile ones are stopped early and cheaply."""

import gc
import json
import resource
import time

import pytest

from qjax.checkpoint.chat import ChatTemplate
from qjax.errors import CheckpointError, RequestError

MESSAGES = [{"role": "user", "content": " Hi "}]
# SmolLM2's.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def render(text, messages=MESSAGES, **special_tokens):
    return ChatTemplate(text, special_tokens, file="tokenizer_config.json").render(messages)


def test_a_real_template():
    assert render(CHATML) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n"
    )
    no_reply = ChatTemplate(CHATML, {}).render([{"role": "system", "content": "s"}], False)
    assert no_reply == "<|im_start|>system\ns<|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}{{ eos_token }}{{ tools is none }}", "<s>True"),
        ("{% for m in messages %}\n  {% if true %}\n{{ m.role }}{% endif %}\n{% endfor %}", "user"),
        ("{% for m in messages %}{{ loop.index }}{{ loop.last }}{% break %}{% endfor %}", "1True"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": " Hi "}]'),
        ("{{ '<é>' | tojson }}{{ [1] | tojson(indent=2) }}", '"<é>"[\n  1\n]'),
        ("{{ messages[0].content | trim ~ 1 ~ none }}", "Hi1None"),
        ("{{ messages | map(attribute='role') | join('-') }}", "user"),
        ("{{ messages | selectattr('role', 'equalto', 'x') | list }}", "[]"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}", "2"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('a') }}{{ f(1) }}", "<a><1>"),
        ("{% generation %}a{{ 1 }}{% endgeneration %}b", "a1b"),
        ("{{ 'a,b'.split(',')[-1] }}{{ 'abc'[1:] }}{{ [1, 2][::-1] }}", "bbc[2, 1]"),
        ("{{ 7 % 4 }}{{ 2 ** 10 }}{{ 'ab' * 2 }}{{ 'a' in 'ba' }}", "31024ababTrue"),
        ("{% for k, v in messages[0].items() %}{{ k }}{% endfor %}", "rolecontent"),
        ("{{ strftime_now('%Y-%m-%d') | length }}{{ nothing }}{{ nothing.x is defined }}", None),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x | upper | replace('A', 'b') }}", "b1"),
        ("{{ 'a\nb' | indent(2) }}", "a\n  b"),
    ],
)
def test_what_templates_use(template, expected):
    if expected is None:
        with pytest.raises(CheckpointError, match="nothing"):
            render(template)
        expected = "10"
        template = "{{ strftime_now('%Y-%m-%d') | length }}{{ nothing }}"
    assert render(template, bos_token="<s>", eos_token="") == expected


def test_a_long_conversation_is_not_too_much():
    messages = [{"role": "user", "content": "word " * 400}] * 500
    assert len(render(CHATML, messages)) > 1_000_000


def test_a_template_may_refuse():
    with pytest.raises(RequestError, match="no system role"):
        render("{{ raise_exception('no system role') }}")


@pytest.mark.parametrize(
    "messages", [["hi"], [{"content": "a"}], [{"role": "user", "content": {1}}]]
)
def test_messages_of_another_form(messages):
    with pytest.raises(RequestError, match="message"):
        render(CHATML, messages)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"function": {"name": "add", "arguments": '{"a": 1, "b": {"c": "é"}}'}}


def test_tools():
    template = ChatTemplate("{% for tool in tools %}{{ tool | tojson }}{% endfor %}", {})
    assert template.render(MESSAGES, tools=[TOOL, TOOL]) == json.dumps(TOOL) * 2
    none = ChatTemplate("{{ tools is none }}", {})
    assert [none.render(MESSAGES, tools=tools) for tools in (None, [], [TOOL])] == [
        *("True", "True", "False")
    ]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # As Llama's and Qwen 2.5's, Mistral's, Granite's, Qwen 3's, DeepSeek's and Phi's have it.
        ("{{ call.arguments | tojson }}", '{"a": 1, "b": {"c": "é"}}'),
        ("{{ call | tojson }}", '{"name": "add", "arguments": {"a": 1, "b": {"c": "é"}}}'),
        ("{% for k, v in call.arguments | items %}{{ k }}{% endfor %}", "ab"),
        (
            "{% if call.arguments is string %}{{ call.arguments }}{% else %}"
            "{{ call.arguments | tojson }}{% endif %}",
            '{"a": 1, "b": {"c": "é"}}',
        ),
        ("{{ 'x' + call['arguments'] + 'y' }}", 'x{"a": 1, "b": {"c": "é"}}y'),
        ('{"arguments": {{ call.arguments }}}', '{"arguments": {"a": 1, "b": {"c": "é"}}}'),
    ],
)
def test_arguments_of_calls_are_json(template, expected):
    messages = [{"role": "assistant", "content": None, "tool_calls": [CALL]}]
    text = "{% set call = messages[0].tool_calls[0].function %}" + template
    assert render(text, messages) == expected
    assert isinstance(CALL["function"]["arguments"], str)


def test_arguments_that_are_no_object_stay_as_they_are():
    template = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    for arguments in ("{", "[" * 99999, "3"):
        call = {"function": {"name": "add", "arguments": arguments}}
        messages = [{"role": "assistant", "tool_calls": [call, None, {"function": 3}]}]
        assert render(template, messages) == json.dumps(arguments)


@pytest.mark.parametrize("tools", [["add"], "add", [{"name": {1}}], 3, {"a": TOOL}])
def test_tools_of_another_form(tools):
    with pytest.raises(RequestError, match="tools"):
        ChatTemplate(CHATML, {}).render(MESSAGES, tools=tools)


def test_the_callers_messages_are_out_of_reach():
    messages = [{"role": "user", "content": ["a"]}]
    with pytest.raises(CheckpointError):
        render("{{ messages[0].content.append(1) }}", messages)
    assert messages == [{"role": "user", "content": ["a"]}]


GROW = "{% set ns = namespace(x='aa', y='aa', l=[1]) %}{% for i in range(60) %}"
HOSTILE = {
    # memory
    "product": "{{ 'a' * 10**8 }}",
    "product of products": "{% set x = 'a' * 100000 %}{{ (x * 100000) | length }}",
    "list product": "{{ [1] * 10**9 }}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "squares": GROW + "{% set ns.n = (ns.n or 3) * (ns.n or 3) %}{% endfor %}",
    "sum": GROW + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "list sum": GROW + "{% set ns.l = ns.l + ns.l %}{% endfor %}",
    "concatenation": GROW + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "captured output": GROW
    + "{% set t %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = t %}{% endfor %}",
    "nested lists": GROW + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "nested dicts": GROW + "{% set ns.l = dict(a=ns.l, b=ns.l) %}{% endfor %}{{ ns.l | tojson }}",
    "varargs": "{% macro m() %}{% set ns.x = varargs %}{% endmacro %}"
    + GROW
    + "{{ m(ns.x, ns.x) }}{% endfor %}",
    "macros": "{% macro d(x) %}{{ x }}{{ x }}{% endmacro %}{{ "
    + "d(" * 40
    + "'a'"
    + ")" * 41
    + " }}",
    "output": "{% for i in range(100000) %}" + "a" * 9000 + "{% endfor %}",
    "output of calls": "{% for i in range(100000) %}{{ 'a' * 1000 }}{% endfor %}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "join": "{{ (['a' * 1000] * 100000) | join('b' * 1000) }}",
    "join method": "{{ ('b' * 100000).join(range(100000) | map('string')) }}",
    "replace": "{{ ('a' * 100000) | replace('', 'b' * 100000) }}",
    "replace method": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "center": "{{ 'a' | center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'['zfill'](10**9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "indent": "{{ ('a\n' * 100000) | indent(100000) }}",
    "first indent": "{{ 'a' | indent(10**9, true) }}",
    "indented json": "{{ [[[1]]] | tojson(indent=10**9) }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "batch": "{{ [1] | batch(10**9, 1) | list }}",
    "date": "{{ strftime_now('%1000000000Y') }}",
    "slices": "{% set x = 'a' * 500000 %}{% set y = [" + "x[1:]," * 1000 + "] %}",
    # time
    "nested loops": "{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2,
    "huge range": "{% for i in range(10**12) %}{% endfor %}",
    "rounding": "{{ 5 | round(-1000000000) }}",
    "sorting": "{% for i in range(100000) %}{{ range(100000) | sort | length }}{% endfor %}",
    "comparing": GROW
    + "{% set ns.x = (ns.x, ns.x) %}{% set ns.y = (ns.y, ns.y) %}{% endfor %}{{ ns.x == ns.y }}",
    "searching": "{{ ('a' * 500000).rfind('b' + 'a' * 250000) }}",
    "recursion": "{% macro r() %}{{ r() }}{{ r() }}{% endmacro %}{{ r() }}",
    "recursive loop": "{% for x in range(9999) recursive %}{{ loop(range(9999)) }}{% endfor %}",
    # code
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by filter": "{{ '' | attr('__class__') }}",
    "self": "{{ self.__init__.__globals__ }}",
    "globals": "{{ raise_exception.__globals__.x }}",
    "cycler": "{{ cycler.__init__.__globals__ }}",
    "include": "{% include '/etc/hostname' %}",
    "import": "{% import 'os' as os %}",
    "printing the namespace": GROW + "{% endfor %}{% set ns.x = ns %}{{ ns }}",
    # the compiler
    "too long": "a" * 40_000,
    "syntax": "{% if %}",
    "open": "{{ " * 10_000,
    "parentheses": "{{ " + "(" * 10_000 + " }}",
    "sum of ones": "{{ 1" + "+1" * 15_000 + " }}",
    "attributes": "{{ a" + ".b" * 15_000 + " }}",
    "blocks": "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "many parts": "{{ x }}" * 4500,
    "a large number": "{{ 1" + "0" * 30_000 + " }}",
}


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE)
def test_hostile_templates_are_stopped(template):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gc.freeze()  # or what other tests left would be gone through again and again
    start = time.thread_time()
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json, chat_template"):
        render(template)
    spent = time.thread_time() - start
    gc.unfreeze()
    assert spent < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB
