"""AWQ checkpoints of AutoAWQ, llm-awq, GPTQModel and AutoRound, in three layouts.

W[n, k] = (q - z) * s, with a scale and a zero point for each group of input columns (Lin et al.,
arXiv 2306.00978). Scales of inputs are part of the layers before and need nothing at run time.
Nearly all have 4 bits; of other widths, GPTQModel packs a plain stream, AutoRound (5 to 7 bits) one
of interleaved columns, and what others do is not certain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from pallas_kernels import codes
from qjax.errors import UnsupportedError
from qjax.formats import exact, weights
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
    is_embedding,
    is_plain,
    no_checkpoint,
)
from qjax.formats.dynamic import Dynamic, LayerSettings, find, read, settings_for
from qjax.formats.history import HISTORY
from qjax.lazy import LazyArray
from qjax.qarray import QArray
from qjax.registry import register_quantization_config

VERSIONS = ("gemm", "gemv", "gemv_fast", "llm-awq")
_FUSING = ("do_fuse", "modules_to_fuse", "fuse_max_seq_len")
# Runs of 8 columns, in the order in which they are packed.
_INTERLEAVED = [0, 2, 4, 6, 1, 3, 5, 7]
# Columns in the order in which the fast layout stores runs of 32.
_FAST = np.arange(32).reshape(4, 4, 2).swapaxes(0, 1).reshape(4, 8)[:, _INTERLEAVED]
_FAST = _FAST.reshape(32)


@register_quantization_config("awq", "auto_awq", "awq_marlin", "llm-awq")
@dataclass(frozen=True)
class AWQ(QuantizationConfig):
    """Settings of one checkpoint.

    Attributes:
      group_size: columns that share a scale; -1 for all.
      version: one of `VERSIONS`.
      symmetric: whether the config says that there are no zero points.
      bits: of a code; `interleaved` says in which order columns are packed in the gemm layout.
      excluded: parts of the names of layers that are not quantized.
      values: the configuration as it was read.
      dynamic: what differs, by patterns of the names of layers.
    """

    group_size: int
    version: str
    excluded: tuple[str, ...]
    values: Mapping[str, Any]
    symmetric: bool = False
    bits: int = 4
    interleaved: bool = True
    dynamic: Dynamic = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any], checkpoint: Checkpoint) -> Self:
        keys = Keys(config, checkpoint.file)
        keys.ignore(*HISTORY, *_FUSING)
        bits = keys.get("bits", int) or keys.get("w_bit", int, 4)
        keys.ignore("bits", "w_bit", "group_size", "q_group_size")
        size = keys.get("group_size", int) or keys.get("q_group_size", int, 128)
        weights.require_group_size(keys, size)
        names = (keys.get(key, str, "") for key in ("version", "checkpoint_format", "format"))
        # Other names are those of kernels, which all read the first layout.
        version = next((name.lower() for name in names if name.lower() in VERSIONS), "gemm")
        if str(config.get("backend", "")) == "llm-awq" and "version" not in config:
            version = "llm-awq"
        symmetric = not keys.get("zero_point", bool, True)
        excluded = tuple(map(str, keys.get("modules_to_not_convert", list, [])))
        dynamic = read(keys, LayerSettings(bits, size, symmetric, False))
        keys.done()
        interleaved = bits == 4
        for each in {bits, *(own.bits for _, own in dynamic if own)} - {4}:
            interleaved = _is_interleaved(each, version, config, checkpoint.file)
        return cls(size, version, excluded, config, symmetric, bits, interleaved, dynamic)

    def layer(self, module: str, stored: Stored, shape: tuple[int, ...]) -> Layer | None:
        if "qweight" not in stored:
            return None
        if any(part in module for part in self.excluded):
            raise fault(
                stored["qweight"], "is quantized, but modules_to_not_convert names this layer"
            )
        own = self._of(module)
        if own is None:
            raise fault(stored["qweight"], "is quantized, but `dynamic` excludes this layer")
        size, bits = own.group_size, own.bits
        if self.version == "gemm":
            return gemm(module, stored, shape, size, own.sym, bits, self._interleaves(bits))
        if self.version == "gemv":
            return _gemv(module, stored, shape, size, own.sym)
        return _gemv_fast(module, stored, shape, size)

    def _of(self, module: str) -> LayerSettings | None:
        """The settings of a layer, or None for one that is left unquantized."""
        default = LayerSettings(self.bits, self.group_size, self.symmetric, False)
        return find(self.dynamic, module, default)

    def _interleaves(self, bits: int) -> bool:
        return bits == 4 or self.interleaved

    def to_config(self) -> dict[str, Any]:
        return dict(self.values)

    @classmethod
    def adapted(cls, module: str, weight: QArray, lossy: bool, dtype: str) -> QArray:
        return exact.with_zero_points(exact.integers(module, weight, lossy, ""))

    @classmethod
    def for_weights(cls, weights: Mapping[str, QArray], kv_scales: int = 0) -> Self:
        """In AutoAWQ's gemm layout, with 4 bits and zero points (8 where there are none)."""
        found = settings_for("AWQ", weights, kv_scales)
        sizes = {
            module: -1 if own.group_size == weights[module].shape[1] else own.group_size
            for module, own in found.items()
        }
        first = next(iter(found))
        for module, own in found.items():
            if own.bits != 4 or own.desc_act:
                what = "columns in another order" if own.desc_act else f"{own.bits} bits"
                raise UnsupportedError(f"{module}: AWQ has no layout for {what}")
            if sizes[module] != sizes[first]:
                raise UnsupportedError(
                    f"{module}: AWQ has one size of groups, but these have {own.group_size} columns"
                    f" and those of {first} {found[first].group_size}"
                )
        # A name is taken for any that it is a part of: routers ("mlp.gate") are left out.
        plain = [m for m, w in weights.items() if is_plain(w) and not is_embedding(m)]
        excluded = [m for m in plain if not any(m in module for module in found)]
        config = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": sizes[first],
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": excluded or None,
        }
        return cls.from_config(config, no_checkpoint())

    def encode(self, module: str, weight: QArray) -> dict[str, np.ndarray]:
        if self.version != "gemm":
            raise UnsupportedError(f"{module}: of AWQ's layouts qjax writes gemm only")
        own = self._of(module)
        if own is None:
            raise UnsupportedError(f"{module}: `dynamic` excludes this layer")
        (n, k), bits, half = weight.shape, own.bits, 1 << (own.bits - 1)
        wanted = (f"uint{bits}", f"uint{bits}b{half}")
        if weight.qtype not in wanted or weight.additive or weight.aux or n * bits % 32:
            raise UnsupportedError(f"{module}: AWQ has no layout for {weight.qtype} weights")
        if weight.group != (1, weights.columns(own.group_size, k)):
            raise UnsupportedError(
                f"{module}: has groups of {weight.group}, but the config says {own.group_size}"
            )
        scale = np.asarray(weight.scale)
        zero = np.full(scale.shape, half, np.uint8)
        if weight.zero_point is not None:
            zero = np.asarray(weight.zero_point)
        values = codes.unpack(np.asarray(weight.qvalue), bits, k, np)
        return {
            "qweight": _words(values.T, bits, self._interleaves(bits)),
            "qzeros": _words(zero.T, bits, self._interleaves(bits)),
            "scales": np.ascontiguousarray(scale.T),
        }


def by_gptqmodel(config: Mapping[str, Any]) -> bool:
    """Whether the config says that GPTQModel wrote the checkpoint."""
    meta = config.get("meta")
    return isinstance(meta, Mapping) and "gptqmodel" in str(meta.get("quantizer", ""))


def _is_interleaved(bits: int, version: str, config: Mapping[str, Any], file: str) -> bool:
    """The order of columns of another width than 4 bits, by the tool that wrote it."""
    if version == "gemm" and by_gptqmodel(config) and bits in range(2, 9):
        return False
    if version == "gemm" and config.get("provider") == "auto-round" and bits in (5, 6, 7):
        return True
    raise UnsupportedError(
        f"{file}: AWQ of {bits!r:.80} bits is not supported, since tools do not agree on how it is "
        "stored; 4 bits are, and where the config tells that GPTQModel or AutoRound wrote it"
    )


def gemm(
    module: str,
    stored: Stored,
    shape: tuple[int, ...],
    group_size: int,
    symmetric: bool,
    bits: int = 4,
    interleaved: bool = True,
) -> Layer:
    """Words along N with interleaved columns; other formats use it, too."""
    n, k = shape[-2:]
    size = weights.columns(group_size, k)
    groups = -(-k // size)
    record = expect(module, stored, "qweight", ("i32", "u32"))
    if n * bits % 32:
        raise fault(record, f"{n} outputs of {bits} bits do not fill whole words")
    words = n * bits // 32
    expect(module, stored, "qweight", ("i32", "u32"), (k, words))
    expect(module, stored, "scales", PLAIN, (groups, n))
    reads = ["qweight", "scales"]
    if "qzeros" in stored or not symmetric:
        expect(module, stored, "qzeros", ("i32", "u32"), (groups, words))
        reads.append("qzeros")

    def decode(arrays: Arrays) -> QArray:
        def values(rows: slice, columns: slice) -> np.ndarray:
            words = slice(rows.start * bits // 32, rows.stop * bits // 32)
            return _columns(arrays["qweight"][columns, words], bits, interleaved).T

        packed, zero = weights.repacked((n, k), bits, values, rows=32), None
        if "qzeros" in arrays:
            zero = _columns(arrays["qzeros"], bits, interleaved).T
        if symmetric:
            zero = _no_zeros(stored, zero, bits)
        return _weight(packed, arrays["scales"].T, zero, shape, size, bits)

    return Layer(tuple(reads), decode)


def _columns(words: np.ndarray, bits: int, interleaved: bool) -> np.ndarray:
    """[R, N * bits / 32] words -> uint8 [R, N]."""
    stream = np.ascontiguousarray(words).view(np.uint8)
    packed = codes.unpack(stream, bits, 8 * stream.shape[1] // bits, np)
    if not interleaved:
        return packed
    values = np.empty_like(packed).reshape(len(packed), -1, 8)
    values[..., _INTERLEAVED] = packed.reshape(values.shape)
    return values.reshape(packed.shape)


def _words(values: np.ndarray, bits: int, interleaved: bool) -> np.ndarray:
    """What `_columns` undoes: int32 [R, N * bits / 32]."""
    if interleaved:
        runs = values.reshape(len(values), -1, 8)
        values = runs[..., _INTERLEAVED].reshape(len(values), -1)
    return np.ascontiguousarray(codes.pack(np.ascontiguousarray(values), bits)).view(np.int32)


def _weight(
    packed: Any,
    scale: np.ndarray,
    zero: np.ndarray | None,
    shape: tuple[int, ...],
    size: int,
    bits: int = 4,
) -> QArray:
    """Packed codes [N, row_bytes], scales [N, G] and zero points [N, G] as a QArray."""
    return weights.coded(
        packed,
        f"uint{bits}b{1 << (bits - 1)}" if zero is None else f"uint{bits}",
        shape,
        LazyArray.of(scale),
        (1, size),
        zero_point=None if zero is None else np.ascontiguousarray(zero),
    )


def _no_zeros(stored: Stored, zero: np.ndarray | None, bits: int = 4) -> None:
    """Zero points that may be stored where the config says that there are none."""
    half = 1 << (bits - 1)
    if zero is not None and (zero != half).any():
        raise fault(stored["qzeros"], f"has other zero points than {half}, but the config has none")


def _padded_groups(groups: int, size: int) -> int:
    """Groups that the gemv layouts have room for: 1, 2 or 4 words of zero points, or a multiple."""
    room = 8 * (1 if size >= 128 else 2 if size == 64 else 4)
    return -(-groups // room) * room


def _gemv(
    module: str, stored: Stored, shape: tuple[int, ...], group_size: int, symmetric: bool
) -> Layer:
    """Words along K in natural order."""
    n, k = shape[-2:]
    size = weights.columns(group_size, k)
    groups = -(-k // size)
    room = _padded_groups(groups, size)
    expect(module, stored, "qweight", ("i32", "u32"), (n, k // 8))
    expect(module, stored, "qzeros", ("i32", "u32"), (n, room // 8))
    expect(module, stored, "scales", PLAIN, (n, room))

    def decode(arrays: Arrays) -> QArray:
        zero_stream = np.ascontiguousarray(arrays["qzeros"]).view(np.uint8)
        zero = codes.unpack(zero_stream, 4, room, np)[:, :groups]
        if symmetric:
            zero = _no_zeros(stored, zero)
        return _weight(arrays["qweight"], arrays["scales"][:, :groups], zero, shape, size)

    return Layer(("qweight", "qzeros", "scales"), decode)


def _gemv_fast(module: str, stored: Stored, shape: tuple[int, ...], group_size: int) -> Layer:
    """Blocks of 4 rows and 64 columns in 16-bit words; zeros are stored as -scale * zero."""
    n, k = shape[-2:]
    size = weights.columns(group_size, k)
    groups = -(-k // size)
    room = _padded_groups(groups, size)
    record = expect(module, stored, "qweight", ("i16", "u16"))
    if n % 4 or k % 64:
        raise fault(record, f"{(n, k)} is no multiple of (4, 64), which this layout asks for")
    expect(module, stored, "qweight", ("i16", "u16"), (n // 4, k))
    zeros = "scaled_zeros" if "scaled_zeros" in stored else "qzeros"
    for suffix in ("scales", zeros):
        expect(module, stored, suffix, PLAIN, (room, n), (groups, n))

    def decode(arrays: Arrays) -> QArray:
        def values(rows: slice, columns: slice) -> np.ndarray:
            words = arrays["qweight"][rows.start // 4 : rows.stop // 4, columns]
            words = np.ascontiguousarray(words).view(np.uint16)
            nibbles = (words[..., None] >> np.array([0, 4, 8, 12], np.uint16)) & np.uint16(15)
            # [blocks of 4 rows, blocks of 64 columns, row, two runs of 32]
            runs = nibbles.astype(np.uint8).reshape(len(words), -1, 4, 2, 32)
            found = np.empty_like(runs)
            found[..., _FAST] = runs
            return found.transpose(0, 2, 1, 3, 4).reshape(4 * len(words), -1)

        packed = weights.repacked((n, k), 4, values, rows=4, columns=64)
        scale, zero = (LazyArray.of(arrays[suffix][:groups].T) for suffix in ("scales", zeros))
        return weights.coded(
            packed, "uint4", shape, scale, (1, size), zero_point=zero, additive=True
        )

    return Layer(("qweight", "scales", zeros), decode)
