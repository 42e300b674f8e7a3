"""AMD Quark: FP8, INT8, 2 to 4-bit integers and MX / NV small floats.

A configuration names, for each tensor of a layer (weight, input_tensors, output_tensors), a numeric
type and what shares a scale; patterns may set other ones for some layers. Layouts are those of
`quark.torch.export`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Self

import ml_dtypes
import numpy as np

from pallas_kernels import codes
from qjax.errors import UnsupportedError
from qjax.formats import weights
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
from qjax.qarray import ActSpec, QArray
from qjax.registry import register_quantization_config
from qjax.scheme import expression

Shape = tuple[int, ...]

# Of eight values in a word, the place of each: AWQ's order ("reorder") or the natural one.
_PACK_ORDERS = {"reorder": (0, 4, 1, 5, 2, 6, 3, 7), "order": tuple(range(8))}
_MX_TYPES = {
    "fp4": "fp4_e2m1",
    "fp6_e2m3": "fp6_e2m3",
    "fp6_e3m2": "fp6_e3m2",
    "fp8_e4m3": "fp8_e4m3",
}
_FLOATS = {"fp8_e5m2": "fp8_e5m2", **_MX_TYPES}
_DTYPES = (
    *("fp8_e4m3", "fp8_e5m2", "int8", "uint8", "int4", "uint4", "int3", "int2", "uint2"),
    *("fp4", "fp6_e2m3", "fp6_e3m2", "bfloat16", "float16", "float32"),
)
_ZEROS = ("i8", "u8", "i32", *PLAIN)
_SAYS_NOTHING = (
    *("observer_cls", "round_method", "scale_type", "zero_point_type", "max_input_numel"),
    *("enable_buffer_reuse", "is_scale_quant", "mx_element_dtype", "is_mixed_dtypes", "axis"),
    *("scale_calculation_mode", "block_axis", "percentile", "use_tensor_scale"),
)


@dataclass(frozen=True)
class TensorConfig:
    """How one tensor of a layer is quantized (QTensorConfig of Quark)."""

    dtype: str
    qscheme: str
    group_size: int | None
    block_size: tuple[int, ...] | None
    symmetric: bool
    is_dynamic: bool
    scale_format: str

    @classmethod
    def read(cls, keys: Keys) -> TensorConfig:
        keys.ignore(*_SAYS_NOTHING)
        keys.get("ch_axis", int)  # shapes of scales tell it
        block = keys.get("block_size", (list, int))
        found = cls(
            keys.choice("dtype", _DTYPES),
            keys.choice(
                "qscheme",
                ("per_tensor", "per_channel", "per_group", "per_block", "per_token"),
                "per_tensor",
            ),
            keys.get("group_size", int),
            (block, block) if isinstance(block, int) else tuple(block) if block else None,
            keys.get("symmetric", bool, True),
            keys.get("is_dynamic", bool, False),
            keys.get("scale_format", str, "float32"),
        )
        keys.done()
        return found


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
    """

    everywhere: LayerConfig
    layers: tuple[tuple[str, LayerConfig], ...]
    excluded: tuple[str, ...]
    pack_method: str
    values: Mapping[str, Any]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], checkpoint: Checkpoint) -> Self:
        keys = Keys(config, checkpoint.file)
        keys.ignore("quant_method", "quant_mode", "version", "algo_config", "softmax_quant_spec")
        keys.ignore("kv_cache_quant_config", "kv_cache_post_rope", "log_severity_level")
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
        keys.done()
        return cls(everywhere, tuple(layers), excluded, method, config)

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
        if weight.dtype in ("int4", "uint4", "int3", "int2", "uint2"):
            layer = _integers(module, stored, shape, weight, _PACK_ORDERS[self.pack_method])
        elif weight.dtype in ("int8", "uint8"):
            layer = _bytes(module, stored, shape, weight)
        elif len(config.weight) == 2:
            layer = _nvfp4(module, stored, shape, weight)
        elif weight.scale_format == "e8m0":
            layer = _mx(module, stored, shape, weight)
        elif weight.dtype in weights.FP8_QTYPES.values():
            layer = _fp8(module, stored, shape, weight)
        else:
            raise UnsupportedError(f"{record.file}, {module}: {weight} is not supported")
        return _with_inputs(module, stored, layer, config.inputs, shape[:-2])

    def to_config(self) -> dict[str, Any]:
        return dict(self.values)

    def encode(self, module: str, weight: QArray) -> dict[str, np.ndarray]:
        if weight.qtype != "fp8_e4m3" or weight.group is None or weight.zero_point is not None:
            raise UnsupportedError(f"{module}: of Quark's layouts qjax writes only those of FP8")
        n, k = weight.shape
        sizes = {(n, k): (), (1, k): (n,)}
        lead = weight.qvalue.shape[:-2]
        scale = np.asarray(weight.scale)
        tensors = {
            "weight": np.asarray(weight.qvalue).view(ml_dtypes.float8_e4m3fn),
            "weight_scale": scale.reshape((*lead, *sizes.get(weight.group, scale.shape[-2:]))),
        }
        if "act_scale" in weight.aux:
            tensors["input_scale"] = np.asarray(weight.aux["act_scale"]).reshape(lead)
        return tensors


def _excludes(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return expression(pattern).fullmatch(module) is not None
    return fnmatchcase(module, pattern)


def _fp8(module: str, stored: Stored, shape: Shape, config: TensorConfig) -> Layer:
    qtype = weights.FP8_QTYPES[expect(module, stored, "weight", tuple(weights.FP8_QTYPES)).qtype]
    expect(module, stored, "weight", tuple(weights.FP8_QTYPES), shape)
    block = config.block_size
    pair = (block[-2], block[-1]) if block else None
    group = weights.scale_group(expect(module, stored, "weight_scale", PLAIN), shape, pair)

    def decode(arrays: Arrays) -> QArray:
        return weights.coded(arrays["weight"], qtype, shape, arrays["weight_scale"], group)

    return Layer(("weight", "weight_scale"), decode)


def _bytes(module: str, stored: Stored, shape: Shape, config: TensorConfig) -> Layer:
    """int8 (or uint8) as it is; a zero point of 0 is left out."""
    signed = config.dtype == "int8"
    expect(module, stored, "weight", "i8" if signed else "u8", shape)
    group = (1, config.group_size) if config.qscheme == "per_group" and config.group_size else None
    if group is None:
        group = weights.scale_group(expect(module, stored, "weight_scale", PLAIN), shape)
    else:
        expect(module, stored, "weight_scale", PLAIN, weights.grid(shape, group))
    zeros = _present(stored, "weight_zero_point")
    if zeros:
        shapes = (tuple(stored["weight_scale"].shape),)
        expect(module, stored, "weight_zero_point", _ZEROS, *shapes)
    reads = ("weight", "weight_scale", *zeros)

    def decode(arrays: Arrays) -> QArray:
        zero = arrays.get("weight_zero_point")
        if signed:
            zero = weights.zero_points(zero, shape, group)
        elif zero is not None:
            zero = weights.scales(zero, shape, group)
        qtype = "int8" if signed else "uint8"
        scale = arrays["weight_scale"]
        return weights.coded(arrays["weight"], qtype, shape, scale, group, zero_point=zero)

    return Layer(reads, decode)


def _present(stored: Stored, *suffixes: str) -> tuple[str, ...]:
    return tuple(suffix for suffix in suffixes if suffix in stored)


def _integers(
    module: str, stored: Stored, shape: Shape, config: TensorConfig, order: tuple[int, ...]
) -> Layer:
    """2 to 4 bits in groups (the whole weight is stored transposed) or for each output."""
    bits = int(config.dtype[-1])
    signed = config.dtype.startswith("int")
    *lead, n, k = shape
    grouped = config.qscheme == "per_group"
    size = (config.group_size or k) if grouped else k
    size = k if size == -1 else size
    count = -(-k // size)
    stored_shape = (*lead, k, n) if grouped else (*lead, n, k)
    unpack = _unpacker(config.dtype, stored_shape, order)
    expect(module, stored, "weight", unpack.dtypes, unpack.stored)
    if grouped:
        scale_shapes: list[Shape] = [(*lead, count, n)]
    else:
        scale_shapes = [(*lead, n), (*lead, n, 1), tuple(lead), (*lead, 1)]
    expect(module, stored, "weight_scale", PLAIN, *scale_shapes)
    single = not grouped and tuple(stored["weight_scale"].shape[len(lead) :]) in ((), (1,))
    group = (n, k) if single else (1, size)
    zero_shape = (*lead, count, n)
    zero_unpack = _unpacker(config.dtype, zero_shape, order)
    if not config.symmetric:
        expect(module, stored, "weight_zero_point")
    zeros = _present(stored, "weight_zero_point")
    if zeros and grouped:
        shapes = (zero_unpack.stored, zero_shape)
        expect(module, stored, "weight_zero_point", (*zero_unpack.dtypes, *_ZEROS), *shapes)
    elif zeros:
        expect(module, stored, "weight_zero_point", _ZEROS, *scale_shapes)

    def rows_first(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.swapaxes(array, -1, -2)) if grouped else array

    def decode(arrays: Arrays) -> QArray:
        half = 1 << (bits - 1)
        values = rows_first(unpack(arrays["weight"]))
        scale = arrays["weight_scale"]
        scale = rows_first(scale) if grouped else scale
        zero = None
        if zeros:
            raw = arrays["weight_zero_point"]
            if grouped:
                packed = raw.shape != zero_shape
                zero = rows_first(zero_unpack(raw) if packed else raw)
            else:
                zero = raw.reshape(*lead, -1, 1)
        if signed:
            # Two's complement as offset binary; zero points move along.
            values = values ^ np.uint8(half)
            if zero is not None:
                as_int = zero.astype(np.int32)
                as_int = np.where(as_int >= half, as_int - (1 << bits), as_int)
                zero = None if not as_int.any() else as_int + half
        qtype = f"uint{bits}" if zero is not None or not signed else f"uint{bits}b{half}"
        if zero is None and not signed:
            zero = np.zeros(weights.scales(scale, shape, group).shape, np.uint8)
        if zero is not None:
            zero = weights.scales(zero, shape, group)
            zero = zero.astype(np.uint8) if np.issubdtype(zero.dtype, np.integer) else zero
        packed_codes = codes.pack(values, bits)
        return weights.coded(packed_codes, qtype, shape, scale, group, zero_point=zero)

    return Layer(("weight", "weight_scale", *zeros), decode)


@dataclass(frozen=True)
class _Unpacker:
    """Codes uint8 of a shape from what is stored; called with the stored array."""

    dtypes: tuple[str, ...]
    stored: Shape
    run: Callable[[np.ndarray], np.ndarray]

    def __call__(self, array: np.ndarray) -> np.ndarray:
        return self.run(array)


def _unpacker(dtype: str, shape: Shape, order: tuple[int, ...]) -> _Unpacker:
    *rest, last = shape
    if dtype in ("int4", "uint4"):
        return _Unpacker(
            ("i32", "u32"), (*rest, -(-last // 8)), partial(_words, count=last, order=order)
        )
    if dtype == "int3":
        return _Unpacker(
            ("u8",), (*rest, -(-last * 3 // 8)), lambda a: codes.unpack(a, 3, last, np)
        )
    if dtype == "uint2":
        return _Unpacker(("u8",), (*rest, -(-last // 4)), partial(_high_first, count=last))
    return _Unpacker(("i8",), tuple(shape), lambda a: a.view(np.uint8) & np.uint8(3))


def _words(array: np.ndarray, count: int, order: tuple[int, ...]) -> np.ndarray:
    """Eight 4-bit values a word, value i in nibble order[i]."""
    words = np.ascontiguousarray(array).view(np.uint32)[..., None]
    shifts = np.array(order, np.uint32) * np.uint32(4)
    values = ((words >> shifts) & np.uint32(15)).astype(np.uint8)
    return values.reshape(*array.shape[:-1], -1)[..., :count]


def _high_first(array: np.ndarray, count: int) -> np.ndarray:
    """Four 2-bit values a byte, the first in the highest bits."""
    values = (array[..., None] >> np.array([6, 4, 2, 0], np.uint8)) & np.uint8(3)
    return values.reshape(*array.shape[:-1], -1)[..., :count]


def _mx(module: str, stored: Stored, shape: Shape, config: TensorConfig) -> Layer:
    if config.dtype not in _MX_TYPES:
        raise UnsupportedError(f"{module}: {config.dtype} with e8m0 scales is not supported")
    qtype = _MX_TYPES[config.dtype]
    return weights.mx(module, stored, shape, qtype, config.group_size or 32)


def _nvfp4(module: str, stored: Stored, shape: Shape, config: TensorConfig) -> Layer:
    *lead, n, k = shape
    if config.dtype != "fp4":
        raise UnsupportedError(f"{module}: {config.dtype} with quantized scales is not supported")
    size = config.group_size or 16
    weights.require_divisible(stored["weight"], k, size)
    expect(module, stored, "weight", "u8", (*lead, n, k // 2))
    expect(module, stored, "weight_scale", "f8_e4m3", (*lead, n, k // size))
    expect(module, stored, "weight_scale_2", PLAIN, tuple(lead), (*lead, 1))

    def decode(arrays: Arrays) -> QArray:
        aux = {"global_scale": weights.scalar(arrays["weight_scale_2"], tuple(lead))}
        scale = arrays["weight_scale"]
        return weights.coded(arrays["weight"], "fp4_e2m1", shape, scale, (1, size), aux=aux)

    return Layer(("weight", "weight_scale", "weight_scale_2"), decode)


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
        reads = ["input_scale", *_present(stored, "input_zero_point")]
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
    dtype = _FLOATS.get(first.dtype, first.dtype)
    if dtype not in (*_FLOATS.values(), "int8"):
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
