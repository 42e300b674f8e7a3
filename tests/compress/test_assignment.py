"""Which layers a recipe's targets name."""

from typing import Any

import pytest

from qjax.compress.assignment import assign, assign_all
from qjax.compress.modifiers import GPTQModifier, QuantizationModifier, SmoothQuantModifier
from qjax.errors import RecipeError
from qjax.scheme import QuantizationArgs, QuantizationScheme

# As of SmolLM2-135M, whose 576 columns 128 does not divide.
MODULES = {"model.embed_tokens": (49152, 576), "lm_head": (49152, 576)} | {
    f"model.layers.{layer}.{name}": shape
    for layer in range(2)
    for name, shape in {
        "self_attn.q_proj": (576, 576),
        "self_attn.k_proj": (192, 576),
        "self_attn.v_proj": (192, 576),
        "self_attn.o_proj": (576, 576),
        "mlp.gate_proj": (1536, 576),
        "mlp.up_proj": (1536, 576),
        "mlp.down_proj": (576, 1536),
    }.items()
}
OTHERS = ["model.norm", "model.layers.0.input_layernorm", "model.layers.0.mlp.gate"]


def group(bits, size=32, targets=("Linear",)):
    return QuantizationScheme(targets, QuantizationArgs(bits, group_size=size))


def bits(modifier, modules=MODULES):
    found: dict[str, Any] = {**assign(modifier, modules, OTHERS)}
    return {name: scheme.weights.num_bits for name, scheme in found.items()}


def test_linear_layers_but_the_ignored_ones():
    modifier = QuantizationModifier(scheme=group(4), ignore=["lm_head", "re:.*layers.0.mlp.*"])
    assert set(bits(modifier)) == {
        name
        for name in MODULES
        if name not in ("lm_head", "model.embed_tokens") and "layers.0.mlp" not in name
    }


def test_a_name_goes_before_a_pattern_and_a_pattern_before_a_class():
    groups = {
        "a": group(4),
        "b": group(8, 64, ("re:.*down_proj$",)),
        "c": group(3, 32, ("model.layers.1.mlp.down_proj", "model.embed_tokens")),
    }
    found = bits(QuantizationModifier(config_groups=groups))
    assert found["model.layers.0.mlp.up_proj"] == 4
    assert found["model.layers.0.mlp.down_proj"] == 8
    assert found["model.layers.1.mlp.down_proj"] == 3
    assert found["model.embed_tokens"] == 3
    assert found["lm_head"] == 4


def test_experts_go_by_the_name_of_the_first():
    modules = {"model.layers.0.mlp.experts.gate_proj": (8, 64, 128)}
    modifier = QuantizationModifier(scheme={"W4A16": r"re:.*mlp.experts.\d+.gate_proj$"})
    assert bits(modifier, modules) == {"model.layers.0.mlp.experts.gate_proj": 4}


def test_routers_go_by_their_name_alone():
    modules = {**MODULES, "model.layers.0.mlp.gate": (8, 576)}
    patterns = {"W8A8": ["Linear", "re:.*mlp.*"]}
    assert "model.layers.0.mlp.gate" not in bits(QuantizationModifier(scheme=patterns), modules)
    named = {"W8A8": ["model.layers.0.mlp.gate"]}
    assert bits(QuantizationModifier(scheme=named), modules) == {"model.layers.0.mlp.gate": 8}


def test_gguf_types_are_for_embeddings_too():
    found = assign(QuantizationModifier(scheme="Q4_K_M"), MODULES)
    assert set(found) == set(MODULES)
    assert {scheme.ggml for scheme in found.values()} == {"Q4_K_M"}


def test_no_scheme_assigns_nothing():
    cache = {"num_bits": 8, "type": "float"}
    assert assign(QuantizationModifier(kv_cache_scheme=cache), MODULES) == {}
    assert assign(QuantizationModifier(scheme="UNQUANTIZED"), MODULES) == {}


def test_what_others_are_called_may_be_ignored():
    tied = {name: shape for name, shape in MODULES.items() if name != "lm_head"}
    ignore = ["lm_head", "re:.*mlp.gate$", "model.norm"]
    assert bits(QuantizationModifier(scheme=group(4), ignore=ignore), tied)


BAD = [
    ({"targets": ["Liner"]}, "'Liner'.*'Linear'"),
    ({"targets": ["re:.*q_prj"]}, r"'re:\.\*q_prj' matches no layer.*self_attn.q_proj"),
    ({"targets": ["re:(q"]}, "no regular expression"),
    ({"targets": ["model.norm"]}, "model.norm is none"),
    ({"ignore": ["lm_haed"]}, "ignore: 'lm_haed' matches nothing.*'lm_head'"),
    ({"ignore": ["re:.*vision_tower.*"]}, "vision_tower"),
    ({"ignore": ["re:.*"]}, "nothing is left"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_names_that_match_nothing(settings, message):
    modifier = QuantizationModifier(scheme="W8A8", **settings)
    with pytest.raises(RecipeError, match=message):
        assign(modifier, MODULES, OTHERS)


def test_groups_that_do_not_divide():
    modifier = QuantizationModifier(scheme="W4A16", ignore=["lm_head"])
    message = r"layers.0.self_attn.q_proj: groups of 128 .* 576 inputs.* 32, .*64, 72, .*192, 288"
    with pytest.raises(RecipeError, match=message):
        assign(modifier, MODULES)
    allowed = QuantizationModifier(
        scheme="W4A16", ignore=["lm_head"], bypass_divisibility_checks=True
    )
    assert set(bits(allowed).values()) == {4}
    assert bits(modifier, {"down_proj": (576, 1536), "small": (8, 64)}) == {
        "down_proj": 4,
        "small": 4,
    }


def test_groups_that_conflict():
    groups = {"a": group(4, 32, ("re:.*mlp.*",)), "b": group(8, 32, ("re:.*down.*",))}
    modifier = QuantizationModifier(config_groups=groups)
    with pytest.raises(RecipeError, match=r"down_proj is named by two groups.*mlp.*down"):
        assign(modifier, MODULES)
    same = {"a": group(4, 32, ("re:.*mlp.*",)), "b": group(4, 32, ("re:.*down.*",))}
    assert bits(QuantizationModifier(config_groups=same))


def test_modifiers_share_the_layers():
    gptq = GPTQModifier(scheme="W8A8", targets="re:.*self_attn.*")
    rtn = QuantizationModifier(scheme=group(4), targets="re:.*mlp.*")
    rest = QuantizationModifier(scheme=group(4, 32, ("re:.*mlp.*",)))
    attention, none, mlp = assign_all([gptq, SmoothQuantModifier(), rest], MODULES, OTHERS)
    assert none == {}
    assert len(attention) == 8
    assert len(mlp) == 6
    with pytest.raises(RecipeError, match=r"q_proj is claimed by two .*GPTQ.*Quantization"):
        assign_all([gptq, rtn], MODULES, OTHERS)
