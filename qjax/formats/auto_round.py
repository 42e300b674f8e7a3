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
from qjax.formats import awq, gptq, weights
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
from qjax.formats.history import AUTO_ROUND
from qjax.qarray import QArray
from qjax.registry import register_quantization_config
from qjax.scheme import QuantizationArgs, QuantizationScheme

# Keys that say how a model was quantized, not how it is stored.
_HISTORY = (
    *AUTO_ROUND,
    *("quant_method", "backend", "version", "export_format", "modules_to_not_convert", "fmt"),
    "quant_lm_head",
)
# The same, of one layer's settings.
_LAYER_HISTORY = (
    "super_bits",
    "super_group_size",
    "act_group_size",
    "scale_dtype",
    "fixed_by_user",
)
_ALIASES = {
    "auto": "auto_round:auto_gptq",
    "auto_round:gptq": "auto_round:auto_gptq",
    "auto_round:awq": "auto_round:auto_awq",
}
_PACKINGS = (
    *("auto_round:auto_gptq", "auto_round:auto_awq", "auto_round", "auto_round:gptqmodel"),
    *("auto_round:fp8", "auto_round:fp8_static", "auto_round:llm_compressor"),
    *_ALIASES,
)
_DEFAULTS = {
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "data_type": "int",
    "act_bits": 16,
    "act_data_type": "",
    "act_dynamic": True,
    "act_sym": True,
}


@register_quantization_config("auto-round", "inc", "intel")
@dataclass(frozen=True)
class AutoRound(QuantizationConfig):
    """Settings of one checkpoint.

    Attributes:
      packing: the value of `packing_format`.
      settings: bits, group_size and so on of layers that `layers` does not name.
      layers: what differs, by name or pattern of layers.
      inner: the format that reads the layers, for fp8.
      values: the configuration as it was read, from `file`.
    """

    packing: str
    settings: Mapping[str, Any]
    layers: Mapping[str, Mapping[str, Any]]
    inner: QuantizationConfig | None
    values: Mapping[str, Any]
    file: str

    @classmethod
    def from_config(cls, config: Mapping[str, Any], checkpoint: Checkpoint) -> Self:
        keys = Keys(config, checkpoint.file)
        keys.ignore(*_HISTORY)
        packing = keys.choice("packing_format", _PACKINGS, "auto_round:auto_gptq")
        packing = str(_ALIASES.get(packing, packing))
        settings = _settings(keys)
        block = keys.get("weight_block_size", list)
        keys.choice("activation_scheme", ("static", "dynamic"), "dynamic")
        extra = keys.section("extra_config")
        layers = {name: _settings(extra.section(name), done=True) for name in extra.values}
        keys.done()
        settings = {**_DEFAULTS, **settings}
        for each in (settings, *({**settings, **own} for own in layers.values())):
            if each["bits"] < 16:
                _check(packing, each, checkpoint.file)
        inner: QuantizationConfig | None = None
        if packing.startswith("auto_round:fp8") or _is_plain_fp8(packing, settings):
            static = packing.endswith("static") or not settings["act_dynamic"]
            scheme = config.get("activation_scheme", "static" if static else "dynamic")
            wanted = {"activation_scheme": scheme, "weight_block_size": block or _block(settings)}
            inner = Fp8.from_config(wanted, checkpoint)
        return cls(packing, settings, layers, inner, config, checkpoint.file)

    def _of(self, module: str) -> Mapping[str, Any]:
        """The settings of one layer: by its name, else by the first pattern that matches."""
        found = self.layers.get(module)
        if found is None:
            found = next((v for name, v in self.layers.items() if _matches(name, module)), {})
        return {**self.settings, **found}

    def _inner(self, module: str) -> QuantizationConfig | None:
        """The format that reads a layer, for packings that are formats of their own."""
        if self.packing != "auto_round:llm_compressor":
            return self.inner
        return _compressed_tensors(self._of(module), self.file)

    def layer(self, module: str, stored: Stored, shape: tuple[int, ...]) -> Layer | None:
        weight = stored.get("weight")
        if weight is not None and weight.qtype in PLAIN:
            return None
        inner = self._inner(module)
        if inner is not None:
            layer = inner.layer(module, stored, shape)
            if layer is None:
                return None
            own = self._of(module)
            if _is_plain_fp8(self.packing, own):
                return replace(layer, decode=_without_act(layer.decode))
            scale = "e8m0_ceil" if _act_kind(own).endswith("_rceil") else "e8m0"
            return replace(layer, decode=_with_mx_scales(layer.decode, scale))
        if "qweight" not in stored:
            return None
        settings = self._of(module)
        bits, size = settings["bits"], settings["group_size"]
        if bits >= 16:
            raise fault(stored["qweight"], "is quantized, but extra_config says 16 bits")
        interleaved = self.packing == "auto_round:auto_awq"
        if bits not in (range(4, 8) if interleaved else range(2, 9)) or not isinstance(size, int):
            raise UnsupportedError(
                f"{stored['qweight'].file}, {module}: {bits} bits in groups of {size} are not "
                f"supported in {self.packing}"
            )
        if interleaved:
            return awq.gemm(module, stored, shape, size, settings["sym"], bits)
        return gptq.layer(module, stored, shape, _gptq(settings, self.packing))

    def to_config(self) -> dict[str, Any]:
        return dict(self.values)

    def encode(self, module: str, weight: QArray) -> dict[str, np.ndarray]:
        inner = self._inner(module)
        if inner is not None:
            return inner.encode(module, weight)
        settings = self._of(module)
        if self.packing == "auto_round:auto_awq":
            inner = awq.AWQ(settings["group_size"], "gemm", (), {}, bits=settings["bits"])
            return inner.encode(module, weight)
        tensors = gptq.encode(module, weight, _gptq(settings, self.packing))
        if "perm" not in weight.aux:
            del tensors["g_idx"]
        return tensors


def _settings(keys: Keys, done: bool = False) -> dict[str, Any]:
    """The settings that are given, of the model or of a layer (`done`: and nothing else is)."""
    found = {}
    for name, default in _DEFAULTS.items():
        kinds = (int, list) if name == "group_size" else type(default)
        value = keys.get(name, kinds)
        if value is not None:
            found[name] = value
    keys.ignore(*_LAYER_HISTORY)
    if done:
        keys.done()
    size = found.get("group_size", -1)
    if isinstance(size, int) and found.get("data_type", "int") == "int":
        weights.require_group_size(keys, size)
    return found


def _check(packing: str, settings: Mapping[str, Any], file: str) -> None:
    """Raises UnsupportedError where a packing has no layout for the settings of a layer."""
    if packing == "auto_round:llm_compressor":
        _compressed_tensors(settings, file)
    elif not (packing.startswith("auto_round:fp8") or _is_plain_fp8(packing, settings)) and (
        settings["data_type"] != "int" or settings["act_bits"] < 16
    ):
        raise UnsupportedError(
            f"{file}: packing_format {packing!r} with {dict(settings)} is not supported; integers "
            "without activation quantization are"
        )


def _block(settings: Mapping[str, Any]) -> list[int] | None:
    """Blocks of weights may be given as a group size of two numbers."""
    size = settings["group_size"]
    return size if isinstance(size, list) else None


def _is_plain_fp8(packing: str, settings: Mapping[str, Any]) -> bool:
    """8-bit floats whose inputs stay as they are; the packing that is told then means nothing."""
    return (
        not packing.startswith("auto_round:fp8")
        and (settings["data_type"], settings["bits"]) == ("fp", 8)
        and settings["act_bits"] >= 16
    )


def _without_act(decode: Callable[[Arrays], QArray]) -> Callable[[Arrays], QArray]:
    return lambda arrays: replace(decode(arrays), act=None)


def _act_kind(settings: Mapping[str, Any]) -> str:
    """The numeric type of activations, by default that of weights."""
    return str(settings["act_data_type"] or settings["data_type"])


def _with_mx_scales(decode: Callable[[Arrays], QArray], scale: str) -> Callable[[Arrays], QArray]:
    """AutoRound makes MX scales of activations as OCP MX says, without rounding absmax first; or
    ("rceil") rounds them up.
    """

    def decode_with(arrays: Arrays) -> QArray:
        weight = decode(arrays)
        if weight.act is None or weight.act.scale != "e8m0_even4":
            return weight
        return replace(weight, act=replace(weight.act, scale=scale))

    return decode_with


def _gptq(settings: Mapping[str, Any], packing: str) -> gptq.Settings:
    """Of a layer in GPTQ's layout, whose first version stores zero points less 1."""
    offset = 1 if packing == "auto_round:auto_gptq" else 0
    asymmetric = not settings["sym"]
    return gptq.Settings(settings["bits"], settings["group_size"], offset, asymmetric=asymmetric)


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.fullmatch(pattern, module) is not None or re.search(pattern, module) is not None
    except re.error:
        return pattern in module


def _compressed_tensors(settings: Mapping[str, Any], file: str) -> CompressedTensors:
    """The scheme that the exports for LLM Compressor mean."""
    kinds = {"mx_fp": ("group", 32, "torch.uint8"), "nv_fp": ("tensor_group", 16, None)}
    kind = settings["data_type"]

    def args(kind: str, bits: int, dynamic: bool | str) -> QuantizationArgs:
        strategy, size, scale_dtype = next(
            (value for name, value in kinds.items() if kind.startswith(name)), ("", 0, None)
        )
        if not strategy or bits not in (4, 8) or kind.endswith("_v2"):
            raise UnsupportedError(
                f"{file}: data_type {kind!r:.80} of {bits} bits is not supported here; mx_fp and "
                "nv_fp of 4 and 8 bits are"
            )
        return QuantizationArgs(
            bits, "float", True, strategy, size, dynamic=dynamic, scale_dtype=scale_dtype
        )

    weight = args(kind, settings["bits"], False)
    act = None
    if settings["act_bits"] < 16:
        local = "local" if weight.strategy == "tensor_group" else True
        act = args(_act_kind(settings), settings["act_bits"], local)
    return CompressedTensors((QuantizationScheme(("Linear",), weight, act),), (), (), {})
