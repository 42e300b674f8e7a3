"""Split steps, compiled for several GPUs and TPUs by their makers' compilers."""

import pytest

from tests.engine import split_programs
from tests.pallas_kernels import crosscompile


@pytest.mark.crosscompile
@pytest.mark.parametrize("target", ["v6e", "h100"])
def test_compiles(target: str) -> None:
    """For four v6e chips and for eight H100."""
    crosscompile.check_all(target, split_programs)
