"""MXFP4 as gpt-oss stores its experts: blocks of 32 fp4 codes, with a power of two for each.

A weight [experts, N, K] lies as `blocks` uint8 [experts, N, K / 32, 16], the first of two codes in
the low half of a byte, and `scales` uint8 [experts, N, K / 32], the exponents of two plus 127 (OCP
Microscaling Formats 1.0, section 5). Every other layer is plain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import ml_dtypes
import numpy as np

from qjax.errors import UnsupportedError
from qjax.formats import weights
from qjax.formats.base import (
    Arrays,
    Checkpoint,
    Keys,
    Layer,
    QuantizationConfig,
    Stored,
    expect,
)
from qjax.qarray import QArray
from qjax.registry import register_quantization_config

_BLOCK = 32


@register_quantization_config("mxfp4", "gpt_oss_mxfp4")
@dataclass(frozen=True)
class MXFP4(QuantizationConfig):
    """Which layers are quantized is seen from their tensors.

    Attributes:
      values: the configuration as it was read.
    """

    values: Mapping[str, Any]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], checkpoint: Checkpoint) -> Self:
        keys = Keys(config, checkpoint.file)
        keys.ignore("quant_method", "modules_to_not_convert")
        keys.done()
        return cls(config)

    def layer(self, module: str, stored: Stored, shape: tuple[int, ...]) -> Layer | None:
        if "blocks" not in stored:
            return None
        record = stored["blocks"]
        *lead, k = shape
        weights.require_divisible(record, k, _BLOCK)
        expect(module, stored, "blocks", ("u8",), (*lead, k // _BLOCK, _BLOCK // 2))
        expect(module, stored, "scales", ("u8",), (*lead, k // _BLOCK))

        def decode(arrays: Arrays) -> QArray:
            codes = arrays["blocks"].reshape(*lead, k // 2)
            scale = arrays["scales"].view(ml_dtypes.float8_e8m0fnu)
            return weights.coded(codes, "fp4_e2m1", shape, scale, (1, _BLOCK))

        return Layer(("blocks", "scales"), decode)

    def encode(self, module: str, weight: QArray) -> dict[str, np.ndarray]:
        scale = weight.scale
        kept = (weight.qtype, weight.group, weight.act, tuple(weight.aux), weight.additive)
        e8m0 = scale is not None and scale.dtype == ml_dtypes.float8_e8m0fnu
        if kept != ("fp4_e2m1", (1, _BLOCK), None, (), False) or not e8m0:
            raise UnsupportedError(f"{module}: mxfp4 has no layout for {weight.qtype} weights")
        codes = np.asarray(weight.qvalue)
        blocks = codes.reshape(*codes.shape[:-1], -1, _BLOCK // 2)
        return {"blocks": blocks, "scales": np.asarray(scale).view(np.uint8)}

    def to_config(self) -> dict[str, Any]:
        return dict(self.values)
