"""AutoRound (Intel Neural Compressor): its packings are those of other formats.

Which of them, `packing_format` says; bits, group size and type may differ from layer to layer
(`extra_config`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from qjax.errors import UnsupportedError
from qjax.formats import awq, gptq
from qjax.formats.base import (
    PLAIN,
    Arrays,
    Checkpoint,
    Keys,
    Layer,
    QuantizationConfig,
    Stored,
    fault,
)
from qjax.formats.compressed_tensors import CompressedTensors
from qjax.formats.fp8 import Fp8
from qjax.qarray import QArray
from qjax.registry import register_quantization_config
from qjax.scheme import QuantizationArgs, QuantizationScheme

_HISTORY = (
    *("quant_method", "autoround_version", "iters", "block_name_to_quantize", "provider"),
    *("to_quant_block_names", "backend", "nsamples", "seqlen", "low_gpu_mem_usage", "version"),
    *("enable_quanted_input", "enable_minmax_tuning", "lr", "minmax_lr", "dataset", "batch_size"),
    *(
        "gradient_accumulate_steps",
        "super_bits",
        "super_group_size",
        "act_group_size",
        "scale_dtype",
    ),
    *("export_format", "static_kv_dtype", "static_attention_dtype", "modules_to_not_convert"),
    *(
        "fmt",
        "weight_block_size",
        "supported_types",
        "quant_lm_head",
        "amp",
        "enable_norm_bias_tuning",
    ),
)
_PACKINGS = (
    *("auto_round:auto_gptq", "auto_round:auto_awq", "auto_round", "auto_round:gptqmodel"),
    *("auto_round:fp8", "auto_round:fp8_static", "auto_round:llm_compressor"),
)


@register_quantization_config("auto-round", "inc", "intel")
@dataclass(frozen=True)
class AutoRound(QuantizationConfig):
    """Settings of one checkpoint.

    Attributes:
      packing: the value of `packing_format`.
      settings: bits, group_size and so on of layers that `layers` does not name.
      layers: (name or pattern, what differs).
      inner: the format that reads the layers of packings that are formats of their own.
      values: the configuration as it was read.
    """

    packing: str
    settings: Mapping[str, Any]
    layers: tuple[tuple[str, Mapping[str, Any]], ...]
    inner: QuantizationConfig | None
    values: Mapping[str, Any]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], checkpoint: Checkpoint) -> Self:
        keys = Keys(config, checkpoint.file)
        keys.ignore(*_HISTORY)
        packing = keys.choice("packing_format", _PACKINGS, "auto_round:auto_gptq")
        settings = {
            "bits": keys.get("bits", int, 4),
            "group_size": keys.get("group_size", int, 128),
            "sym": keys.get("sym", bool, True),
            "data_type": keys.get("data_type", str, "int"),
            "act_bits": keys.get("act_bits", int, 16),
            "act_data_type": keys.get("act_data_type", str, ""),
            "act_dynamic": keys.get("act_dynamic", bool, True),
            "act_sym": keys.get("act_sym", bool, True),
        }
        keys.choice("activation_scheme", ("static", "dynamic"), "dynamic")
        extra = keys.section("extra_config")
        layers = tuple((name, extra.get(name, dict, {})) for name in extra.values)
        keys.done()
        inner: QuantizationConfig | None = None
        if packing == "auto_round:llm_compressor":
            inner = _compressed_tensors(settings, checkpoint.file, config)
        elif packing.startswith("auto_round:fp8"):
            wanted = {
                k: config[k] for k in ("activation_scheme", "weight_block_size") if k in config
            }
            static = packing.endswith("static") or not settings["act_dynamic"]
            scheme = "static" if static else "dynamic"
            inner = Fp8.from_config({"activation_scheme": scheme, **wanted}, checkpoint)
        elif settings["data_type"] != "int" or settings["act_bits"] < 16:
            raise UnsupportedError(
                f"{checkpoint.file}: packing_format {packing!r} with {settings} is not supported; "
                "integers without activation quantization are"
            )
        return cls(packing, settings, layers, inner, config)

    def _of(self, module: str) -> Mapping[str, Any]:
        """The settings of one layer: by its name, else by the first pattern that matches."""
        found = dict(self.layers).get(module)
        if found is None:
            found = next((v for name, v in self.layers if _matches(name, module)), {})
        return {**self.settings, **found}

    def layer(self, module: str, stored: Stored, shape: tuple[int, ...]) -> Layer | None:
        if self.inner is not None:
            weight = stored.get("weight")
            if weight is not None and weight.qtype in PLAIN:
                return None
            layer = self.inner.layer(module, stored, shape)
            return layer if layer is None else replace(layer, decode=_floor_scales(layer.decode))
        if "qweight" not in stored:
            return None
        settings = self._of(module)
        bits, size = settings["bits"], settings["group_size"]
        if bits >= 16:
            raise fault(stored["qweight"], "is quantized, but extra_config says 16 bits")
        if self.packing == "auto_round:auto_awq":
            if bits != 4:
                raise UnsupportedError(f"{module}: AWQ's packing of {bits} bits is not supported")
            return awq.gemm(module, stored, shape, size)
        offset = 1 if self.packing == "auto_round:auto_gptq" else 0
        return gptq.layer(module, stored, shape, gptq.Settings(bits, size, offset))

    def to_config(self) -> dict[str, Any]:
        return dict(self.values)

    def encode(self, module: str, weight: QArray) -> dict[str, np.ndarray]:
        if self.inner is not None:
            return self.inner.encode(module, weight)
        settings = self._of(module)
        if self.packing == "auto_round:auto_awq":
            return awq.AWQ(settings["group_size"], "gemm", (), {}).encode(module, weight)
        offset = 1 if self.packing == "auto_round:auto_gptq" else 0
        inner = gptq.Settings(settings["bits"], settings["group_size"], offset)
        tensors = gptq.encode(module, weight, inner)
        if "perm" not in weight.aux:
            del tensors["g_idx"]
        return tensors


def _floor_scales(decode: Callable[[Arrays], QArray]) -> Callable[[Arrays], QArray]:
    """AutoRound makes MX scales of activations as OCP MX says, without rounding absmax first."""

    def decode_with(arrays: Arrays) -> QArray:
        weight = decode(arrays)
        if weight.act is None or weight.act.scale != "e8m0_even4":
            return weight
        return replace(weight, act=replace(weight.act, scale="e8m0"))

    return decode_with


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.fullmatch(pattern, module) is not None or re.search(pattern, module) is not None
    except re.error:
        return pattern in module


def _compressed_tensors(
    settings: Mapping[str, Any], file: str, values: Mapping[str, Any]
) -> CompressedTensors:
    """The scheme that the exports for LLM Compressor mean."""
    kinds = {"mx_fp": ("group", 32, "torch.uint8"), "nv_fp": ("tensor_group", 16, None)}
    kind = settings["data_type"]

    def args(kind: str, bits: int, dynamic: bool | str) -> QuantizationArgs:
        strategy, size, scale_dtype = next(
            (value for name, value in kinds.items() if kind.startswith(name)), ("", 0, None)
        )
        if not strategy:
            raise UnsupportedError(f"{file}: data_type {kind!r:.80} is not supported here")
        return QuantizationArgs(
            bits, "float", True, strategy, size, dynamic=dynamic, scale_dtype=scale_dtype
        )

    weight = args(kind, settings["bits"], False)
    act = None
    if settings["act_bits"] < 16:
        local = "local" if weight.strategy == "tensor_group" else True
        act = args(settings["act_data_type"] or kind, settings["act_bits"], local)
    return CompressedTensors((QuantizationScheme(("Linear",), weight, act),), (), (), values)
