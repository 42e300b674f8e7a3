"""The tables of docs/migrating and docs/comparison.md name nothing of qjax's that there is not.

In a column "qjax" each piece of code is a command, an option, a path, a variable or a name of
Python, and is looked up; "same" in it stands for the names of the column before.
"""

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Route
from typer.core import TyperGroup
from typer.main import get_command

import qjax
from qjax import registry
from qjax.checkpoint.save_plan import FORMATS
from qjax.cli.main import app
from qjax.compress import modifiers
from qjax.compress.hub_datasets import _SHORT
from qjax.compress.presets import GGML, PRESETS
from qjax.compress.shorthand import METHODS
from qjax.engine.request import GenerationResult
from qjax.engine.speculation import SpeculativeConfig
from qjax.engine.structured_outputs import StructuredOutputs
from qjax.kv_cache import KV_CACHE_DTYPES
from qjax.models.config import MODEL_TYPES
from qjax.scheme import OBSERVERS
from qjax.server import protocol
from qjax.server.app import create_app
from qjax.server.service import Settings

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted((DOCS / "migrating").glob("*.md"))
CALLS = (qjax.LLM, qjax.load, qjax.save, qjax.generate, qjax.oneshot, qjax.forward)
SAMPLING, GUESSING = (
    {each.name for each in fields(one)} for one in (qjax.SamplingParams, SpeculativeConfig)
)
RECORDS = (qjax.SamplingParams, GenerationResult, SpeculativeConfig, StructuredOutputs)
SOURCES = [*(ROOT / "qjax").rglob("*.py"), *(ROOT / "pallas_kernels").rglob("*.py")]
ENVIRONMENT = re.compile(r"(QJAX|HF|JAX)_[A-Z_]+")


def commands() -> dict[str, Any]:
    """Every command by its words: "eval ppl"."""
    found: dict[str, Any] = {}
    for name, command in get_command(app).commands.items():  # pyright: ignore
        found[name] = command
        if isinstance(command, TyperGroup):
            found |= {f"{name} {inner}": each for inner, each in command.commands.items()}
    return found


def options(command: Any) -> set[str]:
    return {name for each in command.params for name in (*each.opts, *each.secondary_opts)}


COMMANDS = commands()
OPTIONS = set().union(*map(options, COMMANDS.values()), {"--help"})
PATHS = {
    f"{method} {route.path}"
    for route in create_app(lambda: None, Settings(names=("m",))).routes  # pyright: ignore
    if isinstance(route, Route)
    for method in route.methods or ()
}


def names() -> set[str]:
    """What may stand for itself: parameters, fields, and the words that they take."""
    found = {name for call in CALLS for name in inspect.signature(call).parameters}
    found |= {field.name for record in RECORDS for field in fields(record)}
    found |= set(protocol.ChatRequest.__struct_fields__)
    found |= set(protocol.CompletionRequest.__struct_fields__)
    found |= {*modifiers.MODIFIERS, *modifiers.RENAMED}
    found |= {field.name for each in modifiers.MODIFIERS.values() for field in fields(each)}
    found |= {*PRESETS, *GGML, *METHODS, *OBSERVERS, *FORMATS, *KV_CACHE_DTYPES, *_SHORT}
    found |= {*registry.methods(), *MODEL_TYPES}
    return found | {*qjax.__all__, "exact", "fast", "ngram", "draft_model", "aware", "lm_head"}


NAMES = names()


def check(code: str) -> None:
    """Raises AssertionError where a piece of code names something that is not there."""
    if code.startswith("qjax "):
        words = code.split()[1:]
        known = next(name for name in (" ".join(words[:2]), words[0], "") if name in COMMANDS)
        flags = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert flags <= options(COMMANDS[known]), code
    elif code.startswith("-"):
        assert code.split()[0] in OPTIONS, code
        check_values(code.split()[1:])
    elif code in NAMES:
        pass
    elif re.match(r"(GET|POST) /", code):
        assert code in PATHS, code
    elif code.startswith("/"):
        assert any(path.endswith(f" {code}") for path in PATHS), code
    elif ENVIRONMENT.fullmatch(code):
        assert any(code in file.read_text("utf-8") for file in SOURCES), code
    elif code.startswith("{") and ":" in code and '"' not in code:
        for scheme in re.findall(r"(\w+): \[", code):
            assert scheme in PRESETS or scheme in GGML, code
    else:
        check_python(code)


def check_values(values: list[str]) -> None:
    for value in values:
        assert value in NAMES or value.startswith("FILE"), value


def check_python(code: str) -> None:
    (statement,) = ast.parse(code.lstrip("@.")).body
    for node in ast.walk(statement):
        match node:
            case ast.Attribute(value=ast.Name("qjax"), attr=name):
                assert name in (*qjax.__all__, "distributed"), code
            case ast.Call(func=ast.Attribute(value=ast.Name("qjax"), attr=name), keywords=keywords):
                assert name in qjax.__all__, code
                taken = {*inspect.signature(getattr(qjax, name)).parameters}
                taken |= SAMPLING if name == "generate" else set()
                assert {word.arg for word in keywords} <= taken, code
    match statement:
        case ast.Assign(targets=[ast.Name(name)]):
            assert name in NAMES, code
        case ast.Expr(ast.Name(name)) | ast.Expr(ast.Constant(str(name))):
            assert name in NAMES, code
        case ast.Expr(ast.Attribute(attr=name)):
            assert name in NAMES or code.startswith("qjax."), code
        case ast.Expr(ast.Dict(keys=keys)):
            assert {ast.literal_eval(key) for key in keys if key} <= GUESSING, code


def tables(path: Path) -> Iterator[list[list[str]]]:
    """The rows of each table, its head first, as cells."""
    rows: list[list[str]] = []
    for line in [*path.read_text("utf-8").splitlines(), ""]:
        if line.startswith("|"):
            if not re.fullmatch(r"[|\s:-]+", line):
                rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            yield rows
            rows = []


def claims(path: Path) -> list[str]:
    """The pieces of code that a page gives as qjax's."""
    found = []
    for head, *rows in tables(path):
        if "qjax" not in head:
            continue
        column = head.index("qjax")
        for row in rows:
            cell = row[0] if row[column].startswith("same") else row[column]
            found += re.findall(r"`([^`]+)`", cell.partition(" (ways to")[0])
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_what_is_said_to_be_in_qjax_is_there(path: Path) -> None:
    found = claims(path)
    assert len(found) > 30
    wrong = []
    for code in found:
        try:
            check(code)
        except (AssertionError, SyntaxError) as error:
            wrong.append(f"{code}: {error!r:.120}")
    assert wrong == []


@pytest.mark.parametrize(
    "code",
    [
        *("--max-token", "qjax generate --maximum", "POST /v2/chat", "/healthy", "QJAX_NOTHING"),
        *("kv_cache_type", '"int3"', "qjax.oneshots(model)", "qjax.load('m', device=1)"),
    ],
)
def test_names_that_are_not_there_are_found(code: str) -> None:
    with pytest.raises(AssertionError):
        check(code)


def test_comparison_names_what_qjax_runs_and_lacks() -> None:
    """The lists that the comparison gives of qjax, beside what the code says."""
    path = DOCS / "comparison.md"
    rows = {row[0]: row[1] for _, *table in tables(path) for row in table}
    named = re.search(r"values of `model_type`: (.+?)\.\n", path.read_text("utf-8"), re.DOTALL)
    assert named
    plain = re.sub(r"\(.+?\)", "", named[1], flags=re.DOTALL)
    assert re.findall(r"\w+", plain) == list(MODEL_TYPES)
    assert rows["How many"] == f"{len(MODEL_TYPES)} model types"
    cache = rows["Types of keys and values"].lower()
    held = set(re.findall(r"\w+", cache))
    assert {"fp8" if each in ("e4m3", "e5m2") else each for each in held} == {
        each.partition("_")[0] for each in KV_CACHE_DTYPES if each != "auto"
    }
