"""Text that must have a form: judged by Python's own `json` and `re`, and by eye.

The models are tiny and know nothing, and at temperature 2 they take nearly any token that they are
allowed: what comes out is a random text of the form.
"""

import asyncio
import json
import re
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
WARM: dict[str, Any] = {"temperature": 2.0, "max_tokens": 300}


@pytest.fixture(scope="module")
def params(golden: Path) -> qjax.Params:
    return qjax.load(golden / "gguf-Q4_1" / "model.gguf")


@pytest.fixture(scope="module")
def engine(params: qjax.Params) -> qjax.Engine:
    return engine_of(params, 96)


def engine_of(params: qjax.Params, num_blocks: int) -> qjax.Engine:
    return qjax.Engine(
        params, num_blocks=num_blocks, max_num_seqs=8, max_model_len=384, numerics="exact"
    )


def run(engine: qjax.Engine, *asked: qjax.SamplingParams) -> list[qjax.GenerationResult]:
    """A prompt of its own for each, all at once."""
    requests = [engine.add((5 + i, 6, 7), params) for i, params in enumerate(asked)]
    while engine.busy:
        engine.step()
    return [request.result(0) for request in requests]


def forms(outputs: dict[str, Any], count: int = 4, **sampling: Any) -> list[qjax.SamplingParams]:
    """One greedy, the others drawn."""
    found = [qjax.SamplingParams(structured_outputs=outputs, **{"max_tokens": 300} | sampling)]
    return found + [
        qjax.SamplingParams(structured_outputs=outputs, seed=seed, **WARM | sampling)
        for seed in range(count - 1)
    ]


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
