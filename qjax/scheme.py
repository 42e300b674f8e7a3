"""Quantization schemes in the words of compressed-tensors, which vLLM and LLM Compressor speak.

A scheme says how the weights and activations of some layers are quantized; targets say which
layers: a full module name, "re:" and a regular expression that matches from the start of the name,
or the class of the layer ("Linear").
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from qjax.errors import CheckpointError

STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")


@dataclass(frozen=True)
class QuantizationArgs:
    """How one tensor is quantized.

    Attributes:
      num_bits, type: "int" or "float" with so many bits.
      strategy: what shares a scale, one of `STRATEGIES`.
      group_size: columns of a group, where the strategy has groups.
      block_structure: rows and columns of a block.
      dynamic: whether scales are made from the values at hand; "local": those of groups only.
      actorder: "group" where the columns of groups are not neighbours (weight_g_idx tells).
      scale_dtype: as torch names it ("torch.uint8" are powers of two), or None.
    """

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str = "tensor"
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None
    dynamic: bool | str = False
    actorder: str | None = None
    scale_dtype: str | None = None


@dataclass(frozen=True)
class QuantizationScheme:
    """What happens to the layers that `targets` name; None is left in full precision.

    Attributes:
      format: how they are stored, where it is told for these layers.
    """

    targets: tuple[str, ...]
    weights: QuantizationArgs | None = None
    input_activations: QuantizationArgs | None = None
    format: str | None = None


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
