"""Weights in the layouts that several formats share: small floats and bytes with scales beside."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from pallas_kernels import codes
from qjax.errors import UnsupportedError
from qjax.formats.base import Arrays, Keys, Layer, Record, Stored, expect, fault
from qjax.lazy import LazyArray, as_bytes
from qjax.qarray import QArray

FP8_QTYPES = {"f8_e4m3": "fp8_e4m3", "f8_e5m2": "fp8_e5m2"}
FP8_DTYPES = {qtype: codes.ML_DTYPES[qtype] for qtype in FP8_QTYPES.values()}
AT_ONCE = 1 << 22  # weights of which each is held in a number of its own
E4M3_MAX = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)


def width(record: Record) -> int:
    """Bits of an element of a plain integer or float type: "u8", "i32", "bf16"."""
    return int(record.qtype.lstrip("buif"))


def grid(shape: tuple[int, ...], group: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of a weight (..., N, K): (..., ceil(N / rows), ceil(K / columns))."""
    return (*shape[:-2], -(-shape[-2] // group[0]), -(-shape[-1] // group[1]))


def require_group_size(keys: Keys, size: int | None) -> int:
    """A config's `group_size`; CheckpointError where it is neither above 0 nor -1."""
    if size is None or (size != -1 and size < 1):
        raise keys.error("group_size", f"{size} is neither above 0 nor -1")
    return size


_FEWEST = 32  # columns of a part of a group, below which its scales would take too much


def flat_group(where: str, shape: tuple[int, ...], size: int) -> tuple[tuple[int, int], int]:
    """Rows and columns of a run of `size` weights of the flattened matrix, which is whole rows, or
    lies in one; where some lie across two rows, of the parts that all runs and rows are made of.

    Returns:
      The group, and how many of them share a scale one after the other (1 but for parts).

    Raises:
      UnsupportedError: parts would be too small.
    """
    n, k = shape[-2:]
    if k % size == 0:
        return (1, size), 1
    if size % k == 0 and n % (size // k) == 0:
        return (size // k, k), 1
    part = math.gcd(size, k)
    if part < _FEWEST:
        raise UnsupportedError(
            f"{where}: blocks of {size} weights do not fit rows of {k}, so that some lie across "
            f"two rows, and parts of {part} are too small; from {_FEWEST} on they are supported"
        )
    return (1, part), size // part


def columns(group_size: int, k: int) -> int:
    """Columns of a group, where -1 stands for all of them."""
    return k if group_size == -1 else group_size


def scale_group(
    record: Record, shape: tuple[int, ...], block: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Rows and columns that share a scale, from the shape that the scales are stored in.

    Args:
      record: of the scales: one number; one a row, [N] or [N, 1]; or [ceil(N / rows), ceil(K /
        columns)], also with axes of size 1 between. Leading axes are experts.
      shape: (N, K) or (experts, N, K).
      block: (rows, columns) of the last kind.

    Raises:
      CheckpointError: another shape.
    """
    n, k = shape[-2:]
    lead = shape[:-2]
    sizes = tuple(record.shape)
    if sizes[: len(lead)] == lead:
        body = tuple(size for size in sizes[len(lead) :] if size != 1)
        if not body:
            return (n, k)
        if body == (n,):
            return (1, k)
        if block is not None and body == tuple(size for size in grid((n, k), block) if size != 1):
            return block
    wanted = [lead, (*lead, n)] + ([grid(shape, block)] if block else [])
    raise fault(
        record,
        f"has shape {sizes}, a weight {shape} asks for one of {', '.join(map(str, wanted))}",
    )


def scales(array: Any, shape: tuple[int, ...], group: tuple[int, int]) -> Any:
    """Scales as a QArray has them: [..., ceil(N / rows), ceil(K / columns)]."""
    wanted = grid(shape, group)
    return array if tuple(array.shape) == wanted else array.reshape(wanted)


def scalar(array: np.ndarray, lead: tuple[int, ...] = ()) -> np.ndarray:
    """One number (for each expert) as float32 [..., 1, 1]."""
    return np.asarray(array, np.float32).reshape(*lead, 1, 1)


def runs(index: tuple[slice, ...], unit: int = 1) -> Iterator[slice]:
    """Rows of a block (..., rows, columns) in runs of no more weights than `AT_ONCE`.

    Args:
      unit: all but the last are multiples of so many rows.
    """
    *before, rows, columns = index
    each = math.prod(s.stop - s.start for s in (*before, columns))
    step = max(AT_ONCE // max(each * unit, 1), 1) * unit
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def repacked(
    shape: tuple[int, ...],
    bits: int,
    values: Callable[..., np.ndarray],
    rows: int = 1,
    columns: int = 1,
) -> LazyArray:
    """Codes of a weight (..., N, K) that are packed as they are read.

    Args:
      values: makes the codes, uint8, that slices of all axes of the weight mean.
      rows, columns: it is asked for multiples of these, but at the end of a weight.
    """
    unit = math.lcm(columns, 8 // math.gcd(bits, 8))

    def read(*index: slice) -> np.ndarray:
        *before, some, inside = index
        here = slice(inside.start * 8 // bits, inside.stop * 8 // bits)
        packed = np.empty([each.stop - each.start for each in index], np.uint8)
        for run in runs((*before, some, here), rows):
            found = np.ascontiguousarray(values(*before, run, here))
            packed[..., run.start - some.start : run.stop - some.start, :] = codes.pack(found, bits)
        return packed

    whole = (*shape[:-1], -(-shape[-1] * bits // 8))
    return LazyArray(read, whole, np.dtype(np.uint8), (rows, unit * bits // 8))


def bytewise(raw: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> LazyArray:
    """Packed codes that come of stored bytes, one of each, as they are read."""
    return LazyArray(lambda *index: change(np.asarray(raw[index])), raw.shape, raw.dtype)


def coded(
    packed: Any,
    qtype: str,
    shape: tuple[int, ...],
    scale: Any,
    group: tuple[int, int],
    **more: Any,
) -> QArray:
    """A weight whose packed codes lie as a QArray wants them, in any dtype.

    Args:
      packed: codes, [..., N, row_bytes] once viewed as bytes; may be lazy, as the scales.
      scale: of the group's shape, or any that has as many numbers.
    """
    size = (shape[-2], shape[-1])
    return QArray(as_bytes(packed), qtype, size, scales(scale, shape, group), group=group, **more)


def mx(
    module: str,
    stored: Stored,
    shape: tuple[int, ...],
    qtype: str,
    size: int,
    suffix: str = "weight",
    scale_suffix: str = "weight_scale",
) -> Layer:
    """Plans small floats in groups of `size` columns, with a power of two for each group.

    Args:
      suffix: of the codes, uint8 [..., N, row_bytes], or float8 where they are e4m3 or e5m2.
      scale_suffix: of exponents of two plus 127, [..., N, K / size].

    Raises:
      CheckpointError: a tensor is missing, or has a wrong shape or dtype.
    """
    record = expect(module, stored, suffix)
    *rows, k = shape
    require_divisible(record, k, size)
    dtype = next((each for each, name in FP8_QTYPES.items() if name == qtype), "u8")
    expect(module, stored, suffix, dtype, (*rows, codes.row_bytes(qtype, k)))
    expect(module, stored, scale_suffix, ("u8", "f8_e8m0"), (*rows, k // size))

    def decode(arrays: Arrays) -> QArray:
        scale = arrays[scale_suffix].view(ml_dtypes.float8_e8m0fnu)
        return coded(arrays[suffix], qtype, shape, scale, (1, size))

    return Layer((suffix, scale_suffix), decode)


def signed_bytes(
    record: Record, values: np.ndarray, bits: int, zero: np.ndarray | None
) -> tuple[np.ndarray | LazyArray, str, np.ndarray | None]:
    """Integers that lie in a byte each, as packed codes, their type and zero points.

    Args:
      record: of the values, for messages.
      values: int8 [..., K], of which fewer bits than 8 become unsigned.
      zero: signed zero points, or None where all are 0.

    Raises:
      CheckpointError: a value needs more bits; where codes are packed, as they are read.
    """
    if bits == 8:
        return values, "int8", zero
    half = 1 << (bits - 1)

    def unsigned(*index: slice) -> np.ndarray:
        signed = np.asarray(values[index])
        if signed.min(initial=0) < -half or signed.max(initial=0) >= half:
            raise fault(record, f"holds values that {bits} bits cannot")
        return (signed + np.int8(half)).view(np.uint8)

    packed = repacked(values.shape, bits, unsigned)
    if zero is None:
        return packed, f"uint{bits}b{half}", None
    return packed, f"uint{bits}", (zero.astype(np.int32) + half).astype(np.uint8)


def zero_points(
    array: np.ndarray | None, shape: tuple[int, ...], group: tuple[int, int]
) -> np.ndarray | None:
    """Zero points as a QArray has them; None where there are none, or all are 0."""
    return None if array is None or not array.any() else scales(array, shape, group)


def require_divisible(record: Record, k: int, size: int) -> None:
    """Raises CheckpointError where rows are no whole number of groups."""
    if k % size:
        raise fault(record, f"has rows of {k}, which groups of {size} do not divide")


def sort_columns(
    stream: Any, bits: int, record: Record, g_idx: np.ndarray, group_size: int
) -> tuple[Any, dict[str, np.ndarray]]:
    """Puts the columns of a group beside each other, groups counting up.

    Args:
      stream: packed codes [..., row_bytes], which may be lazy.
      record: of `g_idx`.
      g_idx: int [K], the group of each column, in any order.

    Returns:
      The packed codes, and "perm" for the weight's `aux`; as they were and nothing, where columns
      are in order already (or their groups were never set: all below 0).

    Raises:
      CheckpointError: a group has more or fewer columns than `group_size` (the last may have
        fewer).
    """
    g_idx = np.asarray(g_idx, np.int64)
    if (g_idx < 0).all():
        return stream, {}
    wanted = np.arange(len(g_idx)) // group_size
    if np.array_equal(g_idx, wanted):
        return stream, {}
    order = np.argsort(g_idx, kind="stable")
    if not np.array_equal(g_idx[order], wanted):
        raise fault(record, f"does not put {group_size} columns in each group")

    def values(*index: slice) -> np.ndarray:
        *before, columns = index
        rows = np.asarray(stream[(*before, slice(None))])
        return np.take(codes.unpack(rows, bits, len(order), np), order[columns], axis=-1)

    packed = repacked((*stream.shape[:-1], len(order)), bits, values)
    return packed, {"perm": order.astype(np.int32)[None]}


def unsort_columns(weight: QArray) -> tuple[np.ndarray, np.ndarray]:
    """What `sort_columns` was given: packed codes, and the group of each column as int32 [K]."""
    assert weight.group is not None
    k, stream = weight.shape[1], np.asarray(weight.qvalue)
    groups = (np.arange(k) // weight.group[1]).astype(np.int32)
    if "perm" not in weight.aux:
        return stream, groups
    order, bits = np.asarray(weight.aux["perm"])[0], codes.CODES[weight.qtype].bits
    values, g_idx = np.empty((*stream.shape[:-1], k), np.uint8), np.empty_like(groups)
    values[..., order] = codes.unpack(stream, bits, k, np)
    g_idx[order] = groups
    return codes.pack(values, bits), g_idx
