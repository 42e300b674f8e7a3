"""Tests on eight devices, which jax makes of one CPU where it is told so before it starts.

`tests/test_parallel.py` runs this folder in a process of its own; by hand:
`XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m pytest tests/parallel`.
"""

import os
from collections.abc import Iterator

import pytest

from tests.conftest import forget_many_programs

FLAG = "--xla_force_host_platform_device_count=8"

collect_ignore_glob = [] if FLAG in os.environ.get("XLA_FLAGS", "") else ["test_*.py"]


@pytest.fixture(autouse=True)
def forget_programs_often() -> Iterator[None]:
    """After each test: a program of eight devices takes most maps."""
    yield
    forget_many_programs()
