"""Runs what the README tells a newcomer to run.

Every fenced block of Python and every `qjax` command is run as written, with a tiny model standing
in under the name of the built-in one, and, with --slow, with the real one where it is in the cache.
The two install commands are what CI runs, and are compared with it instead.
"""

import re
import shlex

import pytest

from pallas_kernels.unpack import BLOCKS
from tests import markdown
from tests.markdown import NEED_LM_EVAL, ROOT, Page

README = Page(ROOT / "README.md")
INSTALL = "python -m pip install"

COMMANDS = README.commands("bash")
SERVE_COMMANDS = [words for words in COMMANDS if words[:2] == ["qjax", "serve"]]
QJAX_COMMANDS = [
    words for words in COMMANDS if markdown.is_qjax(words) and words not in SERVE_COMMANDS
]


@pytest.mark.usefixtures("default_model")
def test_python_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    for block in README.blocks("python"):
        markdown.run_python(README, block, names)
    assert capsys.readouterr().out.strip()


@pytest.mark.usefixtures("default_model")
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(
            words,
            marks=pytest.mark.peer if words[: len(NEED_LM_EVAL)] == NEED_LM_EVAL else (),
            id=shlex.join(words),
        )
        for words in QJAX_COMMANDS
    ],
)
def test_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    markdown.run_qjax(words)
    output = capsys.readouterr()
    assert (output.out + output.err).strip()


@pytest.mark.usefixtures("default_model", "own_loggers")
def test_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (words,) = SERVE_COMMANDS
    (client,) = (block for block in README.blocks("py") if "base_url" in block.text)
    printed: list[str] = []
    names: dict[str, object] = {"print": lambda text, end: printed.append(text)}
    markdown.run_server(words, README, client, monkeypatch, names)
    assert len(printed) > 1
    assert "draining" in capsys.readouterr().err


def test_blocks() -> None:
    markdown.check_blocks(README)


def test_every_command_is_covered() -> None:
    covered = (*QJAX_COMMANDS, *SERVE_COMMANDS)
    others = [shlex.join(words) for words in COMMANDS if words not in covered]
    installs = [command for command in others if command.startswith(INSTALL)]
    assert QJAX_COMMANDS
    assert installs == [f"{INSTALL} -e .", f"{INSTALL} -e '.[dev]'"]
    assert [command for command in others if command not in installs] == ["python -m pytest"]


def test_weight_types_are_those_that_are_read() -> None:
    row = re.search(r"^\| Weight types in GGUF \| (.+) \|$", README.text, re.MULTILINE)
    assert row
    assert {name.lower() for name in row.group(1).split(", ")} == {*BLOCKS, "mxfp4", "nvfp4"}


def test_ci_runs_the_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert f"{INSTALL} --quiet -e '.[dev]'" in script
    assert script.rstrip().endswith("python -m pytest")


def test_links_lead_somewhere() -> None:
    targets = [target for target in README.links() if "://" not in target]
    assert targets
    assert all((ROOT / target.partition("#")[0]).exists() for target in targets)
