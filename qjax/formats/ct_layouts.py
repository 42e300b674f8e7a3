"""How compressed-tensors lays the tensors of one layer out, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from pallas_kernels import codes
from qjax.errors import UnsupportedError
from qjax.formats import exact, marlin, weights
from qjax.formats.base import PLAIN, Arrays, Layer, Record, Stored, expect, fault
from qjax.lazy import LazyArray, as_bytes
from qjax.qarray import QArray
from qjax.scheme import QuantizationArgs

INPUT_TENSORS = ("input_scale", "input_zero_point", "input_global_scale")
Shape = tuple[int, ...]


def layout(module: str, stored: Stored, shape: Shape) -> str | None:
    """Which layout a layer has, from its tensors; None for a plain weight."""
    packed = stored.get("weight_packed")
    if "scale_packed" in stored:
        return "marlin-24"
    if packed is not None:
        if packed.qtype in ("i32", "u32"):
            return "pack"
        if "weight_global_scale" in stored:
            return "nvfp4"
        return "mxfp6" if packed.shape[-1] * 4 == shape[-1] * 3 else "mxfp4"
    record = expect(module, stored, "weight")
    if record.qtype in PLAIN:
        return "frozen" if "weight_scale" in stored else None
    if record.qtype == "i8":
        return "int"
    if record.qtype in weights.FP8_QTYPES:
        scale = stored.get("weight_scale")
        return "mxfp8" if scale is not None and scale.qtype in ("u8", "f8_e8m0") else "float"
    raise fault(record, f"has dtype {record.qtype}: no layout of compressed-tensors")


def group_of(module: str, stored: Stored, shape: Shape, args: QuantizationArgs) -> tuple[int, int]:
    """Rows and columns that share a scale; the stored scales must agree."""
    n, k = shape[-2:]
    record = expect(module, stored, "weight_scale", PLAIN)
    if args.strategy in ("group", "tensor_group"):
        size = args.group_size or k
        expect(module, stored, "weight_scale", PLAIN, weights.grid(shape, (1, size)))
        return 1, size
    if args.strategy == "block":
        block = args.block_structure or (128, 128)
        expect(module, stored, "weight_scale", PLAIN, weights.grid(shape, block))
        return block
    group = weights.scale_group(record, shape)
    wanted = (n, k) if args.strategy == "tensor" else (1, k)
    if group != wanted and n > 1:
        raise fault(record, f"has shape {record.shape}, which strategy {args.strategy!r} excludes")
    return group


def _pack(module: str, stored: Stored, shape: Shape, args: QuantizationArgs) -> Layer:
    """Offset-binary codes in 32-bit words along K; zero points in words along N."""
    *lead, n, k = shape
    bits = args.num_bits
    record = expect(module, stored, "weight_packed", ("i32", "u32"))
    if args.type != "int":
        raise fault(record, f"holds integers, but the config says {args.type}")
    dense = _words(record, (*lead, n), k, bits)
    reads = ["weight_packed", "weight_scale"]
    if "weight_shape" in stored:
        expect(module, stored, "weight_shape", ("i64", "i32"), (len(shape),), (2,))
        reads.append("weight_shape")
    group = group_of(module, stored, shape, args)
    columns = -(-k // group[1])
    zero_dense = True
    if not args.symmetric:
        if args.strategy in ("group", "channel"):
            zero = expect(module, stored, "weight_zero_point", ("i32", "u32"))
            zero_dense = _words(zero, tuple(lead), n, bits, (columns,))
        else:  # of a whole tensor: not packed
            like_scale(module, stored, ("i8", "i32"))
        reads.append("weight_zero_point")
    elif "weight_zero_point" in stored:
        expect(module, stored, "weight_zero_point", ("i8", "i32"))
        reads.append("weight_zero_point")
    reads += _order(module, stored, shape, args, group)

    def decode(arrays: Arrays) -> QArray:
        told = tuple(arrays["weight_shape"].tolist()) if "weight_shape" in arrays else ()
        if told and told[-2:] != (n, k):
            raise fault(stored["weight_shape"], f"says {told}, the model's sizes ask for {(n, k)}")
        packed = _lazy_bytes(arrays["weight_packed"], k, bits, dense, record)
        zero = None
        if args.symmetric:
            if "weight_zero_point" in arrays and arrays["weight_zero_point"].any():
                raise fault(stored["weight_zero_point"], "is not 0, the config says symmetric")
        elif args.strategy not in ("group", "channel"):
            offset = arrays["weight_zero_point"].astype(np.int32) + (1 << (bits - 1))
            zero = weights.scales(offset.astype(np.uint8), shape, group)
        else:
            along_n = np.swapaxes(arrays["weight_zero_point"], -1, -2)
            record_ = stored["weight_zero_point"]
            stream = _bytes(np.ascontiguousarray(along_n), n, bits, zero_dense, record_)
            zero = np.ascontiguousarray(np.swapaxes(codes.unpack(stream, bits, n, np), -1, -2))
        aux = {}
        if "weight_g_idx" in arrays:
            g_idx, record_ = arrays["weight_g_idx"], stored["weight_g_idx"]
            packed, aux = weights.sort_columns(packed, bits, record_, g_idx, group[1])
        qtype = f"uint{bits}" if zero is not None else f"uint{bits}b{1 << (bits - 1)}"
        scale = arrays["weight_scale"]
        return weights.coded(packed, qtype, shape, scale, group, zero_point=zero, aux=aux)

    return Layer(tuple(reads), decode)


def _order(
    module: str, stored: Stored, shape: Shape, args: QuantizationArgs, group: tuple[int, int]
) -> list[str]:
    """The tensor with the group of each column, where there is one."""
    if "weight_g_idx" not in stored and (args.actorder != "group" or group[1] >= shape[-1]):
        return []
    expect(module, stored, "weight_g_idx", ("i32", "i64"), (shape[-1],))
    return ["weight_g_idx"]


def like_scale(module: str, stored: Stored, dtypes: tuple[str, ...]) -> Record:
    """The record of zero points that lie as the scales do."""
    scale = tuple(expect(module, stored, "weight_scale").shape)
    return expect(module, stored, "weight_zero_point", dtypes, scale)


def _words(record: Record, rows: Shape, count: int, bits: int, after: Shape = ()) -> bool:
    """Whether `count` codes follow each other without gaps; older releases left unused bits.

    Raises CheckpointError where the number of words fits neither.
    """
    dense, old = -(-count * bits // 32), -(-count // (32 // bits))
    for words, is_dense in ((dense, True), (old, False)):
        if tuple(record.shape) == (*rows, words, *after):
            return is_dense
    raise fault(
        record,
        f"has shape {tuple(record.shape)}, {bits} bits ask for {(*rows, dense, *after)}",
    )


def _bytes(words: np.ndarray, count: int, bits: int, dense: bool, record: Record) -> np.ndarray:
    """Codes in words [..., W] as a dense stream of bits: uint8 [..., row_bytes]."""
    if not dense:
        per_word = 32 // bits
        if (words.view(np.uint32) >> np.uint32(per_word * bits)).any():
            raise fault(record, f"has bits set that {per_word} codes of {bits} bits leave unused")
        shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
        parts = (words.view(np.uint32)[..., None] >> shifts) & np.uint32((1 << bits) - 1)
        parts = parts.reshape(*words.shape[:-1], -1)[..., :count].astype(np.uint8)
        return codes.pack(parts, bits)
    stream = np.ascontiguousarray(words).view(np.uint8)
    return stream[..., : -(-count * bits // 8)]


def _lazy_bytes(words: np.ndarray, count: int, bits: int, dense: bool, record: Record) -> Any:
    row = -(-count * bits // 8)
    if dense:
        return as_bytes(words)[..., :row]

    def read(*index: slice) -> np.ndarray:
        *rows, inside = index
        return _bytes(np.asarray(words[tuple(rows)]), count, bits, dense, record)[..., inside]

    return LazyArray(read, (*words.shape[:-1], row), np.dtype(np.uint8))


def _int(module: str, stored: Stored, shape: Shape, args: QuantizationArgs) -> Layer:
    """A byte a weight, signed; fewer bits than 8 are packed in memory."""
    record = expect(module, stored, "weight", "i8", shape)
    if args.type != "int":
        raise fault(record, f"holds integers, but the config says {args.type}")
    group = group_of(module, stored, shape, args)
    reads = ["weight", "weight_scale", *_order(module, stored, shape, args, group)]
    if not args.symmetric or "weight_zero_point" in stored:
        like_scale(module, stored, ("i8", "i32"))
        reads.append("weight_zero_point")

    def decode(arrays: Arrays) -> QArray:
        zero = weights.zero_points(arrays.get("weight_zero_point"), shape, group)
        packed, qtype, zero = weights.signed_bytes(record, arrays["weight"], args.num_bits, zero)
        aux = {}
        if "weight_g_idx" in arrays:
            g_idx, record_ = arrays["weight_g_idx"], stored["weight_g_idx"]
            raw = as_bytes(packed)
            packed, aux = weights.sort_columns(raw, args.num_bits, record_, g_idx, group[1])
        scale = arrays["weight_scale"]
        return weights.coded(packed, qtype, shape, scale, group, zero_point=zero, aux=aux)

    return Layer(tuple(reads), decode)


def _float(module: str, stored: Stored, shape: Shape, args: QuantizationArgs) -> Layer:
    record = expect(module, stored, "weight", tuple(weights.FP8_QTYPES), shape)
    _require_float(record, args, 8)
    qtype = weights.FP8_QTYPES[record.qtype]
    group = group_of(module, stored, shape, args)
    reads = ["weight", "weight_scale"]
    if not args.symmetric or "weight_zero_point" in stored:
        like_scale(module, stored, (*weights.FP8_QTYPES, *PLAIN))
        reads.append("weight_zero_point")

    def decode(arrays: Arrays) -> QArray:
        zero = weights.zero_points(arrays.get("weight_zero_point"), shape, group)
        scale = arrays["weight_scale"]
        return weights.coded(arrays["weight"], qtype, shape, scale, group, zero_point=zero)

    return Layer(tuple(reads), decode)


def _require_float(record: Record, args: QuantizationArgs, bits: int) -> None:
    if args.type != "float" or args.num_bits != bits:
        raise fault(record, f"holds {bits}-bit floats, the config says {args.type} {args.num_bits}")


def _nvfp4(module: str, stored: Stored, shape: Shape, args: QuantizationArgs) -> Layer:
    *lead, n, k = shape
    size = args.group_size or 16
    _require_float(stored["weight_packed"], args, 4)
    weights.require_divisible(stored["weight_packed"], k, size)
    expect(module, stored, "weight_packed", "u8", (*lead, n, k // 2))
    expect(module, stored, "weight_scale", "f8_e4m3", (*lead, n, k // size))
    expect(module, stored, "weight_global_scale", PLAIN, tuple(lead), (*lead, 1), (*lead, 1, 1))

    def decode(arrays: Arrays) -> QArray:
        divisor = weights.scalar(arrays["weight_global_scale"], tuple(lead))
        if not (divisor > 0).all():
            raise fault(stored["weight_global_scale"], "is not above 0")
        scale, aux = arrays["weight_scale"], {"global_scale": 1 / divisor}
        packed = arrays["weight_packed"]
        return weights.coded(packed, "fp4_e2m1", shape, scale, (1, size), aux=aux)

    return Layer(("weight_packed", "weight_scale", "weight_global_scale"), decode)


def _mx(
    module: str, stored: Stored, shape: Shape, args: QuantizationArgs, *, suffix: str, qtype: str
) -> Layer:
    """Small floats in groups of 32 with a power of two each."""
    _require_float(expect(module, stored, suffix), args, codes.CODES[qtype].bits)
    return weights.mx(module, stored, shape, qtype, args.group_size or 32, suffix)


def _marlin_24(module: str, stored: Stored, shape: Shape, args: QuantizationArgs) -> Layer:
    """2:4 sparse codes, laid out for the Marlin kernels."""
    if args.type != "int" or not args.symmetric or args.strategy not in ("group", "channel"):
        record = expect(module, stored, "weight_packed")
        raise fault(record, f"is marlin-24, which has no layout for {args}")
    size = args.group_size if args.strategy == "group" and args.group_size else -1
    return marlin.sparse(module, stored, shape, args.num_bits, size)


LAYOUTS: dict[str, Callable[[str, Stored, Shape, QuantizationArgs], Layer]] = {
    "pack": _pack,
    "int": _int,
    "float": _float,
    "nvfp4": _nvfp4,
    "mxfp4": partial(_mx, suffix="weight_packed", qtype="fp4_e2m1"),
    "mxfp6": partial(_mx, suffix="weight_packed", qtype="fp6_e2m3"),
    "mxfp8": partial(_mx, suffix="weight", qtype="fp8_e4m3"),
    "marlin-24": _marlin_24,
}


def encode(module: str, weight: QArray, *, packed: bool = True) -> dict[str, np.ndarray]:
    """The tensors that `LAYOUTS` read, of the newest releases.

    Args:
      packed: whether integers are packed in words, or lie in a byte each.
    """
    n, k = weight.shape
    lead = weight.qvalue.shape[:-2]
    code = codes.CODES.get(weight.qtype)
    scale, raw = np.asarray(weight.scale), np.asarray(weight.qvalue)
    # A weight that is one block, which its activations tell, keeps both axes.
    blocks = weight.act is not None and weight.act.strategy == "group"
    single = weight.group == (n, k) and not blocks
    tensors = {"weight_scale": scale.reshape(*lead, 1) if single else scale}
    sorted_ = "perm" in weight.aux
    integer = code is not None and code.kind in ("int", "uint")
    if code is None or weight.additive or (sorted_ and (lead or not integer)):
        raise UnsupportedError(f"{module}: compressed-tensors has no layout for {weight.qtype}")
    if sorted_:
        raw, tensors["weight_g_idx"] = weights.unsort_columns(weight)
    if weight.qtype == "int8":
        tensors["weight"] = raw.view(np.int8)
        if weight.zero_point is not None:
            tensors["weight_zero_point"] = _shaped(weight.zero_point, tensors).astype(np.int8)
    elif code.kind == "uint" and not packed:
        half = 1 << (code.bits - 1)
        tensors["weight"] = (codes.unpack(raw, code.bits, k, np) - np.uint8(half)).view(np.int8)
        if weight.zero_point is not None:
            zero = _shaped(weight.zero_point, tensors).astype(np.int32) - half
            tensors["weight_zero_point"] = zero.astype(np.int8)
    elif code.kind == "uint":
        tensors["weight_packed"] = _to_words(raw)
        tensors["weight_shape"] = np.array([n, k], np.int64)
        if weight.zero_point is not None and single:
            offset = _shaped(weight.zero_point, tensors).astype(np.int32)
            tensors["weight_zero_point"] = (offset - (1 << (code.bits - 1))).astype(np.int8)
        elif weight.zero_point is not None:
            along_n = np.swapaxes(np.asarray(weight.zero_point), -1, -2)
            words = _to_words(codes.pack(along_n, code.bits))
            tensors["weight_zero_point"] = np.ascontiguousarray(np.swapaxes(words, -1, -2))
    elif scale.dtype == ml_dtypes.float8_e8m0fnu:
        tensors["weight_scale"] = scale.view(np.uint8)
        if weight.qtype == "fp8_e4m3":
            tensors["weight"] = raw.view(ml_dtypes.float8_e4m3fn)
        else:
            tensors["weight_packed"] = raw
    elif weight.qtype == "fp4_e2m1" and "global_scale" in weight.aux:
        tensors["weight_packed"] = raw
        divisor = _divisor(np.asarray(weight.aux["global_scale"]))
        tensors["weight_global_scale"] = divisor.reshape(*lead, 1)
    elif weight.qtype in weights.FP8_DTYPES:
        tensors["weight"] = raw.view(weights.FP8_DTYPES[weight.qtype])
        if weight.zero_point is not None:
            tensors["weight_zero_point"] = _shaped(weight.zero_point, tensors)
    else:
        raise UnsupportedError(f"{module}: compressed-tensors has no layout for {weight.qtype}")
    for suffix, key in (("input_scale", "act_scale"), ("input_zero_point", "act_zero_point")):
        if key in weight.aux:
            value = np.asarray(weight.aux[key]).reshape(*lead, 1)
            # The tool holds the scales of a layer in one dtype.
            short = np.float32 if scale.dtype.itemsize != 2 else scale.dtype
            stored = value.astype(np.int8 if suffix == "input_zero_point" else short)
            tensors[suffix] = stored if (stored == value).all() else value
    if "act_global_scale" in weight.aux:
        divisor = _divisor(np.asarray(weight.aux["act_global_scale"]))
        tensors["input_global_scale"] = divisor.reshape(*lead, 1)
    return tensors


def _shaped(zero_point: np.ndarray, tensors: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(zero_point).reshape(tensors["weight_scale"].shape)


def _divisor(scale: np.ndarray) -> np.ndarray:
    """float32 numbers whose reciprocals are these, to the bit where there are such; of several, one
    that bfloat16 holds, in which they are computed.
    """
    result = middle = 1 / scale
    for direction in (np.inf, -np.inf):
        near = np.nextafter(middle, np.float32(direction))
        result = np.where((1 / result != scale) & (1 / near == scale), near, result)
    short = middle.astype(ml_dtypes.bfloat16).astype(np.float32)
    return np.where(1 / short == scale, short, result)


def with_divisors(module: str, weight: QArray, lossy: bool) -> QArray:
    """The weight with the scales of whole tensors that come of their stored reciprocals.

    Raises:
      UnsupportedError: these are others, and `lossy` is false.
    """
    aux = dict(weight.aux)
    for key in ("global_scale", "act_global_scale"):
        if key in aux:
            aux[key] = 1 / _divisor(np.asarray(aux[key], np.float32))
            change = exact.relative_change(weight.aux[key], aux[key])
            if change and not lossy:
                raise UnsupportedError(
                    f"{module}: compressed-tensors stores the reciprocal of its {key}, which "
                    f"changes it by {change:.1e}; lossy=True (--lossy) allows that"
                )
    return replace(weight, aux=aux)


def _to_words(stream: np.ndarray) -> np.ndarray:
    """A stream of bits, uint8 [..., bytes], in int32 words, the last one filled with zeros."""
    missing = -stream.shape[-1] % 4
    padded = np.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, missing)])
    return np.ascontiguousarray(padded).view(np.int32)
