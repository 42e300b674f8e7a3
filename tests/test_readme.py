"""Runs what the README tells a newcomer to run.

Every fenced block of Python and every `qjax` command is run as written, with a tiny model standing
in under the name of the built-in one, and, with --slow, with the real one where it is in the cache.
The two install commands are what CI runs, and are compared with it instead.
"""

import os
import re
import shlex
import shutil
import signal
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from pallas_kernels.unpack import BLOCKS
from qjax.checkpoint import builtin
from qjax.cli.main import main
from qjax.server import run
from qjax.server.run import bind

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
INSTALL = "python -m pip install"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in line.split("&&")]


SERVE_COMMANDS = [command for command in commands() if command.startswith("qjax serve")]
QJAX_COMMANDS = [
    command
    for command in commands()
    if command.startswith("qjax ") and command not in SERVE_COMMANDS
]
NEED_LM_EVAL = ("qjax eval tasks",)


@pytest.fixture(params=["tiny", pytest.param("real", marks=pytest.mark.slow)])
def default_model(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    golden: Path,
) -> None:
    """Has the default model in the cache: a tiny one in a cache of its own, or the real one. What
    a command writes does not land in the checkout."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for entry in ROOT.iterdir():
        (folder / entry.name).symlink_to(entry)
    monkeypatch.chdir(folder)
    name = builtin.DEFAULT
    if request.param == "real":
        if not builtin.cached_path(name).is_file():
            pytest.skip(f"{name} is not in the cache: run `qjax pull {name}`")
        return
    file = golden / "gguf-Q4_1" / "model.gguf"
    model = builtin.MODELS[name]
    whole = replace(model.parts[0], nbytes=file.stat().st_size)
    monkeypatch.setitem(builtin.MODELS, name, replace(model, parts=(whole,)))
    monkeypatch.setenv("QJAX_CACHE", str(tmp_path))
    builtin.cached_path(name).parent.mkdir(parents=True)
    shutil.copy(file, builtin.cached_path(name))


@pytest.mark.usefixtures("default_model")
def test_python_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert capsys.readouterr().out.strip()


@pytest.mark.usefixtures("default_model")
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=pytest.mark.peer if command.startswith(NEED_LM_EVAL) else ())
        for command in QJAX_COMMANDS
    ],
)
def test_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code: object = None
    try:
        main(shlex.split(command)[1:])
    except SystemExit as end:
        code = end.code
    output = capsys.readouterr()
    assert not code, output.err
    assert (output.out + output.err).strip()


@pytest.mark.usefixtures("default_model", "own_loggers")
def test_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What is said to begin it, until its client is through; at a port that is free here."""
    (command,) = SERVE_COMMANDS
    (client,) = (block for block in blocks("py") if "base_url" in block)
    printed: list[str] = []

    def listen(host: str, port: int) -> socket.socket:
        assert f'"http://{host}:{port}/v1"' in client
        listener = bind(host, 0)
        found = client.replace(str(port), str(listener.getsockname()[1]))
        threading.Thread(target=talk, args=(found, listener.getsockname()), daemon=True).start()
        return listener

    def talk(client: str, address: tuple[str, int]) -> None:
        try:
            deadline = time.monotonic() + 120
            health = f"http://{address[0]}:{address[1]}/health"
            while httpx.get(health, timeout=120).status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            names = {"print": lambda text, end: printed.append(text)}
            exec(compile(client, "README.md", "exec"), names)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run, "bind", listen)
    with pytest.raises(SystemExit) as end:
        main([*shlex.split(command)[1:], "--no-warm-up"])
    assert not end.value.code
    assert len(printed) > 1
    assert "draining" in capsys.readouterr().err


def test_every_command_is_covered() -> None:
    covered = (*QJAX_COMMANDS, *SERVE_COMMANDS)
    others = [command for command in commands() if command not in covered]
    installs = [command for command in others if command.startswith(INSTALL)]
    assert QJAX_COMMANDS
    assert installs == [f"{INSTALL} -e .", f"{INSTALL} -e '.[dev]'"]
    assert [command for command in others if command not in installs] == ["python -m pytest"]


def test_weight_types_are_those_that_are_read() -> None:
    row = re.search(r"^\| Weight types in GGUF \| (.+) \|$", README, re.MULTILINE)
    assert row
    assert {name.lower() for name in row.group(1).split(", ")} == {*BLOCKS, "mxfp4", "nvfp4"}


def test_ci_runs_the_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert f"{INSTALL} --quiet -e '.[dev]'" in script
    assert script.rstrip().endswith("python -m pytest")


def test_links_lead_somewhere() -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert targets
    assert all((ROOT / target).exists() for target in targets)
