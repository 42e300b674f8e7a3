"""Params as a pytree: one compilation a config, and a tokenizer that waits until it is wanted."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax.params import Host, Params


def params_of(value: float, **host) -> Params:
    config: Any = "a config"
    return Params({"w": jnp.full((2,), value)}, config=config, host=Host(**host))


def test_another_checkpoint_of_the_same_config_is_not_another_compilation():
    traces = []

    @jax.jit
    def double(params: Params):
        traces.append(params.config)
        return params.tree["w"] * 2

    for value, source in ((1.0, "a"), (2.0, "b")):
        params = params_of(value, source=source, load_tokenizer=lambda: None)
        np.testing.assert_array_equal(double(params), [2 * value] * 2)
    assert traces == ["a config"]


def test_tree_map_keeps_what_belongs_to_the_host():
    params = params_of(1.0, source="a", generation_config={"top_k": 3})
    mapped = jax.tree.map(lambda leaf: leaf + 1, params)
    assert mapped.source == "a"
    assert mapped.generation_config == {"top_k": 3}
    np.testing.assert_array_equal(mapped.tree["w"], [2, 2])


def test_tokenizer_is_made_once_and_late():
    made = []
    params = params_of(1.0, load_tokenizer=lambda: made.append(1) or "tokenizer")
    assert made == []
    assert params.tokenizer == params.tokenizer == "tokenizer"
    assert made == [1]
    assert params_of(1.0).tokenizer is None


def test_bytes():
    assert params_of(1.0).nbytes == 8


def test_summary_counts_what_the_file_holds(golden):
    params = qjax.load(golden / "gguf-Q4_1")
    summary = params.summary()
    found = {use.qtype: use for use in summary.uses}
    # Two layers of width 256 with 4 heads, 2 of them for keys and values, of 64; 512 tokens.
    weights = 2 * (256 * (256 + 128 + 128 + 256) + 3 * 256 * 512) + 512 * 256
    q4_1 = found["q4_1"]
    assert (q4_1.method, q4_1.tensors, q4_1.weights) == ("gguf", 15, weights)
    assert q4_1.stored == weights // 32 * 20
    assert found["float32"].method == ""
    assert found["float32"].stored == 5 * 256 * 4
    assert summary.total.nbytes == params.nbytes
    assert all(0.95 < (use.ratio or 0) <= 1.05 for use in summary.uses)
    lines = str(summary).splitlines()
    assert lines[0].split()[:3] == ["method", "type", "inputs"]
    assert len(lines) == len(summary.uses) + 2
    joined = qjax.load(golden / "base-tiny-phi3").summary()
    assert joined.total.stored == 2 * joined.total.weights  # bfloat16, parts of joined ones too
    assert params_of(1.0).summary().total.ratio is None
