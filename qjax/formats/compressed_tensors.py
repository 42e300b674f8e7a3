"""compressed-tensors, what LLM Compressor writes: the configuration and which layer gets what.

How the tensors of a layer lie is in `ct_layouts`; which layout a layer has is plain from its
tensors, and the scheme that its name is given must agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from qjax.errors import UnsupportedError
from qjax.formats import ct_config, ct_layouts, exact, weights
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
    no_checkpoint,
)
from qjax.formats.ct_frozen import frozen
from qjax.formats.ct_transforms import Transform, read_transforms
from qjax.qarray import QArray
from qjax.registry import register_quantization_config
from qjax.scheme import STRATEGIES, QuantizationArgs, QuantizationScheme, is_ignored, scheme_for

FORMATS = (
    *("dense", "int-quantized", "float-quantized", "naive-quantized", "pack-quantized"),
    *("marlin-24", "mixed-precision", "nvfp4-pack-quantized", "mxfp4-pack-quantized"),
    *("mxfp6-pack-quantized", "mxfp8-quantized"),
)
_IN_BYTES = ("int-quantized", "naive-quantized")


@register_quantization_config("compressed-tensors", "compressed_tensors", "sparseml")
@dataclass(frozen=True)
class CompressedTensors(QuantizationConfig):
    """Settings of one checkpoint.

    Attributes:
      schemes: one for each config group.
      ignore: targets of layers that are left alone.
      transforms: rotations that are applied to inputs and outputs at run time.
      biases: names of the biases that are stored.
      kv_cache: what keys and values are rounded to, or None.
      values: the configuration as it was read.
    """

    schemes: tuple[QuantizationScheme, ...]
    ignore: tuple[str, ...]
    transforms: tuple[Transform, ...]
    values: Mapping[str, Any]
    biases: frozenset[str] = frozenset()
    kv_cache: QuantizationArgs | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], checkpoint: Checkpoint) -> Self:
        # Of the first releases: both configs one level lower, beside each other.
        inner = config.get("quantization_config")
        if isinstance(inner, Mapping):
            config = {k: v for k, v in config.items() if k != "quantization_config"} | dict(inner)
        keys = Keys(config, checkpoint.file)
        keys.ignore("quant_method", "quantization_status", "global_compression_ratio", "version")
        keys.ignore("provider", "moe_sparsity_config", "autoround_version", "sparseml_version")
        cache = read_args(keys, "kv_cache_scheme")
        keys.choice("format", FORMATS, "dense")
        _refuse_sparse(keys)
        groups = keys.section("config_groups")
        schemes = tuple(read_scheme(groups.section(name)) for name in groups.values)
        ignore = tuple(map(str, keys.get("ignore", list, [])))
        transforms = read_transforms(keys.section("transform_config"))
        keys.done()
        biases = frozenset(n for n in checkpoint.tensors if transforms and n.endswith(".bias"))
        return cls(schemes, ignore, transforms, config, biases, cache)

    @property
    def quantizes_weights(self) -> bool:
        return any(scheme.weights is not None for scheme in self.schemes)

    @property
    def cache(self) -> str | None:
        """Of `kv_cache_scheme`, or of a config group that names attention itself."""
        if any(scheme.weights is None and scheme.input_activations for scheme in self.schemes):
            return "attention whose queries are rounded, too"
        args = self.kv_cache
        if args is None:
            return None
        if args.type == "float" and args.num_bits == 8 and args.symmetric and not args.dynamic:
            return "fp8_e4m3"
        kind = ("dynamic " if args.dynamic else "") + ("" if args.symmetric else "asymmetric ")
        return f"{kind}{args.type}{args.num_bits}"

    def layer(self, module: str, stored: Stored, shape: tuple[int, ...]) -> Layer | None:
        kind = layer_class(module)
        scheme = scheme_for(module, self.schemes, kind)
        if is_ignored(module, self.ignore, kind):
            scheme = None
        found = ct_layouts.layout(module, stored, shape)
        if found is None:  # plain, whatever the configuration wanted
            return self._rotated(module, stored, shape, None)
        if scheme is None or scheme.weights is None:
            record = next(iter(stored.values()))
            raise fault(record, f"is stored as {found}, but the config leaves {module} alone")
        read = frozen if found == "frozen" else ct_layouts.LAYOUTS[found]
        plan = read(module, stored, shape, scheme.weights)
        plan = _with_inputs(module, stored, shape, plan, scheme.input_activations)
        return self._rotated(module, stored, shape, plan)

    def _rotated(
        self, module: str, stored: Stored, shape: tuple[int, ...], plan: Layer | None
    ) -> Layer | None:
        online = [t for t in self.transforms if t.applies(module, layer_class(module))]
        if not online:
            return plan
        sizes = {t.location: t.size(shape) for t in online}
        if len(sizes) < len(online):
            raise UnsupportedError(f"{online[0].file}: {module} has two transforms at one place")
        if "output" in sizes and f"{module}.bias" in self.biases:
            raise UnsupportedError(
                f"{online[0].file}: transform_config rotates the outputs of {module}, which has a "
                "bias; only outputs without one are supported"
            )
        if plan is None:
            plan = dense_layer(module, stored, shape)
        decode, both = plan.decode, (sizes.get("input", 0), sizes.get("output", 0))
        known = tuple(t.tensor for t in online if t.tensor in stored)
        return Layer(
            plan.reads,
            lambda arrays: replace(decode(arrays), hadamard=both),
            (*plan.ignores, *known),
        )

    @classmethod
    def adapted(cls, module: str, weight: QArray, lossy: bool, dtype: str) -> QArray:
        packed = exact.codes_only(module, weight, lossy)
        # Bytes are packed where inputs are not rounded: other engines know them only so.
        if weight.qtype == "int8" and weight.act is not None:
            return replace(weight, rounded=packed.rounded)
        return ct_layouts.with_divisors(module, packed, lossy)

    @classmethod
    def for_weights(cls, weights: Mapping[str, QArray], kv_scales: int = 0) -> Self:
        return cls.from_config(ct_config.config_for(weights, kv_scales), no_checkpoint())

    def encode(self, module: str, weight: QArray) -> dict[str, np.ndarray]:
        """The tensors that `layer` reads, integers packed unless the config says otherwise."""
        scheme = scheme_for(module, self.schemes, layer_class(module))
        told = (scheme and scheme.format) or self.values.get("format")
        if told == "dense":
            raise UnsupportedError(
                f"{module}: was rounded as it was read, and its config says that it is not "
                "compressed; save with a quantization_config whose format is another"
            )
        return ct_layouts.encode(module, weight, packed=told not in _IN_BYTES)

    def to_config(self) -> dict[str, Any]:
        return dict(self.values)


def layer_class(module: str) -> str:
    """The class that targets name a module by."""
    return "Embedding" if is_embedding(module) else "Linear"


def _refuse_sparse(keys: Keys) -> None:
    sparsity = keys.get("sparsity_config", dict, {})
    kind = sparsity.get("format", "dense")
    if kind != "dense":
        raise UnsupportedError(
            f"{keys.file}: sparsity_config.format {kind!r:.80} is not supported; save the model "
            "with dense weights (compressed-tensors itself has dropped sparse ones)"
        )


def read_scheme(keys: Keys) -> QuantizationScheme:
    """One entry of `config_groups`."""
    targets = keys.get("targets", list, [])
    if not targets or not all(isinstance(target, str) for target in targets):
        raise keys.error("targets", "must be a list of names")
    if keys.get("output_activations", dict) is not None:
        raise UnsupportedError(
            f"{keys.file}: {keys.prefix}output_activations is not supported: only weights, "
            "inputs and the key-value cache are quantized"
        )
    found = QuantizationScheme(
        tuple(targets),
        read_args(keys, "weights"),
        read_args(keys, "input_activations"),
        keys.choice("format", (None, *FORMATS)),
    )
    keys.done()
    return found


def read_args(keys: Keys, name: str) -> QuantizationArgs | None:
    """`weights` or `input_activations` of a group; None where it is null."""
    if keys.get(name, dict) is None:
        return None
    args = keys.section(name)
    args.ignore("zp_dtype")
    size = args.get("group_size", int)
    block = args.get("block_structure", (list, tuple, str))
    if isinstance(block, str):
        block = block.split("x")
    found = QuantizationArgs(
        num_bits=args.get("num_bits", int, 8),
        type=args.choice("type", ("int", "float"), "int"),
        symmetric=args.get("symmetric", bool, True),
        strategy=args.choice("strategy", (None, *STRATEGIES)) or "",
        group_size=size if size is not None and (size > 0 or size == -1) else None,
        block_structure=_pair(args, block),
        dynamic=args.choice("dynamic", (False, True, "local"), False),
        actorder=args.get("actorder", (str, bool)) or None,
        scale_dtype=args.get("scale_dtype", str),
        observer=args.get("observer", str),
        observer_kwargs=args.get("observer_kwargs", dict, {}),
    )
    args.done()
    bits = range(2, 9) if found.type == "int" else ct_config.FLOAT_TYPES
    if found.num_bits not in bits:
        raise UnsupportedError(
            f"{args.file}: {args.prefix}num_bits {found.num_bits} of type {found.type} is not "
            f"supported; these are: {', '.join(map(str, bits))}"
        )
    return found


def _pair(keys: Keys, block: list | None) -> tuple[int, int] | None:
    if block is None:
        return None
    try:
        rows, columns = map(int, block)
    except (TypeError, ValueError):
        rows = columns = 0
    if rows < 1 or columns < 1:
        raise keys.error("block_structure", f"{block!r:.80} is not rows and columns")
    return rows, columns


def _with_inputs(
    module: str,
    stored: Stored,
    shape: tuple[int, ...],
    plan: Layer,
    args: QuantizationArgs | None,
) -> Layer:
    """The layer with what its inputs are rounded to."""
    lead = shape[:-2]
    if args is None:
        return replace(plan, ignores=(*plan.ignores, *ct_layouts.INPUT_TENSORS))
    act = ct_config.act_spec(args, next(iter(stored.values())).file)
    reads = []
    one = (tuple(lead), (*lead, 1), (*lead, 1, 1))
    if not act.dynamic:
        expect(module, stored, "input_scale", PLAIN, *one)
        reads.append("input_scale")
        if not act.symmetric:
            expect(module, stored, "input_zero_point", ("i8", "u8", "i32"), *one)
            reads.append("input_zero_point")
    if act.scale == "fp8_e4m3":
        expect(module, stored, "input_global_scale", PLAIN, *one)
        reads.append("input_global_scale")
    decode = plan.decode

    def with_inputs(arrays: Arrays) -> QArray:
        weight = decode(arrays)
        aux = dict(weight.aux)
        if "input_scale" in reads:
            aux["act_scale"] = weights.scalar(arrays["input_scale"], lead)
        if "input_zero_point" in reads:
            aux["act_zero_point"] = weights.scalar(arrays["input_zero_point"], lead)
        if "input_global_scale" in reads:
            divisor = weights.scalar(arrays["input_global_scale"], lead)
            if not (divisor > 0).all():
                raise fault(stored["input_global_scale"], "is not above 0")
            aux["act_global_scale"] = 1 / divisor
        return replace(weight, act=act, aux=aux)

    unused = tuple(s for s in ct_layouts.INPUT_TENSORS if s not in reads)
    return Layer((*plan.reads, *reads), with_inputs, (*plan.ignores, *unused))
