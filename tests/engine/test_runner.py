"""What the names of numerics mean, by device and by how many sequences may run."""

import pytest

from pallas_kernels import platform
from qjax.engine.runner import numerics_for
from qjax.errors import RequestError


@pytest.mark.parametrize(
    ("device", "name", "sequences", "prefill", "decode"),
    [
        ("cpu", "fast", 8, "int8", "int16"),
        ("cpu", "fast", 9, "int8", "int8"),
        ("gpu", "fast", 9, "bfloat16", "bfloat16"),
        ("tpu", "fast", 1, "bfloat16", "bfloat16"),
        ("cpu", "exact", 1, "exact", "exact"),
        ("tpu", "exact", 9, "exact", "exact"),
    ],
)
def test_numerics(device, name, sequences, prefill, decode):
    with platform.assume(device):
        chosen = numerics_for(name, sequences)
    assert (chosen.prefill, chosen.decode) == (prefill, decode)


def test_unknown_numerics_are_refused():
    with pytest.raises(RequestError, match="must be 'fast' or 'exact', got 'quick'"):
        numerics_for("quick", 1)
