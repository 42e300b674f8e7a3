"""What devices tell each other, read from the optimized program."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import qjax
from qjax import sampler
from qjax.engine.scheduler import Plan
from qjax.planning import planned_collectives
from qjax.sharding import Parallel
from tests.parallel import cases
from tests.parallel.hlo import collectives


def decode_program(folder: Path, tensor: int, expert: int = 1, **sampling: Any) -> str:
    params = cases.split(folder, tensor, expert)
    engine = qjax.Engine(params, num_blocks=16, numerics="exact")
    request = engine.add((3, 4, 5), qjax.SamplingParams(max_tokens=8, ignore_eos=True, **sampling))
    engine.step()
    prepared = engine.runner.prepare(Plan(False, (request,), (1,)))
    return prepared.program.result().as_text()


@pytest.mark.parametrize(
    ("name", "tensor", "expert", "more"),
    [
        ("gguf-Q4_1", 4, 1, {}),
        ("gguf-deepseek-v2-F32", 2, 2, {}),
        ("ct-qwen3moe-w4a16-g32", 1, 4, {}),
        # Inputs that are reordered are gathered; scales of whole rows are found together.
        ("gptq-4b-g32-desc", 4, 1, {"all-gather": 2}),
        ("ct-int8-w8a8-dyn-asym", 4, 1, {"all-reduce": 2}),
    ],
)
def test_decode(name: str, tensor: int, expert: int, more: dict[str, int]) -> None:
    """A sum behind each attention and each feed-forward network and one behind the embedding; for
    the next token, two numbers of each device."""
    text = decode_program(cases.GOLDEN / name, tensor, expert)
    found, largest = collectives(text)
    layers = qjax.load(cases.GOLDEN / name).config.num_layers
    planned = Counter({"all-reduce": 2 * layers + 1, "all-gather": 2})
    planned += Counter({kind: count * layers for kind, count in more.items()})
    assert found == planned
    params = cases.split(cases.GOLDEN / name, tensor, expert)
    assert params.mesh is not None
    parallel = Parallel.of(params.mesh, params.config)
    assert found == planned_collectives(params.config, params.tree, parallel)
    assert largest <= 8 * 256  # of rows of 128 or 256 inputs, for eight rows: no weight


def test_sampling_gathers_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of blocks, the likeliest tokens of each device, one block from its device."""
    monkeypatch.setattr(sampler, "CANDIDATES", 16)
    text = decode_program(cases.GOLDEN / "gguf-Q4_1", 4, temperature=1.0, top_p=0.9, top_k=20)
    found, largest = collectives(text)
    assert set(found) == {"all-reduce", "all-gather"}
    assert largest <= 256  # sums of blocks; there are 512 logits
    assert qjax.load(cases.GOLDEN / "gguf-Q4_1").config.vocab_size == 512
