"""Recipes from a scheme and a method."""

from typing import Any

import pytest

from qjax.compress.recipe import parse
from qjax.compress.shorthand import METHODS, modifiers_for
from qjax.errors import RecipeError


def made(*args: Any, **settings: Any) -> list[Any]:
    return [*parse(modifiers_for(*args, **settings))]


KINDS = {
    "rtn": ["QuantizationModifier"],
    "mse": ["QuantizationModifier"],
    "imatrix": ["QuantizationModifier"],
    "gptq": ["GPTQModifier"],
    "awq": ["AWQModifier", "QuantizationModifier"],
    "autoround": ["AutoRoundModifier"],
    "smoothquant": ["SmoothQuantModifier", "GPTQModifier"],
    "spinquant": ["SpinQuantModifier", "GPTQModifier"],
    "hqq": ["HQQModifier"],
}


@pytest.mark.parametrize("method", METHODS)
def test_methods(method):
    found = made("W4A16_ASYM" if method == "hqq" else "W4A16", method, group_size=32)
    assert [type(modifier).__name__ for modifier in found] == KINDS[method]
    weights = found[-1].schemes[0].weights
    assert (weights.num_bits, weights.group_size) == (4, 32)
    assert found[-1].ignore == ("lm_head",)
    needs = any(modifier.requires_calibration_data for modifier in found)
    assert needs == (method not in ("rtn", "mse", "hqq"))


def test_rows_as_groups():
    (found,) = made("w4a16", group_size=-1, ignore=["re:.*mlp.*"], target_bits=4.5)
    weights = found.schemes[0].weights
    assert (weights.strategy, weights.group_size) == ("channel", None)
    assert (found.ignore, found.target_bits) == (("lm_head", "re:.*mlp.*"), 4.5)


def test_gguf_types_leave_nothing_out():
    (found,) = made("q4_k_m")
    assert (found.schemes[0].ggml, found.ignore) == ("Q4_K_M", ())
    assert not found.requires_calibration_data
    (weighed,) = made("Q4_K_M", "imatrix")
    assert weighed.requires_calibration_data


@pytest.mark.parametrize(
    ("args", "settings", "message"),
    [
        (("W4A61",), {}, "W4A61.*did you mean 'W4A16'"),
        (("W4A16", "gptg"), {}, "gptg.*did you mean 'gptq'"),
        (("Q4_K_M", "gptq"), {}, "rtn and imatrix, not gptq"),
        (("FP8_DYNAMIC",), {"group_size": 64}, "groups of its own"),
        (("W4A16",), {"group_size": 0}, "group_size"),
        (("W4A16",), {"target_bits": 1.0}, "target_bits"),
    ],
)
def test_bad_words(args, settings, message):
    with pytest.raises(RecipeError, match=message):
        modifiers_for(*args, **settings)
