"""Recipes in two words: a scheme and a method, as command lines give them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qjax.compress.assignment import HEAD
from qjax.compress.modifiers import (
    AutoRoundModifier,
    AWQModifier,
    GPTQModifier,
    HQQModifier,
    Modifier,
    QuantizationModifier,
    SmoothQuantModifier,
    SpinQuantModifier,
)
from qjax.compress.presets import preset
from qjax.errors import RecipeError, nearest
from qjax.scheme import QuantizationScheme

METHODS: dict[str, str] = {
    "rtn": "round to nearest; no samples",
    "mse": "round to nearest, ranges searched for the least error; no samples",
    "imatrix": "round to nearest, ranges searched, columns with large inputs counting more",
    "gptq": "GPTQ: later columns make up for the error of earlier ones",
    "awq": "AWQ: columns with large inputs are scaled up first",
    "autoround": "AutoRound: rounding learned by gradient descent; slow",
    "smoothquant": "SmoothQuant, then GPTQ: for schemes that round inputs",
    "spinquant": "rotations folded into the weights, then GPTQ",
    "hqq": "HQQ: fitted zero points; no samples",
}


def modifiers_for(
    scheme: str,
    method: str = "rtn",
    *,
    group_size: int | None = None,
    ignore: Sequence[str] = (),
    target_bits: float | None = None,
) -> list[Modifier]:
    """The recipe of a scheme and a method.

    Args:
      scheme: name of a preset.
      method: key of `METHODS`.
      group_size: of the scheme's groups, where it is another; -1 for a scale for each output.
      ignore: layers that stay as they are, beside the head (which GGUF types take in).
      target_bits: see `QuantizationMixin`.

    Raises:
      RecipeError: a name is unknown, or scheme and method do not go together.
    """
    if method not in METHODS:
        raise RecipeError(
            f"method {method!r:.80} is unknown{nearest(method, METHODS)}; known are "
            f"{', '.join(METHODS)}"
        )
    found = _with_groups(scheme, preset(scheme), group_size)
    if found.ggml is not None and method not in ("rtn", "imatrix"):
        raise RecipeError(
            f"scheme {found.ggml} is of GGUF files, whose types are made by the methods rtn and "
            f"imatrix, not {method}"
        )
    ignore = (*(() if found.ggml is not None else (HEAD,)), *ignore)
    settings: dict[str, Any] = {"scheme": found, "ignore": ignore, "target_bits": target_bits}
    match method:
        case "rtn":
            return [QuantizationModifier(**settings)]
        case "mse":
            return [QuantizationModifier(**settings, weight_observer="memoryless_mse")]
        case "imatrix":
            return [QuantizationModifier(**settings, weight_observer="imatrix_mse")]
        case "gptq":
            return [GPTQModifier(**settings)]
        case "awq":
            return [AWQModifier(duo_scaling="both"), QuantizationModifier(**settings)]
        case "autoround":
            return [AutoRoundModifier(**settings)]
        case "smoothquant":
            return [SmoothQuantModifier(smoothing_strength=0.8), GPTQModifier(**settings)]
        case "spinquant":
            return [SpinQuantModifier(), GPTQModifier(**settings)]
    return [HQQModifier(**settings)]


def _with_groups(name: str, scheme: QuantizationScheme, size: int | None) -> QuantizationScheme:
    """The scheme with groups of another size."""
    weights = scheme.weights
    if size is None:
        return scheme
    if weights is None or weights.type != "int":
        raise RecipeError(f"scheme {name} has groups of its own: leave out --group-size")
    if size < 1 and size != -1:
        raise RecipeError(f"group_size must be above 0, or -1 for one scale an output, got {size}")
    strategy = "channel" if size == -1 else "group"
    return replace(scheme, weights=replace(weights, strategy=strategy, group_size=size))
