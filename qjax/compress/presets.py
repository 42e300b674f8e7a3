"""Named schemes: those of compressed-tensors, and the types and mixes of GGUF files.

The settings are those of compressed-tensors 0.19 (`quant_scheme.py`); observers are left out where
they are the usual ones.
"""

from __future__ import annotations

from dataclasses import replace

from qjax.compress.gguf_mixes import ALIASES, MIXES
from qjax.errors import RecipeError, nearest
from qjax.scheme import QuantizationArgs, QuantizationScheme


def _integers(bits: int, activation_bits: int = 16, symmetric: bool = True) -> QuantizationScheme:
    """Weights in groups of 128; activations of fewer than 16 bits by token."""
    weights = QuantizationArgs(bits, symmetric=symmetric, group_size=128)
    return QuantizationScheme((), weights, _by_token("int", activation_bits))


def _by_token(kind: str, bits: int) -> QuantizationArgs | None:
    return None if bits == 16 else QuantizationArgs(bits, kind, strategy="token", dynamic=True)


def _floats(bits: int, inputs: bool, size: int, strategy: str, scales: str) -> QuantizationScheme:
    """Weights, and maybe inputs, of small floats in groups."""
    weights = QuantizationArgs(bits, "float", True, strategy, size, scale_dtype=scales)
    if not inputs:
        return QuantizationScheme((), weights)
    if strategy == "tensor_group":
        return QuantizationScheme(
            (), weights, replace(weights, dynamic="local", observer="static_minmax")
        )
    return QuantizationScheme((), weights, replace(weights, dynamic=True))


_FP8 = QuantizationArgs(8, "float")
_NVFP4 = ("tensor_group", "torch.float8_e4m3fn")
_MX = ("group", "torch.uint8")
_W8A8 = QuantizationScheme((), QuantizationArgs(strategy="channel"), _by_token("int", 8))

PRESETS: dict[str, QuantizationScheme] = {
    "UNQUANTIZED": QuantizationScheme(()),
    **{
        f"W{bits}A{inputs}": _integers(bits, inputs)
        for bits in range(2, 9)
        for inputs in (4, 8, 16)
        if bits <= inputs
    },
    "W8A8": _W8A8,
    "INT8": _W8A8,
    "W4A16_ASYM": _integers(4, symmetric=False),
    "W4AFP8": replace(_integers(4), input_activations=_by_token("float", 8)),
    "FP8": QuantizationScheme((), _FP8, replace(_FP8, observer="static_minmax")),
    "FP8_DYNAMIC": QuantizationScheme((), replace(_FP8, strategy="channel"), _by_token("float", 8)),
    "FP8_BLOCK": QuantizationScheme(
        (),
        replace(_FP8, strategy="block", block_structure=(128, 128)),
        replace(_FP8, strategy="group", group_size=128, dynamic=True),
    ),
    "NVFP4A16": _floats(4, False, 16, *_NVFP4),
    "NVFP4": _floats(4, True, 16, *_NVFP4),
    "MXFP4A16": _floats(4, False, 32, *_MX),
    "MXFP4": _floats(4, True, 32, *_MX),
    "MXFP8A16": _floats(8, False, 32, *_MX),
    "MXFP8": _floats(8, True, 32, *_MX),
}
"""Schemes of compressed-tensors by name, without targets."""

_PLAIN = ("F32", "F16", "BF16")
GGML: tuple[str, ...] = tuple(name for name in (*MIXES, *ALIASES) if name not in _PLAIN)
"""Names of the types of GGUF files, and of llama-quantize's mixes of them."""


def preset(name: str, targets: tuple[str, ...] = ("Linear",)) -> QuantizationScheme:
    """The scheme of this name, upper or lower case, for some layers.

    Raises:
      RecipeError: there is none.
    """
    wanted = name.upper()
    if wanted in PRESETS:
        return replace(PRESETS[wanted], targets=targets)
    if wanted in GGML:
        return QuantizationScheme(targets, ggml=wanted)
    known = (*PRESETS, *GGML)
    raise RecipeError(
        f"scheme {name!r:.80} is unknown{nearest(wanted, known)}; known are {', '.join(known)}"
    )


def is_preset(name: str) -> bool:
    """Whether `preset` knows this name."""
    return name.upper() in PRESETS or name.upper() in GGML
