"""Rope tables against the rotary embeddings of transformers, for every scaling."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.layers.rope import RopeConfig, rope_tables
from qjax.models.config import model_config

CASES = (
    "default",
    "linear",
    "dynamic",
    "llama3",
    "yarn",
    "yarn_mscale",
    "longrope",
    "longrope_partial",
    "gemma3_full",
    "gemma3_sliding",
)


@pytest.fixture(scope="module")
def tables(golden):
    with np.load(golden / "rope.npz") as data:
        return dict(data)


def rope_of(tables, case: str) -> RopeConfig:
    layer_type = str(tables.get(f"{case}/layer_type", "full_attention"))
    return model_config(json.loads(str(tables[f"{case}/config"]))).rope_for(layer_type)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("which", ["short", "long"])
def test_tables_equal_transformers(tables, case, which):
    positions = tables[f"positions/{which}"]
    cos, sin = rope_tables(rope_of(tables, case), jnp.asarray(positions))
    # Both sides round inv_freq and the angle to float32, so the error grows with the position.
    tolerance = 1e-6 + 4e-7 * positions[:, None]
    for ours, name in ((cos, "cos"), (sin, "sin")):
        theirs = tables[f"{case}/{which}/{name}"]
        assert ours.shape == theirs.shape
        assert ours.dtype == jnp.float32
        assert np.all(np.abs(ours - theirs) <= tolerance)


@pytest.mark.parametrize("case", ["dynamic", "longrope"])
def test_each_token_follows_the_length_of_its_own_sequence(tables, case):
    config = rope_of(tables, case)
    short, long = tables["positions/short"], tables["positions/long"]
    seq_lens = np.repeat([short[-1] + 1, long[-1] + 1], [len(short), len(long)])
    together = jax.jit(rope_tables, static_argnums=0)(
        config, jnp.concatenate([short, long]), jnp.asarray(seq_lens, jnp.int32)
    )
    apart = [rope_tables(config, jnp.asarray(each)) for each in (short, long)]
    for i in range(2):
        expected = np.concatenate([apart[0][i], apart[1][i]])
        np.testing.assert_allclose(together[i], expected, atol=1e-5)


def test_only_dynamic_and_longrope_depend_on_the_length(tables):
    depending = {case for case in CASES if rope_of(tables, case).depends_on_length}
    assert depending == {"dynamic", "longrope", "longrope_partial"}


def test_equal_factors_do_not_depend_on_the_length():
    factors = (2.0, 4.0)
    config = RopeConfig(4, 100.0, "longrope", short_factor=factors, long_factor=factors)
    assert not config.depends_on_length
    cos, _ = rope_tables(config, jnp.asarray([3], jnp.int32))
    np.testing.assert_allclose(cos[0], np.cos([3 / 2, 3 / 10 / 4]), rtol=1e-6)
