"""Recipes that are wrong, or ask for what qjax does not do: the key and the reason are told."""

import re

import pytest

from qjax.compress.modifiers import (
    QuantizationModifier,
)
from qjax.compress.recipe import parse
from qjax.errors import QjaxError, RecipeError, UnsupportedError

BAD = [
    # text, class of error, what the message names
    ("GPTQModifer: {scheme: W4A16}", RecipeError, "GPTQModifer.*GPTQModifier"),
    ("GPTQModifier: {schem: W4A16}", RecipeError, "'schem'.*'scheme'.*dampening_frac"),
    ("GPTQModifier: {scheme: W4A61}", RecipeError, "W4A61.*W4A16"),
    ("GPTQModifier: {scheme: W4A16, config_groups: {}}", RecipeError, "exclude each other"),
    ("GPTQModifier: {scheme: W4A16, block_size: 0}", RecipeError, "block_size"),
    ("GPTQModifier: {scheme: W4A16, block_size: many}", RecipeError, "block_size 'many'"),
    ("GPTQModifier: {scheme: W4A16, dampening_frac: 2}", RecipeError, "dampening_frac"),
    ("GPTQModifier: {scheme: W4A16, actorder: up}", RecipeError, "actorder 'up'"),
    ("GPTQModifier: {scheme: W4A16, targets: 4}", RecipeError, "targets 4"),
    ("GPTQModifier: {scheme: W4A16, start: 2}", UnsupportedError, "start is for training"),
    ("QuantizationModifier: {scheme: W4A16, target_bits: 9}", RecipeError, "target_bits"),
    ("QuantizationModifier: {scheme: W4A16, observer: {w: mse}}", RecipeError, "observer"),
    ("QuantizationModifier: {scheme: W4A16, weight_observer: mmse}", RecipeError, "mmse.*mse"),
    ("SmoothQuantModifier: {smoothing_strength: 1.5}", RecipeError, "smoothing_strength"),
    ("SmoothQuantModifier: {mappings: [[a, b, c]]}", RecipeError, "mappings"),
    ("GPTQModifier: {block_size: 64}", RecipeError, "does not say what to quantize to"),
    ("QuantizationModifier: {targets: Linear}", RecipeError, "does not say what to quantize to"),
    ("AWQModifier: {duo_scaling: maybe}", RecipeError, "duo_scaling 'maybe'"),
    ("AWQModifier: {duo_scaling: true}", RecipeError, "add a QuantizationModifier"),
    ("SmoothQuantModifier: {num_calibration_steps: 8}", UnsupportedError, "all samples"),
    ("SpinQuantModifier: {rotations: [R5]}", RecipeError, "R5"),
    ("SpinQuantModifier: {rotations: [R3]}", UnsupportedError, "R3"),
    ("SpinQuantModifier: {learnable: true}", UnsupportedError, "learnable"),
    ("QuIPModifier: {transform_block_size: 100}", RecipeError, "power of two, got 100"),
    ("SparseGPTModifier: {sparsity: 0.5}", UnsupportedError, "SparseGPTModifier.*sparse"),
    ("REAPPruningModifier: {sparsity: 0.5}", UnsupportedError, "experts"),
    ("OutputDistillationModifier: {}", UnsupportedError, "training"),
    ("a_stage: {run_type: train}", UnsupportedError, "run_type 'train'"),
    ("a_stage: {b_modifiers: 3}", RecipeError, "b_modifiers 3"),
    ("a_stage: {b_modifier: {}}", RecipeError, "no such modifier"),
    ("args: {bits: 4}", UnsupportedError, "args"),
    ("a_stage: {}", RecipeError, "no modifiers"),
    ("a_stage: [", RecipeError, "no YAML"),
    ("!!python/object/apply:os.getcwd []:\n", RecipeError, "no YAML"),
    ("- a: 1\n", RecipeError, "no stages"),
    ("missing.yaml", RecipeError, "no such recipe file"),
    ("W4A17", RecipeError, r"nor scheme: 'W4A17' .did you mean 'W4A1"),
    ("HQQModifier: {scheme: W4A16}\nHQQModifier: {scheme: W8A16}", RecipeError, "comes twice"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "kind", "message"), BAD)
def test_bad_recipes(text, kind, message):
    with pytest.raises(QjaxError) as error:
        parse(text)
    assert type(error.value) is kind
    assert re.search(message, str(error.value), re.DOTALL), str(error.value)


BAD_WEIGHTS = [
    ({"num_bits": 4, "strategy": "group"}, "needs a group_size"),
    ({"num_bits": 4, "strategy": "channel", "group_size": 32}, "needs strategy 'group'"),
    ({"num_bits": 4, "strategy": "token"}, "needs dynamic"),
    ({"num_bits": 8, "dynamic": True}, "weights cannot be dynamic"),
    ({"num_bits": 8, "type": "float", "strategy": "block"}, "block_structure"),
    ({"num_bits": 9}, "num_bits 9"),
    ({"num_bits": "4"}, "'4' is not of type int"),
    ({"num_bits": 4, "group_sise": 32}, "group_sise.*group_size"),
    ({"num_bits": 4, "type": "bool"}, "type 'bool'"),
    ({"num_bits": 4, "observer": "percentile"}, "percentile"),
]


@pytest.mark.parametrize(("weights", "message"), BAD_WEIGHTS)
def test_bad_weights(weights, message):
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    with pytest.raises((RecipeError, UnsupportedError), match=message):
        parse({"QuantizationModifier": {"config_groups": groups}})


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"num_bits": 8, "type": "int"}, "symmetric floats of 8 bits"),
        ({"num_bits": 8, "type": "float", "strategy": "attn_head"}, "attn_head"),
        ({"num_bits": 8, "type": "float", "dynamic": True}, "dynamic True"),
    ],
)
def test_bad_cache(scheme, message):
    with pytest.raises(UnsupportedError, match=message):
        QuantizationModifier(kv_cache_scheme=scheme)


def test_formats_follow_from_weights():
    group = {"targets": ["Linear"], "weights": {"num_bits": 8}, "format": "int-quantized"}
    with pytest.raises(UnsupportedError, match="format of Linear"):
        QuantizationModifier(config_groups={"group_0": group})


def test_attention_itself_is_not_quantized():
    inputs = {"num_bits": 8, "type": "float"}
    groups = {"attention": {"targets": ["LlamaAttention"], "input_activations": inputs}}
    with pytest.raises(UnsupportedError, match="kv_cache_scheme"):
        QuantizationModifier(config_groups=groups)
