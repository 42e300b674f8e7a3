"""experts_int8: the experts of a full-precision checkpoint in 8 bits, rounded as they are read.

One scale for each output, absmax / 127, as vLLM's method of this name; all else stays plain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from qjax.formats import online, weights
from qjax.formats.base import (
    PLAIN,
    Checkpoint,
    Keys,
    Layer,
    QuantizationConfig,
    Stored,
    expect,
)
from qjax.qarray import QArray
from qjax.registry import register_quantization_config


@register_quantization_config("experts_int8")
@dataclass(frozen=True)
class ExpertsInt8(QuantizationConfig):
    """It has no settings."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], checkpoint: Checkpoint) -> Self:
        keys = Keys(config, checkpoint.file)
        keys.ignore("quant_method")
        keys.done()
        return cls()

    def layer(self, module: str, stored: Stored, shape: tuple[int, ...]) -> Layer | None:
        if ".experts." not in module or "shared_expert" in module:
            return None
        expect(module, stored, "weight", PLAIN, shape)
        return Layer(("weight",), lambda arrays: online.by_rows(arrays["weight"], per_channel))


def per_channel(dense: np.ndarray) -> QArray:
    """A plain weight [..., N, K] in int8 with a scale for each output."""
    values = np.asarray(dense, np.float32)
    largest = np.abs(values).max(-1, keepdims=True)
    scale = np.where(largest > 0, largest / np.float32(127), np.float32(1))
    codes = np.rint(values / scale).astype(np.int8)
    return weights.coded(codes, "int8", values.shape, scale, (1, values.shape[-1]))
