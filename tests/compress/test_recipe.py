"""Recipes: those of LLM Compressor's documentation and examples come to what they come to there."""

from typing import Any

import pytest

from qjax.compress import recipe
from qjax.compress.modifiers import (
    AutoRoundModifier,
    AWQModifier,
    GPTQModifier,
    QuantizationModifier,
    QuIPModifier,
    SmoothQuantModifier,
    SpinQuantModifier,
)
from qjax.compress.presets import GGML, PRESETS, preset
from qjax.compress.settings import AWQMapping
from qjax.errors import RecipeError
from qjax.scheme import QuantizationArgs, QuantizationScheme


def parse(given: Any) -> Any:
    return recipe.parse(given)


INT, FLOAT = "int", "float"
TOKEN_INT8 = (8, INT, True, "token", None, None, True, None)
TOKEN_FP8 = (8, FLOAT, True, "token", None, None, True, None)

# The settings that compressed-tensors 0.19 gives each name (`preset_name_to_scheme`): num_bits,
# type, symmetric, strategy, group_size, block_structure, dynamic, scale_dtype.
KNOWN = {
    "UNQUANTIZED": (None, None),
    "W8A16": ((8, INT, True, "group", 128, None, False, None), None),
    "W4A16": ((4, INT, True, "group", 128, None, False, None), None),
    "W3A16": ((3, INT, True, "group", 128, None, False, None), None),
    "W2A16": ((2, INT, True, "group", 128, None, False, None), None),
    "W4A16_ASYM": ((4, INT, False, "group", 128, None, False, None), None),
    "W8A8": ((8, INT, True, "channel", None, None, False, None), TOKEN_INT8),
    "INT8": ((8, INT, True, "channel", None, None, False, None), TOKEN_INT8),
    "W4A8": ((4, INT, True, "group", 128, None, False, None), TOKEN_INT8),
    "W4A4": (
        (4, INT, True, "group", 128, None, False, None),
        (4, INT, True, "token", None, None, True, None),
    ),
    "W4AFP8": ((4, INT, True, "group", 128, None, False, None), TOKEN_FP8),
    "FP8": (
        (8, FLOAT, True, "tensor", None, None, False, None),
        (8, FLOAT, True, "tensor", None, None, False, None),
    ),
    "FP8_DYNAMIC": ((8, FLOAT, True, "channel", None, None, False, None), TOKEN_FP8),
    "FP8_BLOCK": (
        (8, FLOAT, True, "block", None, (128, 128), False, None),
        (8, FLOAT, True, "group", 128, None, True, None),
    ),
    "NVFP4A16": (
        (4, FLOAT, True, "tensor_group", 16, None, False, "torch.float8_e4m3fn"),
        None,
    ),
    "NVFP4": (
        (4, FLOAT, True, "tensor_group", 16, None, False, "torch.float8_e4m3fn"),
        (4, FLOAT, True, "tensor_group", 16, None, "local", "torch.float8_e4m3fn"),
    ),
    "MXFP4A16": ((4, FLOAT, True, "group", 32, None, False, "torch.uint8"), None),
    "MXFP4": (
        (4, FLOAT, True, "group", 32, None, False, "torch.uint8"),
        (4, FLOAT, True, "group", 32, None, True, "torch.uint8"),
    ),
    "MXFP8A16": ((8, FLOAT, True, "group", 32, None, False, "torch.uint8"), None),
    "MXFP8": (
        (8, FLOAT, True, "group", 32, None, False, "torch.uint8"),
        (8, FLOAT, True, "group", 32, None, True, "torch.uint8"),
    ),
}


def settings(args):
    return args and (
        *(args.num_bits, args.type, args.symmetric, args.strategy, args.group_size),
        *(args.block_structure, args.dynamic, args.scale_dtype),
    )


@pytest.mark.parametrize("name", KNOWN)
def test_preset(name):
    found = preset(name.lower(), ("Linear",))
    assert (settings(found.weights), settings(found.input_activations)) == KNOWN[name]
    assert found.targets == ("Linear",)


def test_names_of_presets_are_those_of_compressed_tensors():
    integers = ["W2A4", "W2A8", "W2A16", "W3A4", "W3A8", "W3A16", "W4A4", "W4A8", "W4A16"]
    integers += ["W5A8", "W5A16", "W6A8", "W6A16", "W7A8", "W7A16", "W8A16"]
    assert set(PRESETS) == {*integers, *KNOWN}
    static = [name for name in PRESETS if _observes_inputs(PRESETS[name])]
    assert static == ["FP8", "NVFP4"]


def _observes_inputs(scheme):
    inputs = scheme.input_activations
    return inputs is not None and inputs.observer == "static_minmax"


def test_ggml_types_and_mixes_are_schemes():
    assert {"Q4_K", "Q4_K_M", "Q8_0", "Q2_K", "Q3_K_L", "IQ4_XS", "TQ2_0", "Q6_K"} <= set(GGML)
    assert not {"F16", "BF16", "F32"} & set(GGML)
    (modifier,) = parse([QuantizationModifier(scheme="q4_k_m")])
    assert modifier.schemes == (QuantizationScheme(("Linear",), ggml="Q4_K_M"),)


INT4_INT8 = """
quant_stage:
    quant_modifiers:
        GPTQModifier:
            ignore: ["lm_head"]
            config_groups:
                group_0:
                    weights: {num_bits: 8, type: int, strategy: group, dynamic: false,
                              symmetric: true, group_size: 128}
                    targets: ["re:.*down_proj.*"]
                group_1:
                    weights: {num_bits: 4, type: int, strategy: group, dynamic: false,
                              symmetric: false, group_size: 128}
                    targets: ["re:.*self_attn.k_proj.*", "re:.*gate_proj.*", "re:.*up_proj.*"]
"""


def test_several_groups():
    (gptq,) = parse(INT4_INT8)
    assert isinstance(gptq, GPTQModifier)
    assert (gptq.ignore, gptq.block_size, gptq.dampening_frac) == (("lm_head",), 128, 0.01)
    assert [s.targets for s in gptq.schemes] == [
        ("re:.*down_proj.*",),
        ("re:.*self_attn.k_proj.*", "re:.*gate_proj.*", "re:.*up_proj.*"),
    ]
    assert [s.weights for s in gptq.schemes] == [
        QuantizationArgs(8, "int", True, "group", 128, actorder="weight"),
        QuantizationArgs(4, "int", False, "group", 128, actorder="weight"),
    ]


KV_CACHE = """
quant_stage:
    quant_modifiers:
        QuantizationModifier:
            ignore: ["lm_head"]
            config_groups:
                group_0:
                    weights: {num_bits: 8, type: float, strategy: tensor, dynamic: false,
                              symmetric: true}
                    input_activations: {num_bits: 8, type: float, strategy: tensor,
                                        dynamic: false, symmetric: true}
                    targets: ["Linear"]
            kv_cache_scheme: {num_bits: 8, type: float, strategy: tensor, dynamic: false,
                              symmetric: true}
"""


def test_cache_and_static_inputs():
    (modifier,) = parse(KV_CACHE)
    args = QuantizationArgs(8, "float", True, "tensor")
    assert modifier.schemes == (QuantizationScheme(("Linear",), args, args),)
    assert modifier.kv_cache_scheme == args
    assert modifier.requires_calibration_data


def test_cache_alone_beside_autoround():
    cache, rounding = parse("""
    quant_stage:
      quant_modifiers:
        QuantizationModifier:
          kv_cache_scheme: {num_bits: 8, type: float, symmetric: true, strategy: tensor}
        AutoRoundModifier:
          targets: [Linear]
          scheme: W4A16
          ignore: [lm_head]
          iters: 200
    """)
    assert cache.schemes == ()
    assert cache.requires_calibration_data
    assert isinstance(rounding, AutoRoundModifier)
    assert (rounding.iters, rounding.batch_size, rounding.lr) == (200, 8, None)
    assert rounding.schemes[0].weights == QuantizationArgs(4, group_size=128)


def test_smoothquant_with_mappings_and_gptq():
    smooth, gptq = parse("""
    quant_stage:
      quant_modifiers:
        SmoothQuantModifier:
          smoothing_strength: 0.8
          mappings:
          - - ['re:.*q_proj', 're:.*k_proj', 're:.*v_proj']
            - re:.*input_layernorm
          - - ['re:.*gate_proj', 're:.*up_proj']
            - re:.*post_attention_layernorm
        GPTQModifier:
          ignore: [lm_head]
          actorder: null
          config_groups:
            group_0:
              weights: {num_bits: 8, type: int, symmetric: true, strategy: channel}
              input_activations: {num_bits: 8, symmetric: false, dynamic: true, strategy: token,
                                  type: int}
              targets: [Linear]
    """)
    assert isinstance(smooth, SmoothQuantModifier)
    assert smooth.smoothing_strength == 0.8
    assert smooth.mappings == (
        AWQMapping("re:.*input_layernorm", ("re:.*q_proj", "re:.*k_proj", "re:.*v_proj")),
        AWQMapping("re:.*post_attention_layernorm", ("re:.*gate_proj", "re:.*up_proj")),
    )
    assert gptq.schemes[0].weights == QuantizationArgs(8, strategy="channel")
    inputs = QuantizationArgs(8, symmetric=False, strategy="token", dynamic=True)
    assert gptq.schemes[0].input_activations == inputs


def test_awq_then_rounding_then_gptq():
    awq, rtn, gptq = parse(r"""
    quant_stage:
      quant_modifiers:
        AWQModifier:
          duo_scaling: true
          mappings:
            - smooth_layer: "re:.*input_layernorm$"
              balance_layers: ["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"]
        QuantizationModifier:
          ignore: ["lm_head"]
          scheme: "W4A16"
          targets: ["re:.*self_attn\\.(k|q|o|v)_proj$"]
        GPTQModifier:
          ignore: ["lm_head"]
          scheme: "W8A8"
          targets: ["re:.*mlp\\.(down|gate|up)_proj$"]
          block_size: 128
          dampening_frac: 0.001
          actorder: null
    """)
    assert isinstance(awq, AWQModifier)
    assert (awq.duo_scaling, awq.n_grid) == (True, 20)
    assert awq.mappings[0].smooth_layer == "re:.*input_layernorm$"
    assert rtn.schemes[0].targets == (r"re:.*self_attn\.(k|q|o|v)_proj$",)
    assert (gptq.dampening_frac, gptq.actorder) == (0.001, None)
    assert settings(gptq.schemes[0].weights) == KNOWN["W8A8"][0]
    assert not rtn.requires_calibration_data
    assert awq.requires_calibration_data


def test_awq_of_earlier_versions_stands_for_two():
    for given in (
        {"default_stage": {"default_modifiers": {"AWQModifier": {
            "ignore": ["lm_head"], "scheme": "W4A16_ASYM", "targets": ["Linear"],
            "duo_scaling": "both"}}}},
        [AWQModifier(ignore=["lm_head"], scheme="W4A16_ASYM", targets=["Linear"],
                     duo_scaling="both")],
    ):  # fmt: skip
        awq, rtn = parse(given)
        assert (awq.duo_scaling, awq.schemes) == ("both", ())
        assert type(rtn) is QuantizationModifier
        assert rtn.ignore == ("lm_head",)
        assert settings(rtn.schemes[0].weights) == KNOWN["W4A16_ASYM"][0]


def test_gptq_takes_over_the_schemes_before_it():
    (gptq,) = parse("""
    test_stage:
      quant_modifiers:
        QuantizationModifier:
          ignore: ["lm_head", "model.layers.0.mlp.down_proj"]
          config_groups:
            group_0:
              weights: {num_bits: 4, type: "int", symmetric: False, strategy: "group",
                        group_size: 128}
              input_activations: null
              output_activations: null
              targets: ["Linear"]
        GPTQModifier:
          block_size: 64
    """)
    assert type(gptq) is GPTQModifier
    assert (gptq.block_size, gptq.ignore) == (64, ("lm_head", "model.layers.0.mlp.down_proj"))
    weights: Any = gptq.schemes[0].weights
    assert settings(weights) == KNOWN["W4A16_ASYM"][0]
    assert weights.actorder == "weight"


def test_mixed_floats_as_dicts_with_objects():
    """The example of NVFP4 beside FP8, in Python."""
    fp8, nvfp4 = PRESETS["FP8_DYNAMIC"], PRESETS["NVFP4"]
    parts = ("weights", "input_activations")
    groups = {
        "attention": QuantizationScheme(("re:.*self_attn.*",), fp8.weights, fp8.input_activations),
        "mlp": {"targets": ["re:.*mlp.*"], **{name: getattr(nvfp4, name) for name in parts}},
    }
    (modifier,) = parse(QuantizationModifier(config_groups=groups, ignore=["lm_head"]))
    assert settings(modifier.schemes[0].weights) == KNOWN["FP8_DYNAMIC"][0]
    assert settings(modifier.schemes[1].weights) == KNOWN["NVFP4"][0]
    assert settings(modifier.schemes[1].input_activations) == KNOWN["NVFP4"][1]


def test_presets_by_targets():
    given = {"FP8_DYNAMIC": ["re:.*self_attn.*"], "W4A16": "re:.*mlp.*"}
    (modifier,) = parse(QuantizationModifier(scheme=given))
    assert [scheme.targets for scheme in modifier.schemes] == [
        ("re:.*self_attn.*",),
        ("re:.*mlp.*",),
    ]


@pytest.mark.parametrize("key", ["scheme", None])
def test_observer_of_the_documentation(key):
    """Settings of weights in `scheme`, or beside the modifier's own."""
    args = {"observer": "mse", "num_bits": 4, "type": "int", "symmetric": True}
    args |= {"strategy": "channel", "observer_kwargs": {"maxshrink": 0.1, "norm": 2.0}}
    scheme = {"weights": args}
    given = {"targets": ["Linear"], **({key: scheme} if key else scheme)}
    (modifier,) = parse({"quantization_stage": {"quantization_modifiers": {"GPTQModifier": given}}})
    weights = modifier.schemes[0].weights
    assert (weights.observer, weights.strategy) == ("mse", "channel")
    assert dict(weights.observer_kwargs) == {"maxshrink": 0.1, "norm": 2.0}


def test_observers_for_all_groups():
    modifier: Any = QuantizationModifier(scheme="W4A16", weight_observer="imatrix_mse")
    assert modifier.schemes[0].weights.observer == "imatrix_mse"
    assert modifier.requires_calibration_data
    both: Any = QuantizationModifier(scheme="FP8", observer={"weights": "mse", "input": "minmax"})
    assert both.schemes[0].weights.observer == "mse"
    assert both.schemes[0].input_activations.observer == "minmax"


def test_rotations():
    spin, quip = parse(
        [
            SpinQuantModifier(rotations=["R1", "R2", "R4"], transform_block_size=128),
            QuIPModifier(rotations=["v"], transform_block_size=128, transform_type="hadamard"),
        ]
    )
    assert spin.rotations == ("R1", "R2", "R4")
    assert (quip.targets, quip.ignore) == (("Linear",), ("lm_head",))


def test_defaults_are_those_of_llm_compressor():
    gptq: Any = GPTQModifier(scheme="W4A16")
    assert (gptq.block_size, gptq.dampening_frac, gptq.actorder) == (128, 0.01, "static")
    assert gptq.targets == ("Linear",)
    assert gptq.schemes[0].weights.actorder == "weight"
    assert (AWQModifier().duo_scaling, AWQModifier().n_grid) == (True, 20)
    assert SmoothQuantModifier().smoothing_strength == 0.5
    assert AutoRoundModifier().iters == 200
    assert SpinQuantModifier().rotations == ("R1", "R2")
    assert (QuIPModifier().rotations, QuIPModifier().transform_type) == (("v",), "random-hadamard")


def test_actorder_of_a_group_goes_before_the_default():
    def order(own, groups):
        weights = {"num_bits": 4, "group_size": 32, **groups}
        modifier: Any = GPTQModifier(
            config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, **own
        )
        return modifier.schemes[0].weights.actorder

    assert order({}, {}) == "weight"
    assert order({}, {"actorder": "group"}) == "group"
    assert order({"actorder": "group"}, {}) == "group"
    assert order({"actorder": None}, {"actorder": False}) is None
    with pytest.raises(RecipeError, match="actorder is 'group', but 'weight'"):
        order({"actorder": "group"}, {"actorder": "weight"})


def test_stages_follow_each_other():
    found = parse("""
    DEFAULT_stage:
      DEFAULT_modifiers:
        SmoothQuantModifier: {smoothing_strength: 0.8}
    second_stage_1:
      run_type: oneshot
      modifiers:
        - GPTQModifier: {scheme: W8A8, index: 1, requires_calibration_data: true, start: 0}
    """)
    assert [type(m).__name__ for m in found] == ["SmoothQuantModifier", "GPTQModifier"]


def test_log_equalization():
    (found,) = parse({"LogarithmicEqualizationModifier": {"smoothing_strength": 0.4}})
    assert (found.algorithm, found.smoothing_strength) == ("log_equalization", 0.4)


def test_files(tmp_path):
    text = "a_stage:\n  a_modifiers:\n    QuantizationModifier: {scheme: FP8_DYNAMIC}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "recipe.md").write_text(f"---\n{text}---\n# A model\n")
    (tmp_path / "recipe.json").write_text('{"QuantizationModifier": {"scheme": "FP8_DYNAMIC"}}')
    plain = parse(text)
    assert parse(tmp_path / "recipe.yaml") == parse(str(tmp_path / "recipe.md")) == plain
    assert parse(tmp_path / "recipe.json") == parse([text]) == plain
