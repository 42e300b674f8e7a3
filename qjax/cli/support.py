"""Which methods there are, what they store, and which checkpoints prove that they are read.

The weights of a method are listed by hand; whether it saves is asked from its class, and what runs
from the kernels. Tests hold the list against the checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pallas_kernels.inputs import ActSpec
from pallas_kernels.matmul.spec import WeightSpec
from qjax.params import PLAIN
from qjax.qtypes import QTYPES

N, K = 256, 512  # of the weights that kernels are asked about
CHANNEL, TENSOR = (1, K), (N, K)

_INT8 = ActSpec("int8", "token", True)
_INT8_STATIC = ActSpec("int8", "tensor", False)
_FP8 = ActSpec("fp8_e4m3", "token", True)
_FP8_STATIC = ActSpec("fp8_e4m3", "tensor", False)
_FP8_BLOCK = ActSpec("fp8_e4m3", "group", True, group_size=128)
_NVFP4 = ActSpec("fp4_e2m1", "group", True, group_size=16, scale="fp8_e4m3")


def _mx(dtype: str) -> ActSpec:
    return ActSpec(dtype, "group", True, group_size=32, scale="e8m0")


@dataclass(frozen=True)
class Kind:
    """Weights of one kind: how a kernel sees them, and what their inputs are rounded to."""

    label: str
    spec: WeightSpec
    act: ActSpec | None = None

    @property
    def key(self) -> tuple[str, bool, str | None]:
        """By which a loaded weight is told to be of this kind."""
        return self.spec.qtype, self.spec.zero_point is not None, self.act and self.act.dtype


@dataclass(frozen=True)
class Method:
    """A quantization method.

    Attributes:
      name: as in `quant_method`; "gguf" for GGUF files.
      tools: that write it.
      kinds: of weights it stores.
      prefixes: of the names of the checkpoints that prove it.
      writes: what alone of it is saved, or "" for all that is loaded.
    """

    name: str
    tools: str
    kinds: tuple[Kind, ...]
    prefixes: tuple[str, ...] = ()
    writes: str = ""


def _codes(
    label: str,
    qtype: str,
    group: tuple[int, int] = (1, 128),
    scale: str = "bfloat16",
    act: ActSpec | None = None,
    *,
    zero: str | None = None,
    global_scale: bool = False,
) -> Kind:
    spec = WeightSpec(
        qtype,
        (N, K),
        group=group,
        scale=scale,
        zero_point=zero,
        has_global_scale=global_scale,
    )
    return Kind(label, spec, act)


def _blocks(qtype: str) -> Kind:
    return Kind(qtype.upper(), WeightSpec(qtype, (N, K)))


def _integers(*bits: int, asymmetric: tuple[int, ...] = ()) -> tuple[Kind, ...]:
    plain = [_codes(f"W{b}A16", f"uint{b}b{1 << (b - 1)}") for b in bits]
    zeros = [_codes(f"W{b}A16 asymmetric", f"uint{b}", zero="uint8") for b in asymmetric]
    return *plain, *zeros


W8A8_FP8 = _codes("FP8", "fp8_e4m3", CHANNEL, act=_FP8)
W8A8_FP8_STATIC = _codes("FP8 static", "fp8_e4m3", TENSOR, act=_FP8_STATIC)
W8A8_FP8_BLOCK = _codes("FP8 block", "fp8_e4m3", (128, 128), act=_FP8_BLOCK)
W8A16_FP8 = _codes("FP8 W8A16", "fp8_e4m3", CHANNEL)
W8A8_INT8 = _codes("INT8", "int8", CHANNEL, act=_INT8)
W8A8_INT8_STATIC = _codes("INT8 static", "int8", CHANNEL, act=_INT8_STATIC)
W8A16_INT8 = _codes("INT8 W8A16", "int8", CHANNEL)
W4A8 = _codes("W4A8 int", "uint4b8", act=_INT8)
W4AFP8 = _codes("W4A8 fp", "uint4b8", act=_FP8)
MXFP4, MXFP6, MXFP8 = (
    _codes(label, qtype, (1, 32), "float8_e8m0fnu", _mx(qtype))
    for label, qtype in (("MXFP4", "fp4_e2m1"), ("MXFP6", "fp6_e2m3"), ("MXFP8", "fp8_e4m3"))
)
MXFP4_A16 = _codes("MXFP4 W4A16", "fp4_e2m1", (1, 32), "float8_e8m0fnu")
NVFP4 = _codes("NVFP4", "fp4_e2m1", (1, 16), "float8_e4m3fn", _NVFP4, global_scale=True)
NVFP4_A16 = _codes("NVFP4 W4A16", "fp4_e2m1", (1, 16), "float8_e4m3fn", global_scale=True)

METHODS = (
    Method("gptq", "GPTQModel, AutoGPTQ", _integers(2, 3, 4, 8, asymmetric=(4,)), ("gptq-",)),
    Method("awq", "AutoAWQ, GPTQModel", _integers(asymmetric=(4,)), ("awq-", "autoawq-"), "GEMM"),
    Method(
        "marlin",
        "AutoGPTQ, sparseml",
        (
            *_integers(4, 8),
            _codes("W4A16 2:4 sparse", "sparse24_uint4b8", scale="float16"),
            _codes("W8A16 2:4 sparse", "sparse24_uint8b128", scale="float16"),
        ),
    ),
    Method(
        "compressed-tensors",
        "LLM Compressor",
        (
            *_integers(3, 4, 8, asymmetric=(4,)),
            *(W8A8_INT8, W8A8_INT8_STATIC, W8A8_FP8, W8A8_FP8_STATIC, W8A8_FP8_BLOCK, W8A16_FP8),
            *(W4A8, W4AFP8, MXFP4, MXFP4_A16, MXFP8, NVFP4, NVFP4_A16),
        ),
        ("ct-", "ct09-", "ar-nvfp4-llmc", "ar-w4g32-llmc"),
    ),
    Method(
        "fp8",
        "transformers, vLLM, fbgemm",
        (W8A8_FP8, W8A8_FP8_STATIC, W8A8_FP8_BLOCK),
        ("fgfp8-", "fbgemm-"),
    ),
    Method(
        "modelopt",
        "NVIDIA ModelOpt",
        (
            *(W8A8_FP8, W8A8_FP8_STATIC, W8A16_FP8, W8A8_FP8_BLOCK),
            *(*_integers(4), W4AFP8, MXFP8, NVFP4, NVFP4_A16),
        ),
        ("mo-",),
    ),
    Method(
        "quark",
        "AMD Quark",
        (
            *_integers(4, asymmetric=(4,)),
            *(W8A8_INT8_STATIC, W8A8_FP8, W8A8_FP8_STATIC, MXFP4, MXFP6, NVFP4),
        ),
        ("quark-",),
    ),
    Method(
        "auto-round",
        "Intel AutoRound",
        (
            *_integers(2, 3, 4, 8, asymmetric=(4,)),
            *(W8A8_FP8_STATIC, W8A8_FP8_BLOCK, W8A16_FP8, MXFP4, MXFP8, NVFP4),
        ),
        ("ar-",),
    ),
    Method(
        "torchao",
        "TorchAO",
        (
            *_integers(2, 3, 4, 5, 6, 7, asymmetric=(4,)),
            *(W4A8, W8A8_INT8, W8A16_INT8, W8A8_FP8, W8A16_FP8),
            *(MXFP4_A16, MXFP4, MXFP8, NVFP4_A16, NVFP4),
        ),
        ("ao-",),
        "integers, FP8",
    ),
    Method(
        "bitsandbytes",
        "bitsandbytes",
        (_codes("NF4, FP4", "lookup4", (1, 64), "float32"), W8A8_INT8),
        ("bnb-",),
    ),
    Method(
        "hqq",
        "HQQ",
        (
            _codes("4 bits", "uint4", (1, 64), "float32", zero="float32"),
            _codes("8 bits", "uint8", (1, 64), "float32", zero="float32"),
        ),
        ("hqq-",),
    ),
    Method(
        "deepspeedfp",
        "DeepSpeed",
        tuple(
            _codes(f"FP{bits}", qtype, (1, K), "float32")
            for bits, qtype in (
                (4, "fp4_e2m1"),
                (6, "fp6_e3m2"),
                (8, "fp8_e4m3"),
                (12, "fp12_e7m4"),
            )
        ),
    ),
    Method("experts_int8", "at load", (W8A16_INT8,)),
    Method("mxfp4", "gpt-oss", (MXFP4_A16,), ("gptoss-",)),
    Method(
        "gguf",
        "llama.cpp",
        (
            *(
                _blocks(qtype.name)
                for qtype in QTYPES.values()
                if qtype.ggml_id is not None and qtype.name not in PLAIN
            ),
            *(_codes("MXFP4", "fp4_e2m1", (1, 32), "float8_e8m0fnu"),),
            *(_codes("NVFP4", "fp4_e2m1", (1, 16), "float8_e4m3fn"),),
        ),
        ("gguf-",),
    ),
)


def methods() -> tuple[Method, ...]:
    """Those of qjax, and those of plugins, of whose weights nothing is known beforehand."""
    from qjax import registry

    listed = {method.name for method in METHODS}
    plugins = [name for name, config in registry.added().items() if name == config.name]
    return METHODS + tuple(Method(name, "plugin", ()) for name in plugins if name not in listed)


def saves(name: str) -> bool:
    """Whether a method's class writes weights."""
    from qjax.formats.base import QuantizationConfig
    from qjax.registry import quantization_config

    return name == "gguf" or quantization_config(name).encode is not QuantizationConfig.encode


def support_table() -> Iterator[str]:
    """Lines of Markdown: what is loaded, run and saved, and how it is known."""
    yield "| Method | Written by | Loaded and run | Saved | Held against |"
    yield "| --- | --- | --- | --- | --- |"
    for method in METHODS:
        weights = ", ".join(kind.label for kind in method.kinds)
        proof = ", ".join(f"`{prefix}*`" for prefix in method.prefixes) or "its definition"
        saved = (method.writes or "yes") if saves(method.name) else "no"
        yield f"| `{method.name}` | {method.tools} | {weights} | {saved} | {proof} |"
