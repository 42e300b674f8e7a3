"""Params as a pytree: one compilation a config, and a tokenizer that waits until it is wanted."""

import jax
import jax.numpy as jnp
import numpy as np

from qjax.params import Host, Params


def params_of(value: float, **host) -> Params:
    return Params({"w": jnp.full((2,), value)}, config="a config", host=Host(**host))


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
