"""The methods that a report makes quantizations of a model by, in the order of its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qjax.compress import layers
from qjax.compress.modifiers import Modifier
from qjax.compress.presets import preset
from qjax.compress.shorthand import modifiers_for
from qjax.errors import RequestError, nearest
from qjax.params import Params
from qjax.qarray import QArray

ALL = "all"
GROUPS = (128, 64, 32)  # of integers: the first of these that all layers can be cut into


@dataclass(frozen=True)
class Method:
    """How a base of 16 bits becomes a smaller model.

    Attributes:
      name: in the report.
      about: what it does, in a few words.
      scheme: one of `qjax.compress.presets`, or "" where it is rounded as it is read.
      how: one of `qjax.compress.shorthand.METHODS`.
      format: that it is saved in, see `qjax.save`; None for the usual one of the scheme.
      settings: of the modifier that quantizes.
    """

    name: str
    about: str
    scheme: str
    how: str = "rtn"
    format: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gguf(self) -> bool:
        return bool(self.scheme) and preset(self.scheme).ggml is not None

    def recipe(self, params: Params) -> list[Modifier]:
        """What `qjax.oneshot` gets for this model."""
        weights = preset(self.scheme).weights
        integers = weights is not None and weights.strategy == "group" and weights.type == "int"
        groups = _group_size(params) if integers else None
        *before, last = modifiers_for(self.scheme, self.how, group_size=groups)
        return [*before, replace(last, **self.settings)]

    def samples(self, params: Params) -> bool:
        """Whether it runs samples through the model."""
        return bool(self.scheme) and any(
            modifier.requires_calibration_data for modifier in self.recipe(params)
        )


METHODS = (
    Method("fp8", "FP8 weights by output, inputs by token", "FP8_DYNAMIC"),
    Method("int8", "SmoothQuant, then GPTQ; INT8 inputs by token", "W8A8", "smoothquant"),
    Method("q8_0", "GGUF's 8-bit blocks", "Q8_0"),
    Method("w4a16-rtn", "4-bit integers, rounded to nearest", "W4A16"),
    Method("gptq", "4-bit integers by GPTQ", "W4A16", "gptq"),
    Method("awq", "4-bit integers with zero points by AWQ", "W4A16_ASYM", "awq"),
    # A quarter of its usual steps: without an accelerator they take long.
    Method(
        "autoround",
        "4-bit integers by AutoRound, 50 steps",
        "W4A16",
        "autoround",
        settings={"iters": 50},
    ),
    Method("hqq", "4-bit integers, fitted zero points", "W4A16_ASYM", "hqq"),
    Method("nf4", "bitsandbytes' 4-bit normal floats", "", format="bitsandbytes"),
    Method("nvfp4", "NVFP4 weights and inputs", "NVFP4"),
    Method("mxfp4", "MXFP4 weights and inputs", "MXFP4"),
    Method("q4_k_m", "GGUF's mix of 4 and 6 bits, by importance", "Q4_K_M", "imatrix"),
)
BY_NAME = {method.name: method for method in METHODS}


def chosen(names: str | Sequence[str]) -> list[Method]:
    """Methods by their names, or "all" of them, in the order of the table.

    Raises:
      RequestError: a name is unknown.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    if wanted == [ALL]:
        return list(METHODS)
    for name in wanted:
        if name not in BY_NAME:
            raise RequestError(
                f"method {name!r:.80} is unknown{nearest(name, BY_NAME)}; known are "
                f"{', '.join(BY_NAME)}, and {ALL} of them."
            )
    return [method for method in METHODS if method.name in wanted]


def _group_size(params: Params) -> int:
    inside = (leaf for name, leaf in layers.flat(params.tree).items() if ".layers." in name)
    inputs = {leaf.shape[-1] for leaf in inside if isinstance(leaf, QArray)}
    return next((size for size in GROUPS if not any(n % size for n in inputs)), GROUPS[-1])
