"""Text that must have a form: judged by Python's own `json` and `re`, and by eye.

The models are tiny and know nothing, and at temperature 2 they take nearly any token that they are
allowed: what comes out is a random text of the form.
"""

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qjax
from qjax.engine.async_engine import AsyncEngine
from qjax.engine.engine import eos_ids
from qjax.engine.grammar import Grammars, without
from qjax.engine.structured_outputs import MAX_CHARACTERS, MAX_DEPTH, StructuredOutputs
from qjax.errors import RequestError

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "é€", 'q"'], "maxItems": 3}},
        "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["name", "age", "next"],
    "additionalProperties": False,
}
TREE = {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}
SUM = """
start: term ("+" term)* "=" NUMBER
term: NUMBER | "(" term "*" term ")"
NUMBER: /[1-9][0-9]{0,2}/
"""
EXPRESSION = r"[1-9][0-9]{0,2}|\(.*\*.*\)"
HOT: dict[str, Any] = {"temperature": 2.0}


@pytest.fixture(scope="module")
def params(golden: Path) -> qjax.Params:
    return qjax.load(golden / "gguf-Q4_1" / "model.gguf")


@pytest.fixture(scope="module")
def engine(params: qjax.Params) -> qjax.Engine:
    return engine_of(params)


def engine_of(params: qjax.Params) -> qjax.Engine:
    return qjax.Engine(params, num_blocks=96, max_num_seqs=8, max_model_len=384, numerics="exact")


def run(engine: qjax.Engine, *asked: qjax.SamplingParams) -> list[qjax.GenerationResult]:
    """All at once, after one prompt."""
    requests = [engine.add((5, 6, 7), params) for params in asked]
    while engine.busy:
        engine.step()
    return [request.result(0) for request in requests]


def forms(outputs: dict[str, Any], count: int = 4, **sampling: Any) -> list[qjax.SamplingParams]:
    """One greedy, the others drawn."""
    sampling = {"max_tokens": 300, "structured_outputs": outputs} | sampling
    greedy = qjax.SamplingParams(**sampling)
    drawn = [qjax.SamplingParams(seed=seed, **HOT, **sampling) for seed in range(count - 1)]
    return [greedy, *drawn]


def is_person(value: Any) -> bool:
    return (
        list(value) in (["name", "age", "next"], ["name", "age", "tags", "next"])
        and 1 <= len(value["name"]) <= 6
        and type(value["age"]) is int
        and 0 <= value["age"] <= 120
        and set(value.get("tags", [])) <= {"a", "é€", 'q"'}
        and (value["next"] is None or is_person(value["next"]))
    )


def is_tree(value: Any) -> bool:
    return type(value) is list and len(value) <= 2 and all(map(is_tree, value))


def complete(results: list[qjax.GenerationResult]) -> list[str]:
    """The texts of those that came to their end; the others ran into max_tokens."""
    assert {(r.finish_reason, r.stop_reason) for r in results} <= {("stop", None), ("length", None)}
    found = [result.text for result in results if result.finish_reason == "stop"]
    assert found
    return found


CASES = {
    "schema": ({"json": PERSON}, lambda text: is_person(json.loads(text))),
    "schema as text": ({"json": json.dumps(PERSON)}, lambda text: is_person(json.loads(text))),
    "recursion": ({"json": TREE}, lambda text: is_tree(json.loads(text))),
    "any object": ({"json_object": True}, lambda text: type(json.loads(text)) is dict),
    "regex": ({"regex": r"(ab|c)+-\d{2,3}[é€𝄞]"}, r"(ab|c)+-\d{2,3}[é€𝄞]"),
    "slash": ({"regex": r"a/b\\\n[^/]"}, r"a/b\\\n[^/]"),
    "choice": ({"choice": ["yes", "no\n", 'q"\\', "é€𝄞"]}, r'yes|no\n|q"\\|é€𝄞'),
    "grammar": ({"grammar": SUM}, rf"({EXPRESSION})(\+({EXPRESSION}))*=[1-9][0-9]{{0,2}}"),
}


@pytest.mark.parametrize("case", CASES)
def test_texts_have_the_form(engine: qjax.Engine, case: str) -> None:
    outputs, good = CASES[case]
    results = run(engine, *forms(outputs, count=8))
    for text in complete(results):
        assert good(text) if callable(good) else re.fullmatch(good, text), text
    assert len({result.text for result in results}) > 1


def test_alone_as_in_a_batch(engine: qjax.Engine) -> None:
    """And what is beside them gets what it gets alone; also where pages are so few that some are
    sent back to wait in between."""
    asked = [
        *forms({"json": TREE | {"minItems": 1}}, 3, max_tokens=150)[1:],
        *forms({"regex": "[a-z]{60}"}, 3),
        *[qjax.SamplingParams(max_tokens=70, ignore_eos=True, seed=i, **HOT) for i in range(2)],
    ]
    alone = [result for params in asked for result in run(engine, params)]
    assert same(run(engine, *asked), alone)
    taken: list[int] = []
    blocks = engine.scheduler.blocks
    blocks.grow(taken, 86 * blocks.block_size)
    before = engine.scheduler.num_preemptions
    assert same(run(engine, *asked), alone)
    blocks.free(taken)
    assert engine.scheduler.num_preemptions > before


def same(found: list[qjax.GenerationResult], others: list[qjax.GenerationResult]) -> bool:
    return [(r.token_ids, r.text) for r in found] == [(r.token_ids, r.text) for r in others]


def test_samples_of_one_prompt(engine: qjax.Engine) -> None:
    sampling = qjax.SamplingParams(structured_outputs={"regex": "[a-f]{8}"}, seed=1, **HOT)
    requests = [engine.add((5, 6), sampling, sample) for sample in range(4)]
    while engine.busy:
        engine.step()
    texts = [request.text.text for request in requests]
    assert all(re.fullmatch("[a-f]{8}", text) for text in texts)
    assert len(set(texts)) > 1


def test_pieces_are_the_text(params: qjax.Params, engine: qjax.Engine) -> None:
    """Bytes of the tokens make the text, characters that take several tokens too; the end of the
    sequence comes last, if it comes at all: where nothing may follow, it need not."""
    [open_end] = run(engine, *forms({"regex": "(é|€|𝄞)+"}, 1, max_tokens=50))
    results = [*run(engine, *forms({"regex": "[é€𝄞ő]{5}"}, 6)), open_end]
    ends = eos_ids(params)
    for result in results:
        *first, last = result.token_ids
        assert not ends & {*first}
        ids = first if last in ends else result.token_ids
        found = b"".join(map(params.tokenizer.token_bytes, ids))
        assert found.decode("utf-8", "replace") == result.text
    assert all(len(r.text) == 5 and r.token_ids[-1] not in ends for r in results[:-1])


def test_the_end_may_have_to_wait(params: qjax.Params, engine: qjax.Engine) -> None:
    """The end of the sequence is likelier than all else, and may come anywhere."""
    ends = eos_ids(params)
    form = {"regex": "a{0,9}b{0,9}"}

    def texts(**sampling: Any) -> list[str]:
        bias = dict.fromkeys(ends, 50.0)
        results = run(engine, *forms(form, 7, logit_bias=bias, **sampling)[1:])
        assert {(r.finish_reason, r.stop_reason) for r in results} == {("stop", None)}
        return [result.text for result in results]

    assert texts() == [""] * 6
    least = {"min_tokens": 5}
    assert all(5 <= len(text) <= 18 for text in texts(**least))
    # Longer than any text is, or without an end: what the form says goes first, and nine of b
    # are its end.
    for never in ({"min_tokens": 100}, {"ignore_eos": True}):
        assert all(re.fullmatch("a{0,9}b{9}", text) for text in texts(**never))


def test_what_else_ends_a_text(engine: qjax.Engine) -> None:
    form: dict[str, Any] = {"structured_outputs": {"regex": "x{50}"}}
    whole, stopped, cut = run(
        engine,
        qjax.SamplingParams(**form),
        qjax.SamplingParams(**form, stop="xxxxx"),
        qjax.SamplingParams(**form, max_tokens=3),
    )
    assert (whole.text, whole.finish_reason) == ("x" * 50, "stop")
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == ("", "stop", "xxxxx")
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 3)


def test_empty_text_may_be_all(engine: qjax.Engine, params: qjax.Params) -> None:
    [result] = run(engine, *forms({"grammar": 'start: ""'}, 1))
    assert (result.text, result.finish_reason) == ("", "stop")
    assert {*result.token_ids} <= eos_ids(params)


def test_logprobs_are_of_all_tokens(engine: qjax.Engine) -> None:
    """Of the logits as the model gives them: the token that was forced may be an unlikely one."""
    [free] = run(engine, qjax.SamplingParams(max_tokens=1, logprobs=3))
    form = {"choice": ["\\"]}
    [forced] = run(engine, qjax.SamplingParams(structured_outputs=form, logprobs=3))
    assert free.logprobs is not None
    assert forced.logprobs is not None
    chosen, *top = forced.logprobs[0].values()
    assert chosen.decoded_token == "\\"
    assert chosen.rank > 1
    assert {entry.logprob for entry in top} == {e.logprob for e in free.logprobs[0].values()}


def test_bias_goes_first(engine: qjax.Engine, params: qjax.Params) -> None:
    [b, z] = (params.tokenizer.encode(text, add_special_tokens=False)[-1] for text in "bz")
    [result] = run(engine, *forms({"regex": "[abc]{12}"}, 2, logit_bias={b: 90.0, z: 99.0})[1:])
    assert result.text == "b" * 12


def test_from_event_loops(params: qjax.Params) -> None:
    """A form that takes long to refuse holds up nobody else."""
    asked = [*forms(HOSTILE["patterns"], 1), *forms({"json_object": True}, 3, max_tokens=40)]

    async def serve() -> list[Any]:
        with AsyncEngine(engine_of(params)) as engine:
            found = [engine.generate((5, 6, 7), sampling) for sampling in asked]
            return await asyncio.gather(*found, return_exceptions=True)

    refused, *results = asyncio.run(serve())
    assert isinstance(refused, RequestError)
    assert all(result.text.startswith("{") for result in results)


def test_what_cannot_be_followed_on_is_given_up(engine: qjax.Engine) -> None:
    """Compiled within limits, but with more and more ways to read the text."""
    ambiguous = {"grammar": 'start: s\ns: "a" s | "a" | s "a"'}
    beside = qjax.SamplingParams(max_tokens=40, ignore_eos=True)
    given_up, free = run(engine, *forms(ambiguous, 1), beside)
    assert given_up.finish_reason == "abort"
    assert "max is 500" in str(given_up.stop_reason)
    assert set(given_up.text) == {"a"}
    assert (free.finish_reason, len(free.token_ids)) == ("length", 40)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


HOSTILE: dict[str, dict[str, Any]] = {
    # Past what is looked at.
    "long regex": {"regex": "a" * (MAX_CHARACTERS + 1)},
    "long schema": {"json": {"const": "a" * MAX_CHARACTERS}},
    "many choices": {"choice": [str(i) for i in range(2000)]},
    "deep schema": {"json": nested(MAX_DEPTH)},
    "deeper than JSON is read": {"json": "[" * 60000 + "]" * 60000},
    "deep regex": {"regex": "(" * 30000 + "a" + ")" * 30000},
    "deep regex behind closed brackets": {"regex": r"\)" * 200 + "(" * 200 + "a" + ")" * 200},
    "deep grammar": {"grammar": "start: " + "(" * 100 + '"a"' + ")" * 100},
    # Seconds or minutes of work, gigabytes, or the stack's end, without limits.
    "patterns": {
        "json": {"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}"} for i in range(10, 60)]}
    },
    "multiple": {"json": {"type": "integer", "multipleOf": 999983}},
    "all optional": {"regex": "a?" * 16000 + "a" * 16000},
    "doubled": {
        "grammar": "start: A0\n"
        + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(60))
        + 'A60: "a"'
    },
    "chain of rules": {
        "grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(4000)) + 'r4000: "a"'
    },
    "optional properties": {
        "json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(999)}}
    },
    "separator of the library's own": {
        "json": {
            "type": "array",
            "x-guidance": {"item_separator": "a?" * 9000 + "a" * 9000},
            "minItems": 5,
            "items": {"type": "integer", "multipleOf": 999983},
        }
    },
    # Malformed, or more than is implemented.
    "open group": {"regex": "(a"},
    "look-around": {"regex": "a(?=b)"},
    "nothing": {"regex": r"[^\s\S]"},
    "no rule": {"grammar": "start: x"},
    "no start": {"grammar": 'begin: "a"'},
    "no type": {"json": {"type": "word"}},
    "unknown keyword": {"json": {"type": "array", "uniqueItems": True}},
    "empty enum": {"json": {"enum": []}},
    "circle": {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
    "from elsewhere": {"json": {"$ref": "http://127.0.0.1:9/schema"}},
    "from a file": {"json": {"$ref": "file:///etc/passwd"}},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_refused(engine: qjax.Engine, case: str) -> None:
    [field] = HOSTILE[case]
    with pytest.raises(RequestError, match=field) as refusal:
        run(engine, qjax.SamplingParams(structured_outputs=HOSTILE[case]))
    assert len(str(refusal.value)) < 400
    assert not engine.busy


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of json, regex, choice, grammar, json_object, got none"),
        ({"json": {}, "regex": "a"}, "got json and regex"),
        ({"json_object": False}, "got none"),
        ({"json": 5}, "json must be a schema"),
        ({"json": "{"}, "json must be a JSON schema"),
        ({"json": "[]"}, "json must be a schema"),
        ({"json": {"const": float("nan")}}, "json must be a JSON schema"),
        ({"json": {"const": {1}}}, "json must be a JSON schema"),
        ({"regex": ""}, "regex must be a non-empty string"),
        ({"regex": b"a"}, "regex must be a non-empty string"),
        ({"regex": "\ud800"}, "regex holds half a surrogate pair"),
        ({"choice": "ab"}, "choice must be a list of strings"),
        ({"choice": []}, "choice must be a list of strings"),
        ({"choice": [1]}, "an entry of choice must be a non-empty string"),
        ({"grammar": 3}, "grammar must be a non-empty string"),
        ({"json_object": "yes"}, "json_object must be a bool"),
        ({"jsn": {}}, r"no field 'jsn' \(did you mean 'json'\?\)"),
    ],
)
def test_fields_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        qjax.SamplingParams(structured_outputs=fields)


def test_not_with_allowed_token_ids() -> None:
    with pytest.raises(RequestError, match="structured_outputs or allowed_token_ids, not both"):
        qjax.SamplingParams(structured_outputs={"regex": "a"}, allowed_token_ids=[1])


def test_a_schema_is_held_as_text() -> None:
    params = qjax.SamplingParams(structured_outputs={"json": {"b": 1, "a": "é"}})
    assert isinstance(params.structured_outputs, StructuredOutputs)
    assert params.structured_outputs.json == r'{"b": 1, "a": "\u00e9"}'
    assert hash(params.structured_outputs) == hash(StructuredOutputs(json='{"b":1,"a":"é"}'))


def test_without_some_tokens() -> None:
    mask = np.asarray([0b1011, 1 << 31], np.uint32).view(np.int32)
    assert without(mask, [0, 1, 63]).view(np.uint32).tolist() == [0b1000, 0]
    assert without(mask, [3, 1, 0, 63, 5]) is mask  # nothing would be left


def test_forms_are_compiled_once(params: qjax.Params, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Grammars(params.tokenizer, 512, eos_ids(params))
    outputs = StructuredOutputs(regex="[ab]+")
    one = found.matcher(outputs)
    monkeypatch.setattr("qjax.engine.grammar.check", lambda grammar: "compiled again")
    other = found.matcher(StructuredOutputs(regex="[ab]+"))
    [c, *_] = np.flatnonzero(np.unpackbits(one.mask.view(np.uint8), bitorder="little"))
    one.consume(int(c))
    assert np.array_equal(found.matcher(outputs).mask, other.mask)  # at the beginning, all of them
    assert not np.array_equal(one.mask, other.mask)
    for i in range(100):  # so many are not kept
        found.matcher(StructuredOutputs(choice=[str(i)]))
    with pytest.raises(RequestError, match="compiled again"):
        found.matcher(outputs)


def test_without_llguidance(params: qjax.Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(qjax.UnsupportedError, match="pip install llguidance"):
        Grammars(params.tokenizer, 512, eos_ids(params))


def test_where_nothing_ends_a_sequence(params: qjax.Params) -> None:
    with pytest.raises(RequestError, match="a token that ends a sequence"):
        Grammars(params.tokenizer, 512, frozenset())
