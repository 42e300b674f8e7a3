"""Takes Markdown apart and runs what stands in it, as a reader would who follows a page.

- `python` blocks run from top to bottom in one namespace; `bash` blocks hold a command a line (or
  several with && between them). Both run in the order of the page, in one folder that looks like a
  checkout.
- `qjax` commands run in this process. `pip install` is compared with the extras that there are.
  Other commands run as they are.
- While the server of a `qjax serve` runs, the next Python block of the page talks to it.
- `py` and `sh` blocks need what is not here (a GPU, another engine, machines): they are parsed.

In all of these, and in `code` of a sentence, a `qjax` command must have the options it is given.
"""

import ast
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
import yaml
from markdown_it import MarkdownIt
from typer.core import TyperGroup
from typer.main import get_command

from qjax.checkpoint import builtin
from qjax.cli.main import app, main
from qjax.compress import recipe
from qjax.server import run
from qjax.server.run import bind

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# What these commands need is not among the extras of the tests.
NEED_LM_EVAL = ["qjax", "eval", "tasks"]

_MARKDOWN = MarkdownIt("commonmark").enable("table")
_QUOTED_OR_COMMENT = re.compile(r"""('[^']*'|"(?:\\.|[^"\\])*"|\\.)|(?<!\S)#[^\n]*""")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is that of its fence, from 1."""

    language: str
    text: str
    line: int


@dataclass(frozen=True)
class Page:
    path: Path

    @property
    def text(self) -> str:
        return self.path.read_text("utf-8")

    def blocks(self, *languages: str) -> list[Block]:
        """The fenced blocks, of some languages or of all."""
        found = [
            Block(token.info.strip(), token.content, token.map[0] + 1)
            for token in _MARKDOWN.parse(self.text)
            if token.type == "fence" and token.map
        ]
        return [block for block in found if not languages or block.language in languages]

    def commands(self, language: str) -> list[list[str]]:
        """The commands of its shell blocks, as words."""
        return [command for block in self.blocks(language) for command in commands(block.text)]

    def code(self) -> list[str]:
        """What its sentences and tables have between backticks."""
        return [each.content for each in self._inline() if each.type == "code_inline"]

    def links(self) -> list[str]:
        """The targets of links and images."""
        found = [each.attrs.get("href") or each.attrs.get("src") for each in self._inline()]
        return [str(target) for target in found if target]

    def _inline(self):
        for token in _MARKDOWN.parse(self.text):
            yield from token.children or ()


def commands(text: str) -> list[list[str]]:
    """The commands of a shell script, as words, without comments and what connects them."""
    return [words for words, _ in _connected(text)]


def _connected(text: str) -> Iterator[tuple[list[str], str]]:
    """The commands of a shell script as words, each with the operator behind it."""
    joined = text.replace("\\\n", " ")
    plain = _QUOTED_OR_COMMENT.sub(lambda match: match[1] or "", joined)
    lexer = shlex.shlex(plain + "\n", posix=True, punctuation_chars="();<>|&\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    words: list[str] = []
    for word in lexer:
        if set(word) <= set("();<>|&\n"):
            if words:
                yield words, word.strip("\n")
            words = []
        else:
            words.append(word)


def check_command(words: list[str]) -> None:
    """That a `qjax` command exists, with the options and as many arguments as it is given.

    Raises:
      AssertionError, click.UsageError: it does not.
    """
    command, arguments = _command(words)
    parser = command.make_parser(command.context_class(command))
    _, left, _ = parser.parse_args(list(arguments))
    assert not left, f"{shlex.join(words)}: {left} is too much"


def check_mention(code: str) -> None:
    """The same of a command in a sentence, which may leave out values: its options exist.

    Raises:
      AssertionError: one of them does not.
    """
    command, arguments = _command(code.split())
    known = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
    for word in arguments:
        if word.startswith("--"):
            assert word.partition("=")[0] in {*known, "--help"}, f"`{code}`: no option {word}"


def _command(words: list[str]):
    command, rest = get_command(app), words[1:]
    while isinstance(command, TyperGroup) and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"{shlex.join(words)}: qjax has no {rest[0]!r}"
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


def is_qjax(words: list[str]) -> bool:
    return words[0] == "qjax"


def check_blocks(page: Page) -> None:
    """What can be said of a page without running it."""
    for block in page.blocks():
        where = f"{page.path.name}, line {block.line}"
        match block.language:
            case "py" | "python":
                ast.parse(block.text, where)
            case "sh" | "bash":
                subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
                for words in commands(block.text):
                    if is_qjax(start := _without_environment(words)[1]):
                        check_command(start)
            case "json":
                json.loads(block.text)
            case "toml":
                tomllib.loads(block.text)
            case "yaml":
                found = yaml.safe_load(block.text)
                if isinstance(found, dict) and any("_stage" in str(key) for key in found):
                    recipe.parse(block.text)
            case language:
                assert language in ("text", "cpp"), f"{where}: what is {language!r}?"
    for code in page.code():
        if code.startswith("qjax ") and re.match(r"[a-z-]", code[5:]):
            check_mention(code)


def _without_environment(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Variables that are set before a command, and the command."""
    words = [word for word in words if word not in ("do", "then", "exec")] or [""]
    count = next((i for i, word in enumerate(words) if not _ASSIGNMENT.match(word)), len(words))
    return dict(word.split("=", 1) for word in words[:count]), words[count:] or [""]


def checkout(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Makes this folder one that looks like the checkout, and the current one: what is written does
    not land in the checkout."""
    folder.mkdir()
    for entry in ROOT.iterdir():
        (folder / entry.name).symlink_to(entry)
    monkeypatch.chdir(folder)


def stand_in(monkeypatch: pytest.MonkeyPatch, cache: Path, golden: Path) -> None:
    """Puts a tiny model under the name of the default one, in a cache of its own."""
    file = golden / "gguf-Q4_1" / "model.gguf"
    model = builtin.MODELS[builtin.DEFAULT]
    whole = replace(model.parts[0], nbytes=file.stat().st_size)
    monkeypatch.setitem(builtin.MODELS, builtin.DEFAULT, replace(model, parts=(whole,)))
    monkeypatch.setenv("QJAX_CACHE", str(cache))
    path = builtin.cached_path(builtin.DEFAULT)
    path.parent.mkdir(parents=True)
    shutil.copy(file, path)


def run_page(page: Page, monkeypatch: pytest.MonkeyPatch, lm_eval: bool = False) -> None:
    """Runs a page's `python` and `bash` blocks in their order.

    Args:
      page: the page.
      monkeypatch: of the test; the current folder is what `checkout` made.
      lm_eval: whether it is installed, and commands that need it run.
    """
    names: dict[str, object] = {"__name__": "__main__"}
    left = page.blocks("python", "bash")
    while left:
        block = left.pop(0)
        if block.language == "python":
            run_python(page, block, names)
            continue
        for words, operator in _connected(block.text):
            where = f"{page.path.name}, line {block.line}: {shlex.join(words)}"
            assert operator in ("", "&&"), f"{where}: {operator} is for `sh` blocks"
            variables, words = _without_environment(words)
            with monkeypatch.context() as changed:
                for name, value in variables.items():
                    changed.setenv(name, value)
                if words[:2] == ["qjax", "serve"]:
                    assert left, f"{where}: no Python block talks to it"
                    run_server(words, page, left.pop(0), changed, names)
                elif words[:3] == NEED_LM_EVAL and not lm_eval:
                    continue
                elif is_qjax(words):
                    run_qjax(words)
                elif "install" in words[:4] and "pip" in words[:4]:
                    check_install(words)
                else:
                    run_program(words)


def run_python(page: Page, block: Block, names: dict[str, object]) -> None:
    """Runs a block in a namespace; lines of a traceback are those of the page."""
    exec(compile("\n" * block.line + block.text, str(page.path), "exec"), names)


def run_qjax(words: list[str]) -> None:
    """Runs a `qjax` command in this process.

    Raises:
      AssertionError: it does not end with 0; what it printed is in the test's captured output.
    """
    code: object = None
    try:
        main(words[1:])
    except SystemExit as end:
        code = end.code
    assert not code, f"{shlex.join(words)} ended with {code}"


def run_program(words: list[str]) -> None:
    """Runs another command; `python` is this one."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(words, env=os.environ | {"PATH": path}, check=True, timeout=300)


def check_install(words: list[str]) -> None:
    """That an install names extras that there are."""
    for word in words:
        if named := re.fullmatch(r"(?:qjax|\.)\[([\w,-]+)\]", word):
            unknown = set(named[1].split(",")) - EXTRAS.keys()
            assert not unknown, f"{shlex.join(words)}: no extra {unknown}"


def run_server(
    words: list[str],
    page: Page,
    client: Block,
    monkeypatch: pytest.MonkeyPatch,
    names: dict[str, object],
) -> None:
    """Runs a `qjax serve` command until its client is through; at a port that is free here, which
    the client gets in place of the one that it has."""
    failed: list[BaseException] = []

    def listen(host: str, port: int) -> socket.socket:
        assert f"http://{host}:{port}" in client.text
        listener = bind(host, 0)
        found = client.text.replace(str(port), str(listener.getsockname()[1]))
        block = replace(client, text=found)
        talker = threading.Thread(target=talk, args=(block, listener.getsockname()), daemon=True)
        talker.start()
        return listener

    def talk(client: Block, address: tuple[str, int]) -> None:
        try:
            deadline = time.monotonic() + 120
            health = f"http://{address[0]}:{address[1]}/health"
            while httpx.get(health, timeout=120).status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            run_python(page, client, names)
        except BaseException as error:
            failed.append(error)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run, "bind", listen)
    with pytest.raises(SystemExit) as end:
        main([*words[1:], "--no-warm-up"])
    if failed:
        raise failed[0]
    assert not end.value.code
