"""NVIDIA ModelOpt: FP8, NVFP4, MXFP4, MXFP8, INT4-AWQ and INT8 checkpoints.

The layouts are those of `modelopt.torch.export` (unified Hugging Face checkpoints). Which one a
layer has is plain from its tensors; the configuration must not say otherwise.
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
    Record,
    Stored,
    expect,
    fault,
)
from qjax.qarray import ActSpec, QArray
from qjax.registry import register_quantization_config

_FP8_STATIC = ActSpec("fp8_e4m3", "tensor", False)
_NVFP4 = ActSpec("fp4_e2m1", "group", True, group_size=16, scale="fp8_e4m3")
_MXFP8 = ActSpec("fp8_e4m3", "group", True, group_size=32, scale="e8m0_ceil")
_TOKEN = ActSpec("fp8_e4m3", "token", True)
_TENSOR = ActSpec("fp8_e4m3", "tensor", True)
_MXFP4 = ActSpec("fp4_e2m1", "group", True, group_size=32, scale="e8m0_ceil")
_INT8_STATIC = ActSpec("int8", "tensor", False)


@dataclass(frozen=True)
class _Algorithm:
    """What a value of `quant_algo` means: how weights lie, and what happens to activations."""

    weight: str
    act: ActSpec | None = None


_ALGORITHMS = {
    "FP8": _Algorithm("fp8", _FP8_STATIC),
    "FP8_PER_CHANNEL_PER_TOKEN": _Algorithm("fp8", _TOKEN),
    "FP8_PB_WO": _Algorithm("fp8"),
    "FP8_BLOCK_SCALES": _Algorithm("fp8"),
    "NVFP4": _Algorithm("nvfp4", _NVFP4),
    "NVFP4_AWQ": _Algorithm("nvfp4", _NVFP4),
    "NVFP4_SVD": _Algorithm("nvfp4", _NVFP4),
    "W4A16_NVFP4": _Algorithm("nvfp4"),
    "W4A8_NVFP4_FP8": _Algorithm("nvfp4", _FP8_STATIC),
    "MXFP4": _Algorithm("mxfp4", _MXFP4),
    "W4A8_MXFP4_FP8": _Algorithm("mxfp4", _TENSOR),  # exported without scales of inputs
    "MXFP8": _Algorithm("mxfp8", _MXFP8),
    "W4A16_AWQ": _Algorithm("int4"),
    "W4A8_AWQ": _Algorithm("int4", _FP8_STATIC),
    "W8A16": _Algorithm("int8"),
    "W8A8_SQ_PER_CHANNEL": _Algorithm("int8", _INT8_STATIC),
}
_BLOCK = (128, 128)


@register_quantization_config("modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed")
@dataclass(frozen=True)
class ModelOpt(QuantizationConfig):
    """Settings of one checkpoint.

    Attributes:
      algorithm: `quant_algo` of all layers, or None where it differs from layer to layer.
      layers: module -> algorithm, of mixed precision.
      excluded: patterns of modules that are not quantized.
      values: the configuration as it was read.
      kv_cache: what keys and values are rounded to, in ModelOpt's words, or "".
    """

    algorithm: str | None
    layers: Mapping[str, str]
    excluded: tuple[str, ...]
    values: Mapping[str, Any]
    file: str
    kv_cache: str = ""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], checkpoint: Checkpoint) -> Self:
        keys = Keys(config, checkpoint.file)
        keys.ignore("quant_method", "producer", "config_groups", "quant_library", "version")
        nested = keys.section("quantization") if "quantization" in config else keys
        if nested is not keys:
            keys.done()
        nested.ignore("has_zero_point", "pre_quant_scale", "group_size")
        kv_cache = _kv_cache(nested)
        algorithm = nested.get("quant_algo", str, "").upper()
        mixed = nested.section("quantized_layers")
        layers = {}
        for module in mixed.values:
            section = mixed.section(module)
            section.ignore("group_size", "awq_block_size", "has_zero_point", "pre_quant_scale")
            layers[module] = _known(section.get("quant_algo", str, ""), section)
            section.done()
        excluded = [*nested.get("exclude_modules", list, []), *nested.get("ignore", list, [])]
        if algorithm == "MIXED_PRECISION":
            if not layers:
                raise keys.error("quantized_layers", "missing, but quant_algo is MIXED_PRECISION")
        elif algorithm or not kv_cache:  # or the cache alone is rounded
            _known(algorithm, nested)
        nested.done()
        return cls(
            None if layers or not algorithm else algorithm,
            layers,
            tuple(map(str, excluded)),
            config,
            checkpoint.file,
            kv_cache,
        )

    @property
    def quantizes_weights(self) -> bool:
        return bool(self.algorithm or self.layers)

    @property
    def cache(self) -> str | None:
        return "fp8_e4m3" if self.kv_cache == "FP8" else self.kv_cache or None

    def _algorithm(self, module: str) -> str | None:
        """The algorithm that the configuration names for a module, or None for none."""
        if any(_matches(module, pattern) for pattern in self.excluded):
            return None
        return self.layers.get(module) if self.layers else self.algorithm

    def layer(self, module: str, stored: Stored, shape: tuple[int, ...]) -> Layer | None:
        weight = expect(module, stored, "weight")
        found = _layout(weight, stored, shape)
        if found is None:
            return None
        name = self._algorithm(module)
        if name is None:
            raise fault(weight, f"is stored as {found}, but the config excludes this module")
        algorithm = _ALGORITHMS[name]
        if algorithm.weight != found:
            raise fault(weight, f"is stored as {found}, which {name} does not mean")
        act = algorithm.act
        plan = _LAYOUTS[found](module, stored, shape)
        reads, ignores = list(plan.reads), list(plan.ignores)
        *lead, _, k = shape
        scaled = act in (_FP8_STATIC, _INT8_STATIC, _NVFP4)
        if scaled or "input_scale" in stored:
            one = (tuple(lead), (*lead, 1), (*lead, 1, 1))
            expect(module, stored, "input_scale", PLAIN, *one)
            (reads if scaled else ignores).append("input_scale")
        if "pre_quant_scale" in stored:
            expect(module, stored, "pre_quant_scale", PLAIN, (*lead, k), (*lead, 1, k), (k,))
            reads.append("pre_quant_scale")
        lora = [s for s in ("svdquant_lora_a", "svdquant_lora_b") if s in stored]
        return Layer((*reads, *lora), _with_inputs(plan.decode, act, shape, lora), tuple(ignores))

    def to_config(self) -> dict[str, Any]:
        return dict(self.values)

    def encode(self, module: str, weight: QArray) -> dict[str, np.ndarray]:
        lead = weight.qvalue.shape[:-2]
        n, k = weight.shape
        scale = np.asarray(weight.scale)
        codes_ = np.asarray(weight.qvalue)
        zeros = weight.zero_point is not None
        tensors: dict[str, np.ndarray] = {}
        if weight.qtype == "fp8_e4m3":
            tensors["weight"] = codes_.view(ml_dtypes.float8_e4m3fn)
            if scale.dtype == ml_dtypes.float8_e8m0fnu:
                tensors["weight_scale"] = scale.view(np.uint8)
            elif weight.group == (n, k):
                tensors["weight_scale"] = scale.reshape(lead)
            elif weight.group == (1, k):
                tensors["weight_scale"] = scale.reshape(*lead, n)
            else:
                tensors["weight_scale"] = scale[..., :, None, :, None]
        elif weight.qtype == "int8" and weight.group in ((1, k), (n, k)) and not zeros:
            tensors["weight"] = codes_.view(np.int8)
            tensors["weight_scale"] = scale.reshape(*lead, *([n] if weight.group == (1, k) else []))
        elif weight.qtype == "fp4_e2m1" and scale.dtype == ml_dtypes.float8_e8m0fnu:
            tensors["weight"], tensors["weight_scale"] = codes_, scale.view(np.uint8)
        elif weight.qtype == "fp4_e2m1" and "global_scale" in weight.aux:
            tensors["weight"], tensors["weight_scale"] = codes_, scale
            tensors["weight_scale_2"] = np.asarray(weight.aux["global_scale"]).reshape(lead)
        elif weight.qtype == "uint4b8" and "global_scale" not in weight.aux:
            signed = codes.unpack(codes_, 4, k, np) ^ 8
            tensors["weight"] = signed[..., 0::2, :] | signed[..., 1::2, :] << 4
            tensors["weight_scale"] = scale
        else:
            raise UnsupportedError(f"{module}: ModelOpt has no layout for {weight.qtype} weights")
        for suffix, key in (("input_scale", "act_scale"), ("input_scale", "act_global_scale")):
            if key in weight.aux:
                tensors[suffix] = np.asarray(weight.aux[key]).reshape(lead)
        if "act_pre_scale" in weight.aux:
            tensors["pre_quant_scale"] = np.asarray(weight.aux["act_pre_scale"]).reshape(*lead, k)
        return tensors


def _kv_cache(keys: Keys) -> str:
    """What the cache is rounded to: of hf_quant_config.json, or in the words of config.json."""
    told = keys.get("kv_cache_quant_algo", str, "")
    scheme = keys.get("kv_cache_scheme", (dict, str), "")
    if isinstance(scheme, dict):
        eight = (scheme.get("type"), scheme.get("num_bits")) == ("float", 8)
        fp8 = eight and not scheme.get("dynamic")
        scheme = "FP8" if fp8 else ", ".join(f"{key} {value}" for key, value in scheme.items())
    return told.upper() or scheme.upper()


def _known(algorithm: str, keys: Keys) -> str:
    name = algorithm.upper()
    if name not in _ALGORITHMS:
        raise UnsupportedError(
            f"{keys.file}: {keys.prefix}quant_algo {algorithm!r:.80} is not supported; these are: "
            + ", ".join([*_ALGORITHMS, "MIXED_PRECISION"])
        )
    return name


def _matches(module: str, pattern: str) -> bool:
    """A pattern names modules by wildcards; a bare path stands for what is below it, too."""
    return fnmatchcase(module, pattern) or fnmatchcase(module, pattern.rstrip("*.") + ".*")


def _layout(weight: Record, stored: Stored, shape: tuple[int, ...]) -> str | None:
    """How the weight lies, from its dtype and shape; None for a plain one."""
    n, k = shape[-2:]
    if weight.qtype in PLAIN:
        return None
    if weight.qtype == "i8":
        return "int8"
    if weight.qtype == "f8_e4m3":
        scale = stored.get("weight_scale")
        return "mxfp8" if scale is not None and scale.qtype in ("u8", "f8_e8m0") else "fp8"
    if weight.qtype == "u8":
        scale = stored.get("weight_scale")
        if scale is not None and scale.qtype == "f8_e4m3":
            return "nvfp4"
        if scale is not None and scale.qtype in ("u8", "f8_e8m0"):
            return "mxfp4"
        if weight.shape[-2:] == (n // 2, k):
            return "int4"
    raise fault(weight, f"has dtype {weight.qtype} and shape {weight.shape}: no layout of ModelOpt")


def _fp8(module: str, stored: Stored, shape: tuple[int, ...]) -> Layer:
    expect(module, stored, "weight", "f8_e4m3", shape)
    group = weights.scale_group(
        expect(module, stored, "weight_scale", PLAIN), shape, _block_of(stored, shape)
    )

    def decode(arrays: Arrays) -> QArray:
        return weights.coded(arrays["weight"], "fp8_e4m3", shape, arrays["weight_scale"], group)

    return Layer(("weight", "weight_scale"), decode)


def _block_of(stored: Stored, shape: tuple[int, ...]) -> tuple[int, int]:
    """Blocks of 128 x 128, or the size that the number of scales gives."""
    sizes = stored["weight_scale"].shape[len(shape) - 2 :]
    if len(sizes) != 4 or 0 in sizes:
        return _BLOCK
    rows, columns = -(-shape[-2] // sizes[0]), -(-shape[-1] // sizes[2])
    return (rows, columns) if rows % 16 == columns % 16 == 0 else _BLOCK


def _mxfp8(module: str, stored: Stored, shape: tuple[int, ...]) -> Layer:
    expect(module, stored, "weight", "f8_e4m3", shape)
    scale = expect(module, stored, "weight_scale", ("u8", "f8_e8m0"))
    group = (1, 32)
    if tuple(scale.shape) == weights.grid(shape, (32, 32)) and shape[-2] > 1:
        group = (32, 32)
    expect(module, stored, "weight_scale", ("u8", "f8_e8m0"), weights.grid(shape, group))

    def decode(arrays: Arrays) -> QArray:
        scale = arrays["weight_scale"].view(ml_dtypes.float8_e8m0fnu)
        return weights.coded(arrays["weight"], "fp8_e4m3", shape, scale, group)

    return Layer(("weight", "weight_scale"), decode)


def _nvfp4(module: str, stored: Stored, shape: tuple[int, ...]) -> Layer:
    *lead, n, k = shape
    expect(module, stored, "weight", "u8", (*lead, n, k // 2))
    shapes = [(*lead, n, k // size) for size in (16, 32) if k % size == 0]
    record = expect(module, stored, "weight_scale", "f8_e4m3", *shapes)
    group = (1, k // record.shape[-1])
    expect(module, stored, "weight_scale_2", PLAIN, tuple(lead), (*lead, 1), (*lead, 1, 1))

    def decode(arrays: Arrays) -> QArray:
        aux = {"global_scale": weights.scalar(arrays["weight_scale_2"], tuple(lead))}
        scale = arrays["weight_scale"]
        return weights.coded(arrays["weight"], "fp4_e2m1", shape, scale, group, aux=aux)

    return Layer(("weight", "weight_scale", "weight_scale_2"), decode)


def _int4(module: str, stored: Stored, shape: tuple[int, ...]) -> Layer:
    """Two consecutive outputs a byte, the even one in the low half, in two's complement."""
    *lead, n, k = shape
    expect(module, stored, "weight", "u8", (*lead, n // 2, k))
    record = expect(module, stored, "weight_scale", PLAIN)
    if len(record.shape) != len(shape) or k % record.shape[-1]:
        raise fault(record, f"has shape {record.shape}, a weight {shape} asks for (N, groups)")
    group = (1, k // record.shape[-1])
    expect(module, stored, "weight_scale", PLAIN, weights.grid(shape, group))

    def decode(arrays: Arrays) -> QArray:
        def values(*index: slice) -> np.ndarray:
            *before, rows, columns = index
            both = np.asarray(
                arrays["weight"][(*before, slice(rows.start // 2, rows.stop // 2), columns)]
            )
            signed = np.stack([both & np.uint8(15), both >> np.uint8(4)], axis=-2)
            return signed.reshape(*both.shape[:-2], -1, both.shape[-1]) ^ np.uint8(8)

        packed = weights.repacked(shape, 4, values, rows=2)
        return weights.coded(packed, "uint4b8", shape, arrays["weight_scale"], group)

    # Of W4A8, weight_scale_2 is the scale of the float8 that TensorRT-LLM turns the weight into
    # on its way to the product: a rounding that is not part of the stored weight.
    return Layer(("weight", "weight_scale"), decode, ("weight_scale_2",))


def _int8(module: str, stored: Stored, shape: tuple[int, ...]) -> Layer:
    expect(module, stored, "weight", "i8", shape)
    group = weights.scale_group(expect(module, stored, "weight_scale", PLAIN), shape)

    def decode(arrays: Arrays) -> QArray:
        return weights.coded(arrays["weight"], "int8", shape, arrays["weight_scale"], group)

    return Layer(("weight", "weight_scale"), decode)


_LAYOUTS: dict[str, Callable[[str, Stored, tuple[int, ...]], Layer]] = {
    "fp8": _fp8,
    "mxfp8": _mxfp8,
    "nvfp4": _nvfp4,
    "mxfp4": partial(weights.mx, qtype="fp4_e2m1", size=32, suffix="weight"),
    "int4": _int4,
    "int8": _int8,
}


def _with_inputs(
    decode: Callable[[Arrays], QArray],
    act: ActSpec | None,
    shape: tuple[int, ...],
    lora: list[str],
) -> Callable[[Arrays], QArray]:
    """The decoded weight with what is to happen to its inputs."""
    lead = shape[:-2]

    def decode_all(arrays: Arrays) -> QArray:
        weight = decode(arrays)
        aux = dict(weight.aux)
        if act is not None and "input_scale" in arrays:
            key = "act_global_scale" if act is _NVFP4 else "act_scale"
            aux[key] = weights.scalar(arrays["input_scale"], lead)
        if "pre_quant_scale" in arrays:
            aux["act_pre_scale"] = arrays["pre_quant_scale"].reshape(*lead, 1, shape[-1])
        for suffix in lora:
            aux[suffix.removeprefix("svdquant_")] = np.ascontiguousarray(arrays[suffix])
        return replace(weight, act=act, aux=aux)

    return decode_all
