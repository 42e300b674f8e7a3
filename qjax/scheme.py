"""Quantization schemes in the words of compressed-tensors, which vLLM and LLM Compressor speak.

A scheme says how the weights and activations of some layers are quantized; targets say which
layers: a full module name, "re:" and a regular expression that matches from the start of the name,
or the class of the layer ("Linear").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qjax.errors import CheckpointError

STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
OBSERVERS = (
    *("minmax", "static_minmax", "memoryless_minmax", "mse", "memoryless_mse", "imatrix_mse"),
    *("nvfp4_expanded_mse", "nvfp4_expanded_imatrix"),
)


@dataclass(frozen=True)
class QuantizationArgs:
    """How one tensor is quantized.

    Attributes:
      num_bits, type: "int" or "float" with so many bits.
      strategy: what shares a scale, one of `STRATEGIES`; where it is left out, "group" with a group
        size, "channel" with a group size of -1, else "tensor".
      group_size: columns of a group, where the strategy has groups.
      block_structure: rows and columns of a block.
      dynamic: whether scales are made from the values at hand; "local": those of groups only.
      actorder: the order in which GPTQ takes columns: "weight" (alias "static") by their inputs,
        "group" (alias "dynamic") so that groups are not neighbours, either (weight_g_idx tells).
      scale_dtype: as torch names it ("torch.uint8" are powers of two), or None.
      observer: how the range of values is found, one of `OBSERVERS`, or None for the usual way.
      observer_kwargs: its settings in LLM Compressor, as pairs or a dict; searches here have none.
    """

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str = ""
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None
    dynamic: bool | str = False
    actorder: str | None = None
    scale_dtype: str | None = None
    observer: str | None = None
    observer_kwargs: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        size, order, dtype = self.group_size, self.actorder, self.scale_dtype
        usual = "tensor" if size is None else "channel" if size == -1 else "group"
        orders = {"static": "weight", "dynamic": "group", True: "group", False: None}
        kwargs = self.observer_kwargs
        normal = {
            "strategy": self.strategy or usual,
            "group_size": None if size == -1 else size,
            "actorder": orders.get(order, order),
            "scale_dtype": dtype and f"torch.{dtype.removeprefix('torch.')}",
            "observer_kwargs": tuple(kwargs.items() if isinstance(kwargs, Mapping) else kwargs),
        }
        if self.block_structure is not None:
            normal["block_structure"] = tuple(self.block_structure)
        for name, value in normal.items():
            object.__setattr__(self, name, value)

    def contradiction(self, inputs: bool = False) -> str | None:
        """What is wrong with these settings of weights, or of inputs; None where nothing is.

        The rules are those of compressed-tensors, where a runtime of it would refuse.
        """
        grouped = self.strategy in ("group", "tensor_group")
        size = self.group_size
        if self.strategy not in STRATEGIES:
            return f"strategy {self.strategy!r} is none of {', '.join(STRATEGIES)}"
        if grouped and (size is None or size < 1):
            return f"strategy {self.strategy!r} needs a group_size above 0, got {size}"
        if size is not None and not grouped:
            return f"group_size {size} needs strategy 'group', got {self.strategy!r}"
        if (self.strategy == "block") != (self.block_structure is not None):
            return "strategy 'block' and block_structure need each other"
        if self.strategy == "token" and self.dynamic is not True:
            return "strategy 'token' needs dynamic: true"
        if self.dynamic == "local" and self.strategy != "tensor_group":
            return "dynamic 'local' needs strategy 'tensor_group'"
        if self.observer is not None and self.observer not in OBSERVERS:
            return f"observer {self.observer!r} is none of {', '.join(OBSERVERS)}"
        if not inputs:
            if self.dynamic:
                return "weights cannot be dynamic"
            return f"weights have no {self.strategy}s" if self.strategy == "token" else None
        if self.strategy in ("channel", "block", "attn_head"):
            return f"inputs cannot have strategy {self.strategy!r}"
        return None if self.actorder is None else "inputs have no actorder"


@dataclass(frozen=True)
class QuantizationScheme:
    """What happens to the layers that `targets` name; None is left in full precision.

    Attributes:
      format: how they are stored, where it is told for these layers.
      ggml: name of a GGUF type ("Q4_K") or mix of types ("Q4_K_M") instead of `weights`.
    """

    targets: tuple[str, ...]
    weights: QuantizationArgs | None = None
    input_activations: QuantizationArgs | None = None
    format: str | None = None
    ggml: str | None = None


def expression(target: str) -> re.Pattern[str]:
    """The regular expression of "re:..."; CheckpointError where it is none."""
    try:
        return re.compile(target.removeprefix("re:"))
    except re.error as error:
        raise CheckpointError(
            f"{target!r:.80} in the quantization config is no regular expression: {error}"
        ) from error


def matches(module: str, target: str, layer_class: str = "Linear") -> int:
    """How well a target names a module: 0 not at all, then by class, by pattern, by name."""
    if target.startswith("re:"):
        return 2 if expression(target).match(module) else 0
    if target == module:
        return 3
    return 1 if target == layer_class else 0


def is_ignored(module: str, ignore: Iterable[str], layer_class: str = "Linear") -> bool:
    """Whether an ignore list names a module."""
    return any(matches(module, target, layer_class) for target in ignore)


def scheme_for(
    module: str, schemes: Iterable[QuantizationScheme], layer_class: str = "Linear"
) -> QuantizationScheme | None:
    """The scheme whose targets name a module best; of equals, the first."""
    best, found = 0, None
    for scheme in schemes:
        rank = max((matches(module, target, layer_class) for target in scheme.targets), default=0)
        if rank > best:
            best, found = rank, scheme
    return found


def targets_of(modules: Iterable[str], others: Iterable[str]) -> list[str]:
    """Targets that name some modules, and none of the others.

    A kind of layer ("self_attn.q_proj", in whatever layer and expert) becomes one pattern where no
    other module is of it; else each module is named.
    """
    foreign = {_kind(module) for module in others}
    found: dict[str, None] = {}
    for module in modules:
        kind = _kind(module)
        pattern = re.escape(kind).replace("NUMBER", r"\d+")
        alone = kind != module and kind not in foreign
        found[f"re:.*\\b{pattern}$" if alone else module] = None
    return list(found)


def _kind(module: str) -> str:
    """What a module is called in every layer, with NUMBER for that of an expert."""
    inside = re.sub(r"^(.*\.)?layers\.\d+\.", "", module)
    return re.sub(r"(?<=\.)\d+(?=\.)", "NUMBER", inside)
