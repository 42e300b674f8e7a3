"""GPTQ checkpoints, as AutoGPTQ, GPTQModel and AutoRound write them.

W[n, k] = (q[k, n] - z[g[k], n]) * s[g[k], n]. Codes lie in 32-bit words along K (`qweight`), zero
points in words along N (`qzeros`); g (`g_idx`) is the group of each input column.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import ml_dtypes
import numpy as np

from pallas_kernels import codes
from qjax.errors import UnsupportedError
from qjax.formats import awq, exact, weights
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
    is_plain,
    no_checkpoint,
)
from qjax.formats.dynamic import Dynamic, LayerSettings, bits_of, config_for, find, read
from qjax.formats.history import HISTORY
from qjax.lazy import LazyArray
from qjax.qarray import QArray
from qjax.registry import quantization_config, register_quantization_config

WORDS = ("i32", "u32", "i16", "i8", "i64")

# Widths of the planes that 32 codes are cut into in the planar packing, low bits first.
_PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


@dataclass(frozen=True)
class Settings:
    """How one layer is stored.

    Attributes:
      zero_offset: what stored zero points lack (1 in the first version of the format).
      planar: the widths in bits whose codes lie in planes.
      asymmetric: whether zero points are kept even where all of them mean the middle code, so that
        layers of one checkpoint (experts) are alike.
      act_order: whether columns were sorted by importance, so that their groups must be told.
      scale_dtype: the dtype that scales are rounded to when they are read, or "" for none:
        GPTQModel and vLLM hold them in the dtype of the model.
    """

    bits: int
    group_size: int
    zero_offset: int = 1
    planar: tuple[int, ...] = ()
    asymmetric: bool = False
    act_order: bool = False
    scale_dtype: str = ""


@register_quantization_config("gptq", "auto_gptq", "gptq_marlin")
@dataclass(frozen=True)
class GPTQ(QuantizationConfig):
    """Settings of one checkpoint.

    Attributes:
      settings: of layers that `dynamic` does not name.
      dynamic: what differs, by patterns of the names of layers.
      values: the configuration as it was read.
    """

    settings: Settings
    dynamic: Dynamic
    values: Mapping[str, Any]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], checkpoint: Checkpoint) -> Self:
        keys = Keys(config, checkpoint.file)
        layout = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
        if layout in awq.VERSIONS:
            return quantization_config("awq").from_config({"version": layout, **config}, checkpoint)
        if layout.startswith("marlin") or config.get("is_marlin_format") is True:
            return quantization_config("marlin").from_config(config, checkpoint)
        if layout not in ("gptq", "gptq_v2", "gptq_p"):
            raise UnsupportedError(
                f"{checkpoint.file}: checkpoint_format {layout!r:.80} is not supported; these are: "
                f"gptq, gptq_v2, gptq_p, marlin, {', '.join(awq.VERSIONS)}"
            )
        keys.ignore(*HISTORY)
        default = LayerSettings(
            bits_of(keys, keys.get("bits", int)),
            weights.require_group_size(keys, keys.get("group_size", int, 128)),
            keys.get("sym", bool, True),
            keys.get("desc_act", bool, False),
        )
        dynamic = read(keys, default)
        settings = Settings(
            default.bits,
            default.group_size,
            1 if layout == "gptq" else 0,
            tuple(_PLANES) if layout == "gptq_p" else _planar_widths(config),
            not default.sym,
            default.desc_act,
            checkpoint.dtype if checkpoint.dtype in ("bfloat16", "float16") else "",
        )
        keys.done()
        return cls(settings, dynamic, config)

    def settings_of(self, module: str) -> Settings | None:
        """The settings of a layer, or None for one that is left unquantized."""
        general = self.settings
        default = LayerSettings(
            general.bits, general.group_size, not general.asymmetric, general.act_order
        )
        own = find(self.dynamic, module, default)
        return own and replace(
            general,
            bits=own.bits,
            group_size=own.group_size,
            asymmetric=not own.sym,
            act_order=own.desc_act,
        )

    def layer(self, module: str, stored: Stored, shape: tuple[int, ...]) -> Layer | None:
        if "qweight" not in stored:
            return None
        settings = self.settings_of(module)
        if settings is None:
            raise fault(stored["qweight"], "is quantized, but `dynamic` excludes this layer")
        return layer(module, stored, shape, settings)

    def to_config(self) -> dict[str, Any]:
        return dict(self.values)

    @classmethod
    def adapted(cls, module: str, weight: QArray, lossy: bool, dtype: str) -> QArray:
        return exact.integers(module, weight, lossy, dtype)

    @classmethod
    def for_weights(cls, weights: Mapping[str, QArray], kv_scales: int = 0) -> Self:
        """In the first version of the format; with zero points in the second, since other tools do
        not agree on how the first stores one of 0.
        """
        zeros = any(weight.zero_point is not None for weight in weights.values())
        layout = "gptq_v2" if zeros else "gptq"
        config = config_for("GPTQ", weights, kv_scales) | {
            "quant_method": "gptq",
            "checkpoint_format": layout,
            "format": layout,
            "pack_dtype": "int32",
            "lm_head": "lm_head" in weights and not is_plain(weights["lm_head"]),
        }
        made = cls.from_config(config, no_checkpoint())
        for module, weight in weights.items():
            settings = made.settings_of(module)
            if settings is not None and not is_plain(weight):
                _require_layout(module, weight, settings)
        return made

    def encode(self, module: str, weight: QArray) -> dict[str, np.ndarray]:
        settings = self.settings_of(module)
        if settings is None:
            raise UnsupportedError(f"{module}: `dynamic` excludes this layer")
        return encode(module, weight, settings)


def _planar_widths(config: Mapping[str, Any]) -> tuple[int, ...]:
    """GPTQModel has planes for the widths that AutoGPTQ does not know."""
    return (5, 6, 7) if awq.by_gptqmodel(config) else ()


def layer(module: str, stored: Stored, shape: tuple[int, ...], settings: Settings) -> Layer:
    """Plans a layer in GPTQ's layout; other formats use it, too."""
    n, k = shape[-2:]
    bits = settings.bits
    size = weights.columns(settings.group_size, k)
    groups = -(-k // size)
    record = expect(module, stored, "qweight", WORDS)
    word = weights.width(record)
    if k * bits % word or n * bits % word:
        raise fault(record, f"{(n, k)} weights of {bits} bits do not fill whole words")
    if bits in settings.planar and (word != 32 or k % 32 or n % 32):
        raise fault(
            record, f"{(n, k)} codes in {record.qtype} are not blocks of 32 in 32-bit words"
        )
    if word != 32 and word % bits:
        raise UnsupportedError(
            f"{record.file}, {record.name}: {bits} bits in words of {word} bits are not supported; "
            "in words of 32 bits they are"
        )
    expect(module, stored, "qweight", WORDS, (k * bits // word, n))
    expect(module, stored, "qzeros", record.qtype, (groups, n * bits // word))
    expect(module, stored, "scales", PLAIN, (groups, n))
    reads = ["qweight", "qzeros", "scales"]
    if "g_idx" in stored or (settings.act_order and groups > 1):
        expect(module, stored, "g_idx", ("i32", "i64"), (k,))
        reads.append("g_idx")

    def decode(arrays: Arrays) -> QArray:
        planes = _PLANES[bits] if bits in settings.planar else None
        stream: Any = _lazy_stream(arrays["qweight"], k, bits, planes)
        zero = _zeros(arrays["qzeros"], n, settings, planes)
        aux = {}
        if "g_idx" in arrays:
            g_idx = arrays["g_idx"]
            stream, aux = weights.sort_columns(stream, bits, stored["g_idx"], g_idx, size)
        half = 1 << (bits - 1)
        symmetric = not settings.asymmetric and bool((zero == half).all())
        return weights.coded(
            stream,
            f"uint{bits}b{half}" if symmetric else f"uint{bits}",
            (n, k),
            _lazy_scale(arrays["scales"], settings.scale_dtype),
            (1, size),
            zero_point=None if symmetric else zero,
            aux=aux,
        )

    return Layer(tuple(reads), decode)


def _lazy_stream(words: np.ndarray, k: int, bits: int, planes: tuple[int, ...] | None) -> LazyArray:
    """Codes in words along K, [W, N], as a dense stream of bits for each output."""
    size = words.dtype.itemsize

    def read(rows: slice, inside: slice) -> np.ndarray:
        here = np.ascontiguousarray(words[inside.start // size : inside.stop // size, rows].T)
        return _stream(here, (inside.stop - inside.start) * 8 // bits, bits, planes)

    unit = 4 * bits if planes else size
    return LazyArray(read, (words.shape[1], k * bits // 8), np.dtype(np.uint8), (1, unit))


def _lazy_scale(scale: np.ndarray, dtype: str) -> LazyArray:
    """Scales [G, N] for each output, see `scale_in`."""

    def read(rows: slice, groups: slice) -> np.ndarray:
        return scale_in(np.asarray(scale[groups, rows]).T, dtype)

    kept = scale_in(np.empty(0, scale.dtype), dtype).dtype
    return LazyArray(read, (scale.shape[1], scale.shape[0]), kept)


def _stream(words: np.ndarray, count: int, bits: int, planes: tuple[int, ...] | None) -> np.ndarray:
    """Codes in words [..., W] as a dense stream of bits: uint8 [..., row_bytes]."""
    raw = words.view(np.uint8)
    if planes is None:
        return raw
    # 32 codes take `bits` words of 32 bits: those of each plane follow each other.
    blocks = raw.reshape(*raw.shape[:-1], -1, 4 * bits)
    values, at, shift = np.zeros((*blocks.shape[:-1], 32), np.uint8), 0, 0
    for width in planes:
        plane = blocks[..., 4 * at : 4 * (at + width)]
        values |= codes.unpack(plane, width, 32, np) << np.uint8(shift)
        at, shift = at + width, shift + width
    return codes.pack(values.reshape(*raw.shape[:-1], count), bits)


def _zeros(
    qzeros: np.ndarray, n: int, settings: Settings, planes: tuple[int, ...] | None
) -> np.ndarray:
    """Zero points uint8 [N, G].

    Where stored ones are one too small, the whole word is added to, borrows included: a zero point
    of 0 was stored as -1 and took from its neighbour.
    """
    words = np.ascontiguousarray(qzeros)
    words = words.view(np.dtype(f"u{words.itemsize}"))
    bits = settings.bits
    whole = 32 % bits == 0
    if settings.zero_offset and whole:
        words = words + codes.pack(np.ones(n, np.uint8), bits).view(words.dtype)
    values = codes.unpack(_stream(words, n, bits, planes), bits, n, np)
    if settings.zero_offset and not whole:  # codes cross words: each is added to alone
        values = (values + np.uint8(1)) & np.uint8((1 << bits) - 1)
    return np.ascontiguousarray(values.T)


def scale_in(scale: np.ndarray, dtype: str) -> np.ndarray:
    """Scales as a tool holds them that loads a model in this dtype ("" for as they are)."""
    if not dtype or scale.dtype.name == dtype or scale.dtype == np.float32:
        return scale
    return scale.astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))


def _require_layout(module: str, weight: QArray, settings: Settings) -> None:
    """Raises UnsupportedError for a weight that `encode` has no tensors for."""
    bits = settings.bits
    n, k = weight.shape
    names = {f"uint{bits}", f"uint{bits}b{1 << (bits - 1)}"}
    group = weight.group or (0, 0)
    if weight.qtype not in names or group[0] != 1 or weight.additive or bits in settings.planar:
        raise UnsupportedError(
            f"{module}: GPTQ of {bits} bits has no layout for {weight.qtype} in groups of {group}"
        )
    if group[1] != weights.columns(settings.group_size, k):
        raise UnsupportedError(
            f"{module}: has groups of {group[1]}, but the config says {settings.group_size}"
        )
    if k * bits % 32 or n * bits % 32 or weight.aux.keys() - {"perm"}:
        raise UnsupportedError(f"{module}: GPTQ has no layout for {(n, k)} weights as these")


def encode(module: str, weight: QArray, settings: Settings) -> dict[str, np.ndarray]:
    """The tensors that `layer` reads, for integers in groups of columns."""
    _require_layout(module, weight, settings)
    bits, n = settings.bits, weight.shape[0]
    stream, g_idx = weights.unsort_columns(weight)
    scale = np.asarray(weight.scale)
    zero = np.full(scale.shape, 1 << (bits - 1), np.uint8)
    if weight.zero_point is not None:
        zero = np.asarray(weight.zero_point)
    if 32 % bits and settings.zero_offset:
        zero = (zero - np.uint8(1)) & np.uint8((1 << bits) - 1)
    words = np.ascontiguousarray(codes.pack(np.ascontiguousarray(zero.T), bits)).view(np.uint32)
    if 32 % bits == 0 and settings.zero_offset:
        words = words - codes.pack(np.ones(n, np.uint8), bits).view(np.uint32)
    return {
        "qweight": np.ascontiguousarray(np.ascontiguousarray(stream).view(np.int32).T),
        "qzeros": words.view(np.int32),
        "scales": np.ascontiguousarray(scale.T),
        "g_idx": g_idx,
    }
