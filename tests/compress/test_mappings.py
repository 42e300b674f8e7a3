"""Scales that go from one layer to others, and how SmoothQuant chooses them."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.compress.algorithms import smoothquant
from qjax.compress.mappings import Scaling, chosen, fold, scalings
from qjax.compress.settings import AWQMapping
from tests.compress.models import flat, floats, logits, put


@pytest.mark.parametrize(
    ("name", "smooth"),
    [
        ("llama", {"input_layernorm", "post_attention_layernorm", "v_proj", "up_proj"}),
        ("qwen2", {"input_layernorm", "post_attention_layernorm", "v_proj", "up_proj"}),
        ("gemma3", {"input_layernorm", "pre_feedforward_layernorm", "v_proj", "up_proj"}),
        ("qwen3moe", {"input_layernorm", "post_attention_layernorm", "v_proj", "up_proj"}),
    ],
)
def test_scales_change_nothing(golden: Path, name: str, smooth: set[str]) -> None:
    params = qjax.load(golden / f"base-tiny-{name}")
    tree = floats(params.tree)
    before = logits(params, tree)
    rng = np.random.default_rng(0)
    for layer in tree["model"]["layers"].values():
        names = flat(layer)
        found = scalings(params.config, names)
        assert {each.smooth.rpartition(".")[2] for each in found} == smooth
        for scaling in found:
            names = flat(layer)
            channels = names[f"{scaling.smooth}.weight"].shape
            shape = channels if scaling.is_norm else channels[:-1]
            s = np.exp(rng.standard_normal(shape)).astype(np.float32)
            changed = fold(names, scaling, jnp.asarray(s))
            assert changed.keys() <= names.keys()
            for key, value in changed.items():
                assert not np.allclose(value, names[key])
                put(layer, key, np.asarray(value))
    after = logits(params, tree)
    np.testing.assert_allclose(after, before, atol=2e-3 * np.abs(before).max())


def test_recipes_choose_by_name() -> None:
    found = (
        Scaling("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj")),
        Scaling("mlp.up_proj", ("mlp.down_proj",)),
    )
    prefix = "model.layers.3."
    assert chosen(found, None, prefix) == found
    wanted = [AWQMapping("re:.*input_layernorm$", ("re:.*q_proj$", "re:.*v_proj$"))]
    assert chosen(found, wanted, prefix) == found[:1]
    assert chosen(found, [AWQMapping("re:.*up_proj$", ("re:.*o_proj$",))], prefix) == ()
    assert chosen(found, [AWQMapping("re:.*layers.4.*", ("re:.*",))], prefix) == ()


def test_channels_of_repeated_heads() -> None:
    scaling = Scaling("v_proj", ("o_proj",), repeat=3, head_dim=2)
    s = jnp.arange(4.0)
    columns = scaling.columns(s)
    np.testing.assert_array_equal(columns, [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3])
    np.testing.assert_array_equal(scaling.channels(columns), s)


def test_smoothquant_against_float64() -> None:
    rng = np.random.default_rng(0)
    low, high = -rng.random(16) * 9, rng.random(16) * 4
    w = [rng.standard_normal((8, 16)), rng.standard_normal((4, 16)) * 2]
    w[0][:, 3] = w[1][:, 3] = 0
    size = high - low
    most = 2 * np.abs(np.concatenate(w)).max(0)
    wanted = size**0.7 / np.maximum(most, 1e-30) ** 0.3
    wanted[3] = size[3]
    args = (jnp.asarray(low, jnp.float32), jnp.asarray(high, jnp.float32))
    largest = smoothquant.largest_of_columns([jnp.asarray(each, jnp.float32) for each in w])
    np.testing.assert_allclose(smoothquant.scales(*args, largest, 0.7), wanted, rtol=1e-5)
    found = smoothquant.scales(*args, largest, algorithm="log_equalization")
    np.testing.assert_allclose(found, size / np.log2(2 + size), rtol=1e-5)
    # Inputs that are always 0 give no scale of 0.
    assert (smoothquant.scales(args[0] * 0, args[1] * 0, largest) > 0).all()
