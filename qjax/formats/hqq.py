"""HQQ checkpoints (Badri & Shaji, Half-Quadratic Quantization): W = (q - zero) * scale.

The weight is seen as a matrix whose rows (axis 1) or columns (axis 0) are the groups: with axis 1
[N * K / g, g], so that a group is a run of inputs; with axis 0 [g, N * K / g], so that it takes one
weight from each of g slabs of N / g rows. Zero points are floats. What a layer is stored with, its
settings included, are tensors of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

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
    Record,
    Stored,
    expect,
    fault,
    is_embedding,
    is_plain,
    no_checkpoint,
)
from qjax.lazy import as_bytes
from qjax.qarray import QArray
from qjax.registry import register_quantization_config


class _Packing(NamedTuple):
    """Codes of `bits` bits, `count` of them in a word; the first lies highest."""

    word: str
    bits: int
    count: int


_PACKINGS = {
    "8bit_u8": _Packing("u8", 8, 1),
    "4bit_u8": _Packing("u8", 4, 2),
    "3bit_32": _Packing("i32", 3, 10),
    "2bit_u8": _Packing("u8", 2, 4),
    "1bit_u8": _Packing("u8", 1, 8),
}
_WORDS = {"u8": np.dtype(np.uint8), "i32": np.dtype(np.uint32)}

# Settings that change nothing about how a layer is read.
_HISTORY = ("compute_dtype", "optimize", "round_zero", "offload_meta", "unpack_view_dtype")
_FLAGS = ("encoded_state_dict", "stores_quant_config")


class _Settings(NamedTuple):
    """Of one layer; `group_size` is None where rows or columns are not cut into groups."""

    nbits: float
    group_size: int | None
    axis: int


@register_quantization_config("hqq")
@dataclass(frozen=True)
class HQQ(QuantizationConfig):
    """Settings of one checkpoint, which those stored with each layer are checked against.

    Attributes:
      settings: by the end of a layer's name ("self_attn.q_proj"); "" for every other.
      skipped: layers that are not quantized, by parts of their names.
      checkpoint: where settings of layers are read from.
      values: the configuration as it was read.
    """

    settings: Mapping[str, _Settings]
    skipped: tuple[str, ...]
    checkpoint: Checkpoint
    values: Mapping[str, Any]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], checkpoint: Checkpoint) -> Self:
        keys = Keys(config, checkpoint.file)
        keys.ignore("quant_method")
        given = keys.section("quant_config")
        skipped = keys.get("skip_modules", list, [])
        keys.done()
        if "weight_quant_params" in given.values:
            return cls({"": _settings(given)}, tuple(map(str, skipped)), checkpoint, config)
        settings = {name: _settings(given.section(name)) for name in given.values}
        return cls(settings, tuple(map(str, skipped)), checkpoint, config)

    def layer(self, module: str, stored: Stored, shape: tuple[int, ...]) -> Layer | None:
        if "W_q" not in stored:
            return None
        if any(module == name or module.endswith(f".{name}") for name in self.skipped):
            raise fault(stored["W_q"], "is quantized, but skip_modules names this layer")
        n, k = shape[-2:]
        read = _Settled(module, stored, self.checkpoint)
        nbits, axis = read.number("nbits"), int(read.number("axis"))
        size = int(read.number("group_size")) if "group_size" in stored else None
        record = stored["W_q"]
        for name in ("quant_scale", "quant_zero"):
            if read.number(name):
                raise UnsupportedError(
                    f"{record.file}, {module}: {name} is set, but quantized scales and zero points "
                    "are not supported; float ones are"
                )
        if axis not in (0, 1) or (size is not None and size < 1):
            raise fault(record, f"comes with axis {axis} and group_size {size}")
        self._check(module, record, _Settings(nbits, size, axis), (n, k))
        if tuple(read.array("shape").tolist()) != (n, k):
            raise fault(stored["shape"], f"differs from {(n, k)}, the model's sizes")
        packing = read.text("packing")
        if packing not in _PACKINGS or nbits > _PACKINGS[packing].bits:
            known = ", ".join(_PACKINGS)
            raise UnsupportedError(
                f"{record.file}, {module}: packing {packing!r:.80} of {nbits:g} bits is not "
                f"supported; these are: {known}"
            )
        channel_wise = bool(read.number("channel_wise"))
        size = size if channel_wise else None
        decode = _plan(module, stored, (n, k), _PACKINGS[packing], axis, size, channel_wise)
        names = ("nbits", "axis", "group_size", "quant_scale", "quant_zero", "shape", "packing")
        return Layer(
            ("W_q", "scale", "zero"),
            decode,
            (*names, "channel_wise", "view_as_float", *_HISTORY, *_FLAGS),
        )

    def _check(self, module: str, record: Record, found: _Settings, shape: tuple[int, int]) -> None:
        said = self._said(module)
        if said is not None and said.group_size is None and found.group_size == shape[found.axis]:
            found = found._replace(group_size=None)  # whole rows or columns
        if said is not None and said != found:
            raise fault(record, f"is stored with {found}, but the config says {said}")

    def _said(self, module: str) -> _Settings | None:
        """What the config says of a layer, by the end of its name, or of all."""
        return self.settings.get(_tag(module), self.settings.get(""))

    def to_config(self) -> dict[str, Any]:
        return dict(self.values)

    @classmethod
    def adapted(cls, module: str, weight: QArray, lossy: bool, dtype: str) -> QArray:
        weight = exact.codes_only(module, weight, lossy)
        zero, scale = weight.zero_point, weight.scale
        if zero is None or scale is None or (np.asarray(zero).astype(scale.dtype) == zero).all():
            return weight
        # Scales and zero points have one dtype, which has to hold both.
        return exact.with_scales(module, weight, "float32", lossy)

    @classmethod
    def for_weights(cls, weights: Mapping[str, QArray], kv_scales: int = 0) -> Self:
        if kv_scales:
            raise UnsupportedError("hqq: has no place for scales of a key-value cache")
        settings: dict[str, dict[str, Any]] = {}
        for module, weight in weights.items():
            if is_plain(weight):
                continue
            _require_layout(module, weight)
            assert weight.group is not None
            axis = 1 if weight.group[0] == 1 else 0
            own = {"nbits": codes.CODES[weight.qtype].bits, "axis": axis}
            own = {"weight_quant_params": own | {"group_size": weight.group[axis]}}
            if settings.setdefault(_tag(module), own) != own:
                raise UnsupportedError(
                    f"{module}: hqq has one setting for all layers of this name, but some have "
                    f"{settings[_tag(module)]} and this has {own}"
                )
        if not settings:
            raise UnsupportedError("hqq: no weight of this model is quantized")
        plain = [m for m, w in weights.items() if is_plain(w) and not is_embedding(m)]
        config = {"quant_method": "hqq", "quant_config": settings, "skip_modules": plain}
        return cls.from_config(config, no_checkpoint())

    def encode(self, module: str, weight: QArray) -> dict[str, np.ndarray]:
        return _encode(module, weight, self._said(module))


def _tag(module: str) -> str:
    """The end of a layer's name, by which it has settings of its own."""
    return re.sub(r"^.*\blayers\.\d+\.", "", module)


def _settings(keys: Keys) -> _Settings:
    """What the config says about layers: HQQ's own dict, nested by Hugging Face or not."""
    inner = keys.section("weight_quant_params") if "weight_quant_params" in keys.values else keys
    nbits = inner.get("nbits", (int, float), 4)
    size = inner.get("group_size", int)
    axis = inner.choice("axis", (0, 1), 1)
    inner.ignore(*_HISTORY, "channel_wise", "view_as_float")
    # HQQ of today takes the settings of quantized scales, but stores floats: each layer tells.
    keys.ignore("scale_quant_params", "zero_quant_params", "offload_meta")
    keys.done()
    inner.done()
    return _Settings(round(float(nbits), 4), size, axis)


@dataclass(frozen=True)
class _Settled:
    """Settings of one layer, which lie in tensors beside its codes."""

    module: str
    stored: Stored
    checkpoint: Checkpoint

    def array(self, suffix: str, *shapes: tuple[int, ...]) -> np.ndarray:
        dtypes = ("u8", "i32", "i64", "f32")
        record = expect(self.module, self.stored, suffix, dtypes, *shapes)
        if len(record.shape) > 1 or sum(record.shape) > 64:
            raise fault(record, f"has shape {tuple(record.shape)}, which no setting has")
        return self.checkpoint.read(record.name)

    def number(self, suffix: str) -> float:
        return round(float(self.array(suffix, (), (1,)).reshape(())), 4)

    def text(self, suffix: str) -> str:
        return bytes(self.array(suffix).astype(np.uint8)).decode("ascii", "replace")


def _plan(
    module: str,
    stored: Stored,
    shape: tuple[int, int],
    packing: _Packing,
    axis: int,
    size: int | None,
    per_axis: bool,
) -> Callable[[Arrays], QArray]:
    """Checks the shapes of codes and scales, and says how they decode."""
    n, k = shape
    record = stored["W_q"]
    times = 1  # groups that share a scale, where they are parts of one that crosses rows
    slabs = None  # rows that lie between two weights of a group, for axis 0
    matrix, group, scales = shape, shape, (1, 1)
    if size is not None:
        if n * k % size or (axis == 0 and n % size):
            raise UnsupportedError(
                f"{record.file}, {module}: groups of {size} along axis {axis} do not divide {shape}"
            )
        count = n * k // size
        if axis == 1:
            matrix, scales = (count, size), (count, 1)
            group, times = weights.flat_group(f"{record.file}, {module}", shape, size)
        else:
            matrix, group, scales, slabs = (size, count), (size, 1), (1, count), n // size
    elif per_axis:
        group, scales = ((1, k), (n, 1)) if axis == 1 else ((n, 1), (1, k))
    if k * packing.bits % 8 or (packing.word == "u8" and matrix[0] % packing.count):
        raise fault(record, f"{shape} weights of {packing.bits} bits do not fill whole bytes")
    words = -(-matrix[0] // packing.count), matrix[1]
    # `view_as_float` shows the same bytes as numbers of the model's dtype.
    expect(module, stored, "W_q", (packing.word, *PLAIN))
    columns = words[1] * 8 * _WORDS[packing.word].itemsize // weights.width(record)
    expect(module, stored, "W_q", (packing.word, *PLAIN), (words[0], columns))
    single = ((), (1,)) if scales == (1, 1) else ()
    for suffix in ("scale", "zero"):
        expect(module, stored, suffix, PLAIN, scales, *single)

    def decode(arrays: Arrays) -> QArray:
        raw = as_bytes(arrays["W_q"]).view(_WORDS[packing.word])
        scale, zero = (arrays[suffix] for suffix in ("scale", "zero"))
        if times > 1:
            scale, zero = np.repeat(scale, times), np.repeat(zero, times)
        aux = {}
        if slabs is not None:
            # Rows of one group become neighbours; the outputs are put back in order.
            perm = _output_perm(n, n // slabs)
            values = _unpack(np.asarray(raw), packing)[: matrix[0]].reshape(shape)
            packed: Any = codes.pack(values[np.argsort(perm)], packing.bits)
            aux["output_perm"] = perm[None]
        else:
            packed = weights.repacked(shape, packing.bits, partial(_rows, raw, packing, shape))
        zero = weights.scales(zero, shape, group)
        return weights.coded(
            packed, f"uint{packing.bits}", shape, scale, group, zero_point=zero, aux=aux
        )

    return decode


def _rows(
    words: np.ndarray, packing: _Packing, shape: tuple[int, int], rows: slice, columns: slice
) -> np.ndarray:
    """Some codes of a weight (N, K) whose matrix has these words, uint8."""
    count, width = words.shape  # of the rows of a part
    start, stop = rows.start * shape[1], rows.stop * shape[1]
    first, last = start // width, -(-stop // width)
    parts = []
    for part in range(packing.count):
        low, high = max(first - part * count, 0), min(last - part * count, count)
        if low < high:
            parts.append(_part(np.asarray(words[low:high]), packing, part))
    flat = np.concatenate(parts).reshape(-1)[start - first * width : stop - first * width]
    return flat.reshape(-1, shape[1])[:, columns]


def _part(words: np.ndarray, packing: _Packing, part: int) -> np.ndarray:
    shift = packing.bits * (packing.count - 1 - part)
    mask = words.dtype.type((1 << packing.bits) - 1)
    return ((words >> words.dtype.type(shift)) & mask).astype(np.uint8)


def _unpack(words: np.ndarray, packing: _Packing) -> np.ndarray:
    """Codes uint8 [R * count, C] from words [R, C]: each holds one row of every R-th part."""
    return np.concatenate([_part(words, packing, part) for part in range(packing.count)])


def _require_layout(module: str, weight: QArray) -> str:
    """The type of a weight; UnsupportedError where HQQ has no layout for it."""
    code, (n, k) = codes.CODES.get(weight.qtype), weight.shape
    rows, columns = weight.group or (0, 0)
    if (
        code is None
        or code.kind != "uint"
        or 1 not in (rows, columns)
        or n % rows
        or k % columns
        or weight.additive
        or weight.qvalue.ndim != 2
        or weight.act is not None
        or any(weight.hadamard)
        or weight.aux.keys() - {"output_perm"}
    ):
        raise UnsupportedError(
            f"{module}: HQQ has no layout for {weight.qtype} weights in groups of {weight.group}"
        )
    return weight.qtype


def _encode(module: str, weight: QArray, said: _Settings | None) -> dict[str, np.ndarray]:
    """The tensors that a layer is read from, its settings among them.

    Raises:
      UnsupportedError: HQQ has no layout for such a weight, or the config says another.
    """
    code, (n, k) = codes.CODES[_require_layout(module, weight)], weight.shape
    rows, columns = weight.group or (0, 0)
    axis, size = (1, columns) if rows == 1 else (0, rows)
    fitting = (name for name, each in _PACKINGS.items() if each.bits >= code.bits)
    name = min(fitting, key=lambda name: _PACKINGS[name].bits)
    packing = _PACKINGS[name]
    nbits = said.nbits if said is not None and said.nbits <= packing.bits else float(code.bits)
    whole = None if size == (n, k)[axis] else size
    if said is not None and said not in (_Settings(nbits, s, axis) for s in (size, whole)):
        raise UnsupportedError(
            f"{module}: has groups of {size} along axis {axis}, but the config says {said}"
        )
    values = codes.unpack(np.asarray(weight.qvalue), code.bits, k, np)
    order = np.asarray(weight.aux.get("output_perm", np.arange(n)[None]))[0]
    if not np.array_equal(order, _output_perm(n, n if axis else size)):
        raise UnsupportedError(f"{module}: HQQ has no layout for rows in this order")
    matrix = (n * k // size, size) if axis else (size, n * k // size)
    if packing.word == "u8" and matrix[0] % packing.count:
        raise UnsupportedError(f"{module}: {(n, k)} weights of {nbits:g} bits fill no whole bytes")
    scale = np.asarray(weight.scale)
    zero = np.full_like(scale, code.zero)
    if weight.zero_point is not None:
        zero = np.asarray(weight.zero_point).astype(scale.dtype)
    line = (-1, 1) if axis else (1, -1)
    word = {"u8": "uint8", "i32": "int32"}[packing.word]
    texts = {"packing": name, "compute_dtype": f"torch.{scale.dtype.name}"}
    texts["unpack_view_dtype"] = f"torch.{word}"
    flags = {**dict.fromkeys((*_FLAGS, "channel_wise", "optimize"), 1), "view_as_float": 0}
    flags |= dict.fromkeys(("quant_scale", "quant_zero", "round_zero", "offload_meta"), 0)
    return {
        "W_q": _pack(values[order].reshape(matrix), packing),
        "scale": scale.reshape(line),
        "zero": zero.reshape(line),
        "shape": np.array([n, k]),
        "nbits": np.array(nbits, np.int32 if nbits.is_integer() else np.float32),
        "axis": np.array(axis, np.int32),
        "group_size": np.array(size, np.int32),
        **{name: np.array(value, np.uint8) for name, value in flags.items()},
        **{name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()},
    }


def _output_perm(n: int, size: int) -> np.ndarray:
    """Where each row went that groups of `size` rows, n / size apart, made neighbours."""
    return np.argsort(np.arange(n).reshape(size, -1).T.reshape(-1)).astype(np.int32)


def _pack(values: np.ndarray, packing: _Packing) -> np.ndarray:
    """What `_unpack` undoes; rows of zeros fill up where codes share 32 bits."""
    missing = np.zeros((-len(values) % packing.count, values.shape[1]), np.uint8)
    parts = np.concatenate([values, missing]).reshape(packing.count, -1, values.shape[1])
    shifts = packing.bits * np.arange(packing.count - 1, -1, -1)
    words = np.bitwise_or.reduce(parts.astype(np.uint32) << shifts[:, None, None], dtype=np.uint32)
    return words.astype(np.uint8) if packing.word == "u8" else words.view(np.int32)
