"""The C++ library of each instruction set is right, not only the one that is taken here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels import native
from pallas_kernels.native import build
from tests.pallas_kernels.conftest import not_built

HERE = Path(__file__).parent
# Products of every type, in every way in which they are rounded, and what quantizing takes;
# lookups; attention.
PRODUCTS = (
    "test_matmul.py::test_every_type",
    "test_matmul_codes.py",
    "test_nearest.py",
    "test_gram.py",
)
OTHERS = ("test_embedding.py", "test_native_attention.py")


@pytest.mark.parametrize("isa", native.supported_isas()[1:])
def test_the_same_cases(isa: str) -> None:
    """In a process of its own, which takes the library that it is told to take, or none."""
    if reason := not_built("native"):
        pytest.skip(reason)
    taken = "matmul.cc", native.supported_isas()[0]  # all other tests run with this
    cases = OTHERS if build.SAME.get(taken) == isa else PRODUCTS + OTHERS
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "--numprocesses=0", "-k", "native"),
            *(str(HERE / case) for case in cases),
        ],
        env={**os.environ, native.ENVIRONMENT_VARIABLE: isa},
        capture_output=True,
        text=True,
        cwd=HERE.parent.parent,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
