"""Tests on eight devices, which jax makes of one CPU where it is told so before it starts.

`tests/test_parallel.py` runs this folder in a process of its own; by hand:
`XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m pytest tests/parallel`.
"""

import os
from collections.abc import Iterator

import jax
import pytest

FLAG = "--xla_force_host_platform_device_count=8"

collect_ignore_glob = [] if FLAG in os.environ.get("XLA_FLAGS", "") else ["test_*.py"]


@pytest.fixture(autouse=True)
def forget_programs() -> Iterator[None]:
    """Frees what was compiled: the memory of a CPU's programs comes in many small maps, of which a
    process may have some 65,000, and a program takes hundreds."""
    yield
    from qjax.engine import runner

    runner._programs.clear()
    jax.clear_caches()
