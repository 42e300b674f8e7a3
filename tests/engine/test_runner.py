"""What the names of numerics mean, by device and by how many sequences may run."""

import jax
import numpy as np
import pytest

import qjax
from pallas_kernels import dispatch, platform
from qjax.engine.device_cache import cache_formats
from qjax.engine.engine import Engine
from qjax.engine.runner import numerics_for
from qjax.errors import RequestError
from tests.engine import step_programs
from tests.pallas_kernels import crosscompile


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


def test_cache_of_a_tpu_keeps_its_layout(golden):
    """Taken and given back as it is, by prefill and decode alike; on a CPU that changes nothing."""
    reference = np.load(golden / "gguf-Q4_1" / "reference.npz")
    with platform.assume("tpu", "TPU v6 lite"), dispatch.use("xla"):
        engine = Engine(qjax.load(golden / "gguf-Q4_1"), num_blocks=16, numerics="exact")
        request = engine.add(
            tuple(reference["ids_0"].tolist()), qjax.SamplingParams(max_tokens=8, ignore_eos=True)
        )
        while engine.busy:
            engine.step()
        cache = engine.runner._cache
        formats = cache_formats(cache, cache[0][0].values.sharding)
    assert request.output_ids == reference["greedy_0"].tolist()[:8]
    for each in (*jax.tree.leaves(formats), *(x.format for x in jax.tree.leaves(cache))):
        assert each.layout.major_to_minor == (0, 1, 2, 3)
    assert cache_formats(cache, cache[0][0].values.sharding) is None


@pytest.mark.crosscompile
def test_steps_copy_no_cache_on_a_tpu():
    found = crosscompile.compile_all("v6e", step_programs.__name__)
    free = found.pop(step_programs.FREE)
    assert found == {program.name: None for program in step_programs.kept()}
    assert "copies: ['= bf16[" in str(free)
