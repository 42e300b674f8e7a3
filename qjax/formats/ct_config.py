"""Words of compressed-tensors for what is known of a weight: the configuration that holds given
weights, derived from these alone; and what it means for their inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from pallas_kernels import codes
from qjax.errors import CheckpointError, UnsupportedError
from qjax.formats.base import is_embedding, is_plain
from qjax.qarray import ActSpec, QArray
from qjax.scheme import QuantizationArgs, targets_of

FLOAT_TYPES = {4: "fp4_e2m1", 6: "fp6_e2m3", 8: "fp8_e4m3"}
_KEPT_AUX = {"global_scale", "perm", "act_scale", "act_zero_point", "act_global_scale"}
_FLOATS = (*FLOAT_TYPES.values(), "fp8_e5m2")
_SCALES = {"e8m0_even4": "torch.uint8", "fp8_e4m3": "torch.float8_e4m3fn"}

Scheme = tuple[QuantizationArgs, QuantizationArgs | None, str]
"""Weights, input activations, and the name of the layout."""


def config_for(weights: Mapping[str, QArray], kv_scales: int) -> dict[str, Any]:
    """What config.json says of these weights, see `QuantizationConfig.for_weights`."""
    schemes: dict[Scheme, list[str]] = {}
    plain = []
    for module, weight in weights.items():
        if is_plain(weight):
            plain.append(module)
        else:
            schemes.setdefault(scheme_of(module, weight), []).append(module)
    if not schemes and not kv_scales:
        raise UnsupportedError("compressed-tensors: no weight of this model is quantized")
    linear = [module for module in plain if not is_embedding(module)]
    groups = {}
    for index, ((args, inputs, layout), modules) in enumerate(schemes.items()):
        others = [module for module in weights if module not in set(modules)]
        alone = len(schemes) == 1 and not any(map(is_embedding, modules))
        groups[f"group_{index}"] = {
            "targets": ["Linear"] if alone else targets_of(modules, others),
            "weights": fields(args),
            "input_activations": None if inputs is None else fields(inputs),
            "output_activations": None,
            "format": layout,
        }
    layouts = {layout for *_, layout in schemes}
    quantized = {module for modules in schemes.values() for module in modules}
    ignored = targets_of(linear, quantized) if quantized else []
    if quantized and "lm_head" not in weights:  # tied to the embedding
        ignored.append("lm_head")
    return {
        "quant_method": "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision" if layouts else "dense",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": fields(
            QuantizationArgs(8, "float", strategy="tensor" if kv_scales == 1 else "attn_head")
        )
        if kv_scales
        else None,
    }


def scheme_of(module: str, weight: QArray) -> Scheme:
    """How one weight is quantized.

    Raises:
      UnsupportedError: compressed-tensors has no words for it.
    """
    code = codes.CODES.get(weight.qtype)
    known = code is not None and (code.kind in ("int", "uint") or weight.qtype in _FLOATS)
    if code is None or not known:
        raise _refusal(module, f"type {weight.qtype}")
    if odd := sorted(weight.aux.keys() - _KEPT_AUX):
        raise _refusal(module, f"{odd[0]} beside a weight")
    zero = weight.zero_point
    kinds = "iu" if code.kind != "float" else "iufV"
    if weight.additive or (zero is not None and np.dtype(zero.dtype).kind not in kinds):
        raise _refusal(module, f"zero points of {weight.zero_point.dtype}")
    if any(weight.hadamard):
        raise _refusal(module, "rotations at run time that no transform_config tells of")
    args = _weight_args(module, weight, code)
    inputs = None if weight.act is None else _input_args(module, weight.act)
    return args, inputs, _layout(args, inputs)


def _weight_args(module: str, weight: QArray, code: codes.Code) -> QuantizationArgs:
    n, k = weight.shape
    assert weight.group is not None
    rows, columns = weight.group
    common: dict[str, Any] = {
        "num_bits": code.bits,
        "type": "float" if code.kind == "float" else "int",
        "symmetric": weight.zero_point is None,
    }
    scale = weight.scale.dtype
    powers, nested = scale == ml_dtypes.float8_e8m0fnu, scale == ml_dtypes.float8_e4m3fn
    if "global_scale" in weight.aux or nested:
        if not (
            weight.qtype == "fp4_e2m1" and rows == 1 and nested and "global_scale" in weight.aux
        ):
            raise _refusal(module, f"{weight.qtype} with scales of {scale} and of the whole weight")
        common |= {"strategy": "tensor_group", "group_size": columns}
        return QuantizationArgs(**common, scale_dtype="torch.float8_e4m3fn")
    if code.kind == "float" and (powers or code.bits < 8):
        if not powers or rows != 1:
            raise _refusal(module, f"{weight.qtype} with scales of {scale} for {weight.group}")
        common |= {"strategy": "group", "group_size": columns}
        return QuantizationArgs(**common, scale_dtype="torch.uint8")
    if powers:
        raise _refusal(module, f"{weight.qtype} with scales of {scale}")
    if "perm" in weight.aux:  # vLLM reads it; compressed-tensors has dropped it after 0.13
        common["actorder"] = "group"
    blocks = weight.act is not None and weight.act.strategy == "group"
    if weight.group == (n, k) and not blocks:
        return QuantizationArgs(**common, strategy="tensor")
    if rows > 1:
        return QuantizationArgs(**common, strategy="block", block_structure=weight.group)
    if columns == k:
        return QuantizationArgs(**common, strategy="channel")
    return QuantizationArgs(**common, strategy="group", group_size=columns)


def _input_args(module: str, act: ActSpec) -> QuantizationArgs:
    code = codes.CODES.get(act.dtype)
    integer = act.dtype.startswith("int")
    bits = int(act.dtype.removeprefix("int")) if integer else code.bits if code else 0
    local = act.scale == "fp8_e4m3"
    args = QuantizationArgs(
        bits,
        "int" if integer else "float",
        symmetric=act.symmetric,
        strategy="tensor_group" if local else act.strategy,
        group_size=act.group_size,
        dynamic="local" if local and act.dynamic else act.dynamic,
        scale_dtype=_SCALES.get(act.scale),
    )
    if not bits or act_spec(args) != act:
        raise _refusal(module, f"inputs rounded by {act}")
    return args


def act_spec(args: QuantizationArgs, file: str = "") -> ActSpec:
    """What `input_activations` means. Formulas: `calculate_qparams` of compressed-tensors."""
    if args.strategy in ("channel", "block", "attn_head"):
        raise CheckpointError(f"input_activations have strategy {args.strategy!r}", file=file)
    if args.type == "int":
        dtype, divisor = f"int{args.num_bits}", ((1 << args.num_bits) - 1) / 2
    else:
        dtype, divisor = FLOAT_TYPES[args.num_bits], None
    scale = "float32"
    if args.strategy == "tensor_group":
        scale = "fp8_e4m3"
    elif args.scale_dtype == "torch.uint8" or (
        args.strategy == "group" and args.type == "float" and args.num_bits < 8
    ):
        scale = "e8m0_even4"
    grouped = args.strategy in ("group", "tensor_group")
    return ActSpec(
        dtype,
        "group" if grouped else args.strategy,
        bool(args.dynamic),
        symmetric=args.symmetric,
        group_size=(args.group_size or 16) if grouped else None,
        scale=scale,
        divisor=divisor,
    )


def _layout(args: QuantizationArgs, inputs: QuantizationArgs | None) -> str:
    """The name of the layout, as LLM Compressor gives it."""
    if args.type == "int":
        return "pack-quantized" if inputs is None else "int-quantized"
    if args.strategy == "tensor_group":
        return "nvfp4-pack-quantized"
    if args.scale_dtype is not None:
        return "mxfp8-quantized" if args.num_bits == 8 else f"mxfp{args.num_bits}-pack-quantized"
    return "naive-quantized" if inputs is None and args.strategy == "tensor" else "float-quantized"


def fields(args: QuantizationArgs) -> dict[str, Any]:
    """The fields of a config."""
    return {
        "num_bits": args.num_bits,
        "type": args.type,
        "symmetric": args.symmetric,
        "strategy": args.strategy,
        "group_size": args.group_size,
        "block_structure": None if args.block_structure is None else list(args.block_structure),
        "dynamic": args.dynamic,
        "actorder": args.actorder,
        "scale_dtype": args.scale_dtype,
        "zp_dtype": None if args.symmetric else "torch.int8",
        "observer": None if args.dynamic is True else "memoryless_minmax",
        "observer_kwargs": {},
    }


def _refusal(module: str, what: str) -> UnsupportedError:
    return UnsupportedError(f"{module}: compressed-tensors has no layout for {what}")
