"""Several processes on this machine, one device each: the same tokens as one, and how they end."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import qjax
from qjax.checkpoint import builtin
from tests.distributed import program

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "sharding.md").read_text("utf-8")
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
STOPPED = re.compile(r"qjax: process \d of \d on \S+ ends: (.*)")


@pytest.fixture
def model(golden: Path) -> str:
    return str(golden / "gguf-Q4_1" / "model.gguf")


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@contextlib.contextmanager
def started(
    commands: list[list[str]], variables: Sequence[dict[str, str]] | None = None
) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are killed at the end, if they still run then.

    Args:
      commands: what follows "python". variables: of the environment, for each.
    """
    running = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=ENVIRONMENT | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command, own in zip(commands, variables or [{}] * len(commands), strict=True)
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.communicate()


def programs(count: int, model: str, what: str, step_timeout: float = 120) -> list[list[str]]:
    asked = ["-m", "tests.distributed.program", free_address(), str(count)]
    return [[*asked, str(i), model, what, str(step_timeout)] for i in range(count)]


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    for found in process.stdout:
        if found.strip() == line:
            return
    raise AssertionError(f"the process ended before it said {line!r}")


def test_generate_in_two_processes(model: str) -> None:
    """Each has half of the model; the first alone prints, and nothing but the result."""
    where = ["--coordinator-address", free_address(), "--num-processes", "2", "--process-id"]
    asked = ["-m", "qjax", "generate", "hello", "--model", model, "--max-tokens", "12", "--json"]
    with started([[*asked, *where, str(number)] for number in range(2)]) as processes:
        outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[1][0] == ""
    for number, (_, errors) in enumerate(outputs):
        assert f"process {number} of 2, 1 devices here, 2 in all, coordinator 127" in errors
    messages = [{"role": "user", "content": "hello"}]
    alone = qjax.generate(qjax.load(model), messages, max_tokens=12)
    assert tuple(json.loads(outputs[0][0])["token_ids"]) == alone.token_ids


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "what"),
    [(2, "split-texts"), (4, "split-texts"), (3, "texts"), (2, "split-threaded")],
)
def test_same_tokens_as_one_process(model: str, count: int, what: str) -> None:
    """Of a model in parts, and where each process has the whole."""
    with started(programs(count, model, what)) as processes:
        outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * count, outputs
    found = next(line for line in outputs[0][0].splitlines() if line.startswith("[["))
    same = program.threaded if what == "split-threaded" else program.texts
    assert json.loads(found) == same(qjax.load(model))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["split-steps", "split-idle"])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_death_ends_all(model: str, what: str, victim: int) -> None:
    with started(programs(4, model, what)) as processes:
        wait_for(processes[0], "round")
        time.sleep(0.5)
        processes[victim].kill()
        others = [process for process in processes if process is not processes[victim]]
        deadline = time.monotonic() + 20
        for process in others:
            _, errors = process.communicate(timeout=max(0, deadline - time.monotonic()))
            assert process.returncode == 1
            told = STOPPED.findall(errors)
            assert len(told) == 1, errors
            assert re.match(rf"process {victim} on \S+ died", told[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "step_timeout", "limit", "message"),
    [
        ("split-steps", 8, 28, r"no progress within 8 s: process 1 on \S+ lags, after \d+ of \d+"),
        ("split-idle", 60, 32, r"process 1 on \S+ was not heard of for 12 s"),
    ],
)
def test_one_that_is_stopped_ends_all(
    model: str, what: str, step_timeout: float, limit: float, message: str
) -> None:
    with started(programs(2, model, what, step_timeout)) as processes:
        wait_for(processes[0], "round")
        processes[1].send_signal(signal.SIGSTOP)
        _, errors = processes[0].communicate(timeout=limit)
        assert processes[0].returncode == 1
        assert re.match(message, STOPPED.findall(errors)[0])
        # It finds out by itself if it may go on.
        processes[1].send_signal(signal.SIGCONT)
        processes[1].communicate(timeout=20)
        assert processes[1].returncode != 0


@pytest.mark.slow
def test_process_0_alone_hears_of_interrupts(model: str) -> None:
    with started(programs(2, model, "split-steps")) as processes:
        wait_for(processes[0], "round")
        for process in processes:
            process.send_signal(signal.SIGTERM if process is processes[1] else signal.SIGINT)
        for process in processes:
            _, errors = process.communicate(timeout=20)
            assert process.returncode == 1
            assert re.search(r"process 0 of 2 on \S+ failed: KeyboardInterrupt", errors)
            assert "Traceback" not in errors


@pytest.mark.slow
def test_an_error_in_one_ends_all(model: str) -> None:
    with started(programs(3, model, "fail")) as processes:
        outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [1, 1, 1]
    for _, errors in outputs:
        assert "process 1 of 3 on" in errors
        assert "failed: no such thing here" in errors
        assert "Traceback" not in errors


def block_of_the_page(language: str, about: str) -> str:
    """The one block of code that says so."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    found = [block for block in blocks if about in block]
    assert len(found) == 1
    return found[0]


@pytest.fixture
def default_model() -> str:
    if not builtin.cached_path(builtin.DEFAULT).is_file():
        pytest.skip(f"{builtin.DEFAULT} is not in the cache: run `qjax pull {builtin.DEFAULT}`")
    return builtin.DEFAULT


@pytest.mark.slow
def test_command_of_the_page(default_model: str, tmp_path: Path) -> None:
    command = tmp_path / "qjax"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m qjax "$@"\n')
    command.chmod(0o755)
    env = ENVIRONMENT | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = ["sh", "-c", block_of_the_page("sh", "--coordinator-address")]
    ran = subprocess.run(script, env=env, capture_output=True, text=True, timeout=300)
    alone = qjax.generate(
        qjax.load(default_model),
        [{"role": "user", "content": "Why is the sky blue?"}],
        max_tokens=32,
    )
    assert ran.stdout == alone.text + "\n", ran.stderr


@pytest.mark.slow
def test_program_of_the_page(default_model: str) -> None:
    """As Open MPI starts it."""
    _, port = free_address().split(":")
    variables = {
        "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1",
        "OMPI_COMM_WORLD_SIZE": "3",
        "JAX_COORDINATOR_PORT": port,
    }
    ranks = [
        {"OMPI_COMM_WORLD_RANK": str(i), "OMPI_COMM_WORLD_LOCAL_RANK": str(i)} for i in range(3)
    ]
    program_text = ["-c", block_of_the_page("py", "processes.lead")]
    with started([program_text] * 3, [variables | rank for rank in ranks]) as processes:
        outputs = [process.communicate(timeout=300) for process in processes]
    alone = qjax.generate(qjax.load(default_model), "The capital of France is", max_tokens=16)
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert alone.text in outputs[0][0]
    assert alone.text not in outputs[1][0]
