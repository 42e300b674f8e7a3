"""Runs the tests of `tests/parallel` where jax has eight devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FLAG = "--xla_force_host_platform_device_count=8"


def test_on_eight_devices(pytestconfig: pytest.Config) -> None:
    command = [sys.executable, "-m", "pytest", "-q", str(Path(__file__).parent / "parallel")]
    command += ["--slow"] if pytestconfig.getoption("--slow") else []
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}"
    environment = {**os.environ, "XLA_FLAGS": flags}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
    assert " passed" in done.stdout
