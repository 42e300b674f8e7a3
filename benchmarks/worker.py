"""Processes that measure, one an engine, asked by JSON lines over their standard streams.

Two engines may not live in one environment, and their threads must not meet. A worker that is not
asked waits for its next line and takes no time from the other.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Worker:
    """A script of this folder, run by `python`; a context manager that ends it."""

    def __init__(self, python: str, script: str, *arguments: str):
        path = Path(__file__).with_name(script)
        self.name = path.stem
        self._process = subprocess.Popen(
            [python, str(path), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, command: str, **arguments: Any) -> Any:
        """The answer of the worker's function `command`.

        Raises:
          RuntimeError: the worker ended instead; its own message is on stderr.
        """
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with exit code {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def serve(commands: dict[str, Callable[..., Any]]) -> None:
    """Answers the lines of stdin until it is closed. What else is printed goes to stderr."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        for line in sys.stdin:
            request = json.loads(line)
            answer = commands[request.pop("command")](**request)
            print(json.dumps(answer), file=answers, flush=True)
