"""AMD Quark: FP8, INT8, 2 to 4-bit integers and MX / NV small floats.

A configuration names, for each tensor of a layer (weight, input_tensors, output_tensors), a numeric
type and what shares a scale; patterns may set other ones for some layers. How tensors lie is
in `quark_layouts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Self

import numpy as np

from qjax.errors import UnsupportedError
from qjax.formats import quark_layouts, weights
from qjax.formats.base import (
    PLAIN,
    Arrays,
    Checkpoint,
    Keys,
    Layer,
    QuantizationConfig,
    Stored,
    expect,
    fault,
)
from qjax.formats.quark_layouts import FLOATS, Shape, TensorConfig, present
from qjax.qarray import ActSpec, QArray
from qjax.registry import register_quantization_config
from qjax.scheme import expression

# Of eight values in a word, the place of each: AWQ's order ("reorder") or the natural one.
_PACK_ORDERS = {"reorder": (0, 4, 1, 5, 2, 6, 3, 7), "order": tuple(range(8))}
_INPUTS = {
    "input_scale": "act_scale",
    "input_zero_point": "act_zero_point",
    "input_scale_2": "act_global_scale",
}


@dataclass(frozen=True)
class LayerConfig:
    """The tensors of a layer: usually one config each, two where scales are quantized again."""

    weight: tuple[TensorConfig, ...]
    inputs: tuple[TensorConfig, ...]

    @classmethod
    def read(cls, keys: Keys) -> LayerConfig:
        keys.ignore("bias", "output_tensors", "target_device")
        found = cls(_tensors(keys, "weight"), _tensors(keys, "input_tensors"))
        keys.done()
        return found


def _tensors(keys: Keys, name: str) -> tuple[TensorConfig, ...]:
    value = keys.get(name, (dict, list))
    entries = value if isinstance(value, list) else [] if value is None else [value]
    found = []
    for entry in entries:
        if not isinstance(entry, Mapping):
            raise keys.error(name, f"{entry!r:.80} is not a mapping")
        found.append(TensorConfig.read(Keys(entry, keys.file, f"{keys.prefix}{name}.")))
    return tuple(found)


@register_quantization_config("quark")
@dataclass(frozen=True)
class Quark(QuantizationConfig):
    """Settings of one checkpoint.

    Attributes:
      everywhere: the config of layers that no pattern names.
      layers: (pattern, config) pairs; the first that matches wins.
      excluded: patterns of modules that are not quantized.
      pack_method: order of values in a word, "order" or "reorder".
      kv_cache: the type that keys and values are rounded to, or None.
    """

    everywhere: LayerConfig
    layers: tuple[tuple[str, LayerConfig], ...]
    excluded: tuple[str, ...]
    pack_method: str
    values: Mapping[str, Any]
    kv_cache: str | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], checkpoint: Checkpoint) -> Self:
        keys = Keys(config, checkpoint.file)
        keys.ignore("quant_method", "quant_mode", "version", "algo_config", "softmax_quant_spec")
        keys.ignore("kv_cache_post_rope", "log_severity_level")
        export = keys.section("export")
        export.ignore("kv_cache_group", "min_kv_scale", "weight_merge_groups")
        export.choice("weight_format", ("real_quantized",), "real_quantized")
        method = export.choice("pack_method", tuple(_PACK_ORDERS), "reorder")
        export.done()
        layers = []
        for name in ("layer_quant_config", "layer_type_quant_config"):
            section = keys.section(name)
            for pattern in section.values:
                inner = section.section(pattern)
                # Types are those of torch's modules: all weights here are of linear layers.
                if name == "layer_type_quant_config" and "Linear" not in pattern:
                    raise UnsupportedError(
                        f"{checkpoint.file}: {name} {pattern!r:.80} is not supported, Linear is"
                    )
                wanted = "*" if name == "layer_type_quant_config" else pattern
                layers.append((wanted, LayerConfig.read(inner)))
        everywhere = LayerConfig.read(keys.section("global_quant_config"))
        excluded = tuple(map(str, keys.get("exclude", list, [])))
        cached = keys.section("kv_cache_quant_config")
        outputs = [_tensors(cached.section(name), "output_tensors") for name in cached.values]
        kinds = {each.dtype for found in outputs for each in found}
        keys.done()
        kv_cache = " and ".join(sorted(kinds)) or None
        return cls(everywhere, tuple(layers), excluded, method, config, kv_cache)

    def _config(self, module: str) -> LayerConfig:
        for pattern, found in self.layers:
            if fnmatchcase(module, pattern):
                return found
        return self.everywhere

    def layer(self, module: str, stored: Stored, shape: Shape) -> Layer | None:
        record = expect(module, stored, "weight")
        excluded = any(_excludes(pattern, module) for pattern in self.excluded)
        if record.qtype in PLAIN:
            return None
        config = self._config(module)
        if excluded or not config.weight:
            raise fault(record, f"has dtype {record.qtype}, but the config excludes this module")
        weight = config.weight[0]
        if weight.dtype == "fp8_e4m3" and [each.dtype for each in config.weight[1:]] == ["int4"]:
            order = _PACK_ORDERS[self.pack_method]
            layer = quark_layouts.int4_of_fp8(module, stored, shape, config.weight[1], order)
        elif weight.dtype in ("int4", "uint4", "int3", "int2", "uint2"):
            layer = quark_layouts.integers(
                module, stored, shape, weight, _PACK_ORDERS[self.pack_method]
            )
        elif weight.dtype in ("int8", "uint8"):
            layer = quark_layouts.in_bytes(module, stored, shape, weight)
        elif len(config.weight) == 2:
            layer = quark_layouts.nvfp4(module, stored, shape, weight)
        elif weight.scale_format == "e8m0":
            layer = quark_layouts.mx(module, stored, shape, weight)
        elif weight.dtype in weights.FP8_QTYPES.values():
            layer = quark_layouts.fp8(module, stored, shape, weight)
        else:
            raise UnsupportedError(f"{record.file}, {module}: {weight} is not supported")
        return _with_inputs(module, stored, layer, config.inputs, shape[:-2])

    def to_config(self) -> dict[str, Any]:
        return dict(self.values)

    @property
    def quantizes_weights(self) -> bool:
        return any(each.weight for each in (self.everywhere, *(found for _, found in self.layers)))

    @property
    def cache(self) -> str | None:
        """The type that outputs of the layers that make keys and values are rounded to."""
        return self.kv_cache

    def encode(self, module: str, weight: QArray) -> dict[str, np.ndarray]:
        config = self._config(module)
        if not config.weight or any(_excludes(pattern, module) for pattern in self.excluded):
            raise UnsupportedError(f"{module}: the config leaves it alone, but it is quantized")
        order = _PACK_ORDERS[self.pack_method]
        tensors = quark_layouts.encode(module, weight, config.weight[0], order)
        for suffix, key in _INPUTS.items():
            if key in weight.aux:
                value = np.asarray(weight.aux[key]).reshape(weight.qvalue.shape[:-2])
                zero = suffix == "input_zero_point"
                tensors[suffix] = value.astype(config.inputs[0].dtype) if zero else value
        return tensors


def _excludes(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return expression(pattern).fullmatch(module) is not None
    return fnmatchcase(module, pattern)


def _with_inputs(
    module: str, stored: Stored, layer: Layer, configs: tuple[TensorConfig, ...], lead: Shape
) -> Layer:
    """The layer with what its inputs are rounded to."""
    if not configs or configs[0].dtype in ("bfloat16", "float16", "float32"):
        return layer
    act, reads = _act(module, configs), []
    static = not act.dynamic
    if static:
        expect(module, stored, "input_scale", PLAIN, tuple(lead), (*lead, 1))
        reads = ["input_scale", *present(stored, "input_zero_point")]
    if len(configs) == 2:
        expect(module, stored, "input_scale_2", PLAIN, tuple(lead), (*lead, 1))
        reads = ["input_scale_2"]

    def decode(arrays: Arrays) -> QArray:
        weight = layer.decode(arrays)
        aux = dict(weight.aux)
        if len(configs) == 2:
            aux["act_global_scale"] = weights.scalar(arrays["input_scale_2"], lead)
        elif static:
            aux["act_scale"] = weights.scalar(arrays["input_scale"], lead)
            zero = arrays.get("input_zero_point")
            if zero is not None and zero.any():
                aux["act_zero_point"] = weights.scalar(zero, lead)
        return replace(weight, act=act, aux=aux)

    return Layer((*layer.reads, *reads), decode, layer.ignores)


def _act(module: str, configs: tuple[TensorConfig, ...]) -> ActSpec:
    first = configs[0]
    dtype = FLOATS.get(first.dtype, first.dtype)
    if dtype not in (*FLOATS.values(), "int8", "int4"):
        raise UnsupportedError(f"{module}: inputs of type {first.dtype} are not supported")
    if len(configs) == 2:
        return ActSpec(dtype, "group", True, group_size=first.group_size, scale="fp8_e4m3")
    if first.qscheme == "per_group":
        # "even" of Quark's scale_calculation_mode: absmax is rounded before its exponent is taken.
        scale = "e8m0_even" if first.scale_format == "e8m0" else "float32"
        return ActSpec(dtype, "group", True, group_size=first.group_size, scale=scale)
    if first.qscheme in ("per_channel", "per_token"):
        return ActSpec(dtype, "token", True, symmetric=first.symmetric)
    return ActSpec(dtype, "tensor", first.is_dynamic, symmetric=first.symmetric)
