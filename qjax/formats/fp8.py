"""8-bit floats: native `fp8` (per tensor, per channel, in blocks), fbgemm_fp8, fp8 made at load.

DeepSeek's `weight_scale_inv` is a multiplier like every other scale. Blocks at the edges of a
weight may be partial. With blocks, inputs are rounded in groups of as many columns; where the
config says that their scales are static, by the one that is stored, as transformers does (vLLM
refuses such a config). GPTQModel alone has scales that are divided by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import ml_dtypes
import numpy as np

from qjax.errors import UnsupportedError
from qjax.formats import online, weights
from qjax.formats.base import (
    PLAIN,
    Arrays,
    Checkpoint,
    Keys,
    Layer,
    QuantizationConfig,
    Stored,
    dense_layer,
    expect,
    fault,
    is_embedding,
    is_plain,
    no_checkpoint,
)
from qjax.qarray import ActSpec, QArray
from qjax.registry import register_quantization_config

_SCALES = (*PLAIN, "f8_e8m0")
_TOKEN = ActSpec("fp8_e4m3", "token", True)
_STATIC = ActSpec("fp8_e4m3", "tensor", False)
_BLOCK = ActSpec("fp8_e4m3", "group", True, group_size=128)
_INPUT_SCALES = ("input_scale", "activation_scale")
# Keys of GPTQModel that say nothing about how its 8-bit floats are read.
_GPTQMODEL = (
    *("bits", "group_size", "desc_act", "sym", "lm_head", "method", "meta", "pack_dtype"),
    *("checkpoint_format", "weight_scale_method", "model_file_base_name"),
)
_GPTQMODEL_FORMATS = ("float8_e4m3fn", "float8_e5m2")


@register_quantization_config("fp8", "fbgemm_fp8", "deepseek_v4_fp8")
@dataclass(frozen=True)
class Fp8(QuantizationConfig):
    """Settings of one checkpoint.

    Attributes:
      static: whether scales of activations come with the checkpoint.
      block: rows and columns of a block of weights, or None.
      powers_of_two: whether scales of activations are rounded up to these (`scale_fmt: ue8m0`).
      upper_bound: of what a scale of activations is made from, or None (fbgemm).
      excluded: names, or ends or parts of names, of layers that are not quantized.
      online: the checkpoint is in full precision, and weights are rounded as they are read.
      values: the configuration as it was read.
      divides: codes are divided by stored scales, and inputs not rounded (GPTQModel).
    """

    static: bool
    block: tuple[int, int] | None
    powers_of_two: bool
    upper_bound: float | None
    excluded: tuple[str, ...]
    online: bool
    values: Mapping[str, Any]
    divides: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any], checkpoint: Checkpoint) -> Self:
        keys = Keys(config, checkpoint.file)
        keys.ignore("quant_method", "dequantize", "store_dtype", "kv_cache_scheme", "version")
        keys.ignore("modules_to_convert", "is_checkpoint_fp8_serialized")
        keys.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
        keys.choice("expert_dtype", ("fp8",), "fp8")
        scale_format = keys.choice("scale_fmt", ("float", "ue8m0"), "float")
        scheme = keys.choice("activation_scheme", ("static", "dynamic"), "dynamic")
        block = keys.get("weight_block_size", list)
        if block is not None and not (
            len(block) == 2 and all(type(size) is int and size > 0 for size in block)
        ):
            raise keys.error("weight_block_size", f"{block!r:.80} is not [rows, columns]")
        excluded = [*keys.get("ignored_layers", list, [])]
        excluded += keys.get("modules_to_not_convert", list, [])
        bound = keys.get("activation_scale_ub", (int, float))
        divides = keys.choice("weight_scale_semantics", ("inverse", None)) is not None
        if divides:
            keys.ignore(*_GPTQMODEL)
            keys.choice("format", _GPTQMODEL_FORMATS, "float8_e4m3fn")
        keys.done()
        return cls(
            scheme == "static",
            None if block is None else (block[0], block[1]),
            scale_format == "ue8m0",
            None if bound is None else float(bound),
            tuple(map(str, excluded)),
            not config,
            config,
            divides,
        )

    def layer(self, module: str, stored: Stored, shape: tuple[int, ...]) -> Layer | None:
        record = expect(module, stored, "weight")
        if record.qtype in PLAIN:
            if not self.online or not online.rounded(module):
                return self._plain(module, stored, shape)
            expect(module, stored, "weight", PLAIN, shape)
            return Layer(
                ("weight",), lambda arrays: online.per_tensor(arrays["weight"], self.act(None))
            )
        if record.qtype not in weights.FP8_QTYPES:
            raise fault(record, f"has dtype {record.qtype}, expected f8_e4m3 or a plain one")
        if any(_names(part, module) for part in self.excluded):
            raise fault(record, f"has dtype {record.qtype}, but the config excludes this layer")
        expect(module, stored, "weight", tuple(weights.FP8_QTYPES), shape)
        suffix = "weight_scale_inv" if "weight_scale_inv" in stored else "weight_scale"
        scale = expect(module, stored, suffix, _SCALES)
        block = self.block or _inferred_block(tuple(scale.shape), shape)
        group = weights.scale_group(scale, shape, block)
        act = self.act(self._block_columns(tuple(scale.shape), shape, group))
        reads, of_inputs = ["weight", suffix], _of_inputs(stored)
        if not act.dynamic:
            lead = shape[:-2]
            single = () if lead else ((1,), (1, 1))
            expect(module, stored, of_inputs, PLAIN, lead, *single, (*lead, 1), (*lead, 1, 1))
            reads.append(of_inputs)
        qtype = weights.FP8_QTYPES[record.qtype]

        def decode(arrays: Arrays) -> QArray:
            aux = {}
            if not act.dynamic:
                aux["act_scale"] = weights.scalar(arrays[of_inputs], shape[:-2])
            return weights.coded(
                arrays["weight"], qtype, shape, arrays[suffix], group, act=act, aux=aux
            )

        ignores = _INPUT_SCALES if act.dynamic else ()
        return Layer(tuple(reads), _inverted(decode) if self.divides else decode, ignores)

    def _plain(self, module: str, stored: Stored, shape: tuple[int, ...]) -> Layer | None:
        """A layer that is not quantized. transformers leaves those alone whose sizes no block
        divides, but writes scales for them; it does not use these, either.
        """
        left = tuple(s for s in ("weight_scale_inv", *_INPUT_SCALES) if s in stored)
        return replace(dense_layer(module, stored, shape), ignores=left) if left else None

    def _block_columns(
        self, scale: tuple[int, ...], shape: tuple[int, ...], group: tuple[int, int]
    ) -> int | None:
        """Columns of a block of weights, and so of a group of inputs; None where scales are not
        those of blocks.
        """
        if self.block is None:
            # Scales [N, 1] are one a row, not blocks, though both have two axes.
            return group[1] if group[0] > 1 and group != shape[-2:] else None
        # A weight may lie inside of one block.
        return self.block[1] if scale == weights.grid(shape, self.block) else None

    def act(self, block_columns: int | None) -> ActSpec:
        """How activations are rounded for a weight with blocks of so many columns, or without."""
        if self.static:
            return _STATIC
        if block_columns is not None:
            scale = "e8m0_ceil" if self.powers_of_two else "float32"
            return replace(_BLOCK, group_size=block_columns, scale=scale)
        return replace(_TOKEN, upper_bound=self.upper_bound)

    @classmethod
    def for_weights(cls, weights: Mapping[str, QArray], kv_scales: int = 0) -> Self:
        quantized = {m: w for m, w in weights.items() if not is_plain(w)}
        kinds = {module: _config_of(module, weight) for module, weight in quantized.items()}
        config = next(iter(kinds.values()), None)
        if config is None:
            raise UnsupportedError("fp8: no weight of this model is quantized")
        for module, other in kinds.items():
            if other != config:
                raise UnsupportedError(
                    f"{module}: fp8 holds weights of one kind, but this is {other} beside {config}"
                )
        plain = [m for m in weights if m not in quantized and not is_embedding(m)]
        # vLLM reads the first, transformers the second.
        excluded = {"ignored_layers": plain, "modules_to_not_convert": plain}
        return cls.from_config(config | excluded, no_checkpoint())

    def to_config(self) -> dict[str, Any]:
        if self.online:
            return {"quant_method": "fp8", "activation_scheme": "dynamic"}
        return dict(self.values)

    def encode(self, module: str, weight: QArray) -> dict[str, np.ndarray]:
        if weight.qtype != "fp8_e4m3" or weight.group is None:
            raise UnsupportedError(f"{module}: fp8 has no layout for {weight.qtype} weights")
        n, k = weight.shape
        lead = weight.qvalue.shape[:-2]
        scale = np.asarray(weight.scale)
        if self.divides:
            grid = [length for length in scale.shape if length > 1]
            codes = np.asarray(weight.qvalue).view(ml_dtypes.float8_e4m3fn)
            return {"weight": codes, "weight_scale_inv": (1 / scale).reshape(grid)}
        tensors = {"weight": np.asarray(weight.qvalue).view(ml_dtypes.float8_e4m3fn)}
        if weight.act is not None and weight.act.strategy == "group":
            tensors["weight_scale_inv"] = scale
        elif weight.group == (n, k):
            tensors["weight_scale"] = scale.reshape(lead)
        elif weight.group == (1, k):
            tensors["weight_scale"] = scale
        else:
            tensors["weight_scale_inv"] = scale
        if "act_scale" in weight.aux:
            tensors["input_scale"] = np.asarray(weight.aux["act_scale"]).reshape(lead)
        return tensors


def _config_of(module: str, weight: QArray) -> dict[str, Any]:
    """The config of a model of such weights, without the layers that are not quantized.

    Raises:
      UnsupportedError: there is none.
    """
    act, group = weight.act, weight.group
    if weight.qtype != "fp8_e4m3" or group is None or is_embedding(module):
        raise UnsupportedError(f"{module}: fp8 has no layout for {weight.qtype} weights")
    odd = sorted(weight.aux.keys() - {"act_scale"})
    if odd or weight.zero_point is not None or weight.rounded or any(weight.hadamard):
        what = odd[0] if odd else "zero points, rotations or rounding"
        raise UnsupportedError(f"{module}: fp8 has no layout for weights with {what}")
    if act is None:
        raise UnsupportedError(
            f"{module}: fp8 checkpoints round inputs too, but those of this weight are not"
        )
    n, k = weight.shape
    if act.strategy == "group":
        config = {"activation_scheme": "dynamic", "weight_block_size": list(group)}
        if act.scale == "e8m0_ceil":
            config["scale_fmt"] = "ue8m0"
        found = replace(_BLOCK, group_size=group[1], scale=act.scale)
    elif group == (n, k):
        config = {"activation_scheme": "dynamic" if act.dynamic else "static"}
        found = _TOKEN if act.dynamic else _STATIC
    elif group == (1, k) and act.upper_bound is not None:
        config = {"quant_method": "fbgemm_fp8", "activation_scale_ub": act.upper_bound}
        found = replace(_TOKEN, upper_bound=act.upper_bound)
    else:
        raise UnsupportedError(
            f"{module}: fp8 checkpoints have a scale a weight or a block, but this has groups of "
            f"{group}"
        )
    if found != act or act.scale not in ("float32", "e8m0_ceil"):
        raise UnsupportedError(f"{module}: fp8 has no words for inputs rounded by {act}")
    return {"quant_method": "fp8"} | config


def _inverted(decode: Callable[[Arrays], QArray]) -> Callable[[Arrays], QArray]:
    def decode_with(arrays: Arrays) -> QArray:
        weight = decode(arrays)
        return replace(weight, scale=1 / weight.scale.astype(np.float32), act=None)

    return decode_with


def _of_inputs(stored: Stored) -> str:
    """Name of the scale of inputs: vLLM's, or that of transformers."""
    return next((name for name in _INPUT_SCALES if name in stored), _INPUT_SCALES[0])


def _names(part: str, module: str) -> bool:
    """Whether an entry of the list of excluded layers means a module."""
    return module == part or module.startswith(part + ".") or module.endswith("." + part)


def _inferred_block(scale: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Blocks of the size that the number of scales gives, where the config does not tell."""
    if len(scale) != len(shape) or 0 in scale:
        return None
    sizes = [-(-length // count) for length, count in zip(shape[-2:], scale[-2:], strict=True)]
    # Partial blocks hide the size: blocks are powers of two in practice.
    rows, columns = (1 << (size - 1).bit_length() for size in sizes)
    return rows, columns
