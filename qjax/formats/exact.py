"""The same weights in other words: what one format holds, as another would have it, to the bit.

Each function gives back what it was given where there is nothing to do, or no such words.
"""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np

from pallas_kernels import codes
from qjax.errors import UnsupportedError
from qjax.qarray import QArray

# Types of ggml whose blocks are 32 codes behind a float16 scale: bytes of a block, type of a code.
_BLOCKS = {"q4_0": (18, "uint4b8"), "q5_0": (22, "uint5b16"), "q8_0": (34, "int8")}
_HALVES = ("float16", "bfloat16")


def unblocked(weight: QArray) -> QArray:
    """Blocks that hold symmetric integers, as codes in groups of 32 columns with float16 scales.

    Q4_0: d, then bytes whose low halves are columns 0 to 15 and whose high halves the others, less
    8. Q5_0: d, a fifth bit for each column, then the same, less 16. Q8_0: d, signed bytes.
    (ggml-common.h.)
    """
    if weight.qtype not in _BLOCKS:
        return weight
    nbytes, qtype = _BLOCKS[weight.qtype]
    raw = np.asarray(weight.qvalue)
    raw = raw.reshape(*raw.shape[:-1], -1, nbytes)
    scale = np.ascontiguousarray(raw[..., :2]).view(np.float16)[..., 0]
    body = raw[..., 2:]
    rows = weight.qvalue.shape[:-1]
    if qtype == "int8":
        packed = np.ascontiguousarray(body).reshape(*rows, -1)
    else:
        halves = body[..., -16:]
        values = np.concatenate([halves & np.uint8(15), halves >> np.uint8(4)], axis=-1)
        if qtype == "uint5b16":
            fifth = np.unpackbits(body[..., :4], axis=-1, bitorder="little")
            values = values | fifth << np.uint8(4)
        packed = codes.pack(values.reshape(*rows, -1), codes.CODES[qtype].bits)
    return replace(weight, qvalue=packed, qtype=qtype, scale=scale, group=(1, 32))


def as_bytes_unsigned(weight: QArray) -> QArray:
    """Signed bytes as unsigned ones that are 128 more, zero points too."""
    zero = weight.zero_point
    if weight.qtype != "int8" or (zero is not None and np.dtype(zero.dtype).kind not in "iu"):
        return weight
    if zero is not None:
        zero = (np.asarray(zero).astype(np.int32) + 128).astype(np.uint8)
    return replace(
        weight,
        qvalue=np.asarray(weight.qvalue) ^ np.uint8(128),
        qtype="uint8b128" if zero is None else "uint8",
        zero_point=zero,
    )


def by_row(weight: QArray) -> QArray:
    """Scales (and zero points) of several rows, repeated for each of them."""
    if weight.group is None or weight.group[0] == 1:
        return weight
    height, n = weight.group[0], weight.shape[0]

    def spread(array: np.ndarray | None) -> np.ndarray | None:
        return array if array is None else np.repeat(array, height, axis=-2)[..., :n, :]

    return replace(
        weight,
        scale=spread(weight.scale),
        zero_point=spread(weight.zero_point),
        group=(1, weight.group[1]),
    )


def integers(module: str, weight: QArray, lossy: bool, dtype: str) -> QArray:
    """Unsigned integers in groups of columns with 16-bit scales, as GPTQ and AWQ have them.

    Args:
      dtype: that scales are read in, where it has 16 bits; else they stay in any such, and
        float32 becomes float16.

    Raises:
      UnsupportedError: see `with_scales`.
    """
    weight = by_row(codes_only(module, weight, lossy))
    if weight.scale is None:
        return weight
    held = np.dtype(weight.scale.dtype).name
    wanted = dtype if dtype in _HALVES else held if held in _HALVES else "float16"
    return with_scales(module, weight, wanted, lossy)


def codes_only(module: str, weight: QArray, lossy: bool) -> QArray:
    """Integers as unsigned codes, with whole zero points, that are dequantized without rounding.

    Raises:
      UnsupportedError: a tool rounds weights as it dequantizes them, and `lossy` is false.
    """
    weight = as_bytes_unsigned(unblocked(weight))
    if weight.rounded is not None and weight.scale is not None:
        if not lossy:
            raise UnsupportedError(
                f"{module}: its tool rounds weights to {weight.rounded} as it dequantizes them, "
                "and no other does; lossy=True (--lossy) leaves that out"
            )
        weight = replace(weight, rounded=None)
    code, zero = codes.CODES.get(weight.qtype), weight.zero_point
    if code is None or zero is None or weight.additive or np.dtype(zero.dtype).kind in "iu":
        return weight
    values = np.asarray(zero, np.float32)
    if (values == np.rint(values)).all() and values.min() >= 0 and values.max() < 1 << code.bits:
        return replace(weight, zero_point=values.astype(np.uint8))
    return weight


def with_zero_points(weight: QArray) -> QArray:
    """Offset binary codes with the offset as their zero points."""
    code = codes.CODES.get(weight.qtype)
    if code is None or code.kind != "uint" or not code.zero or weight.scale is None:
        return weight
    zero = np.full(np.shape(weight.scale), code.zero, np.uint8)
    return replace(weight, qtype=f"uint{code.bits}", zero_point=zero)


def with_scales(module: str, weight: QArray, dtype: str, lossy: bool) -> QArray:
    """Scales in another dtype.

    Raises:
      UnsupportedError: they would be others, and `lossy` is false; or they would overflow.
    """
    if weight.scale is None or np.dtype(weight.scale.dtype).name == dtype:
        return weight
    before = np.asarray(weight.scale)
    with np.errstate(over="ignore", under="ignore"):
        after = before.astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    change = relative_change(before, after)
    if not np.isfinite(after.astype(np.float32)).all():
        raise UnsupportedError(f"{module}: its scales are too large for {dtype}")
    if change and not lossy:
        raise UnsupportedError(
            f"{module}: its scales are {before.dtype}, and as {dtype} they would change by up to "
            f"{change:.1e} of their size; lossy=True (--lossy) allows that"
        )
    return replace(weight, scale=after)


def relative_change(before: np.ndarray, after: np.ndarray) -> float:
    """The largest |after - before| / |before| of an element; 0 where all are the same."""
    exact, changed = np.asarray(before, np.float64), np.asarray(after, np.float64)
    moved = exact != changed
    if not moved.any():
        return 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        return float((np.abs(changed - exact)[moved] / np.abs(exact)[moved]).max())
