import pytest

from qjax.formats import kv_scales

ATTENTION = "model.layers.3.self_attn"


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        ("k_scale", "k_scale"),
        ("v_scale", "v_scale"),
        ("k_proj.k_scale", "k_scale"),
        ("v_proj.v_scale", "v_scale"),
        ("k_proj.output_scale", "k_scale"),
        ("v_proj.output_scale", "v_scale"),
        ("qkv_proj.k_scale", "k_scale"),
        ("qkv_proj.v_scale", "v_scale"),
        ("k_cache.scale", "k_scale"),
        ("v_cache.scale", "v_scale"),
        ("kv_scale", "kv_scale"),
    ],
)
def test_names_of_the_tools(stored, wanted):
    assert kv_scales.canonical(f"{ATTENTION}.{stored}") == f"{ATTENTION}.{wanted}"
    assert not kv_scales.is_other(f"{ATTENTION}.{stored}")


@pytest.mark.parametrize(
    "stored",
    ["q_scale", "q_proj.q_scale", "q_proj.output_scale", "qkv_proj.q_scale", "prob_output_scale"],
)
def test_scales_of_what_is_not_cached(stored):
    assert kv_scales.canonical(f"{ATTENTION}.{stored}") is None
    assert kv_scales.is_other(f"{ATTENTION}.{stored}")


@pytest.mark.parametrize(
    "stored",
    [
        *("k_proj.weight_scale", "k_proj.input_scale", "k_proj.v_scale", "v_proj.k_scale"),
        *("o_proj.output_scale", "k_scale.weight", "k_scale_inv"),
    ],
)
def test_other_tensors(stored):
    assert kv_scales.canonical(f"{ATTENTION}.{stored}") is None
    assert not kv_scales.is_other(f"{ATTENTION}.{stored}")


def test_only_of_attention():
    assert kv_scales.canonical("model.layers.0.mlp.k_scale") is None
