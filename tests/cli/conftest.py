"""A tiny model, and the command line in this process."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qjax.cli.main import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def model(golden: Path) -> str:
    return str(golden / "gguf-Q4_1" / "model.gguf")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command: how it ends, what it prints, and what it prints of errors."""

    def call(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return call
