"""Integer codes with scales beside, as blocks of GGUF that stand for the very same numbers.

A block of 32 has a float16 scale and signed codes of 4, 5 or 8 bits (q4_0, q5_0, q8_0), or unsigned
ones of 4 or 5 and a float16 minimum (q4_1, q5_1). A code less its zero point is such a signed code,
so that a weight fits wherever its groups are whole blocks and its scales are float16 numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pallas_kernels import codes
from qjax.qarray import QArray

_BLOCK = 32
# Type -> the least and the largest of its signed codes.
_SIGNED = {"q4_0": (-8, 7), "q5_0": (-16, 15), "q8_0": (-128, 127)}
_UNSIGNED = {"q4_1": 15, "q5_1": 31}


class Blocks(NamedTuple):
    """Attributes:
    qtype: key of `QTYPES`.
    raw: uint8 [..., N, row_bytes].
    """

    qtype: str
    raw: np.ndarray


def as_blocks(weight: QArray) -> Blocks | str:
    """The smallest blocks that hold a weight exactly, or the reason why none does.

    Args:
      weight: canonical codes on the host.
    """
    kind, k = codes.CODES[weight.qtype].kind, weight.shape[1]
    if kind not in ("uint", "int"):
        return f"its {weight.qtype} codes are no integers"
    other = sorted(weight.aux.keys() - {"global_scale"})
    if other or any(weight.hadamard):
        return f"GGUF has no place for its {', '.join(other) or 'rotation'}"
    if weight.rounded is not None:
        return f"its numbers are rounded to {weight.rounded}"
    assert weight.group is not None
    columns = weight.group[1]
    if k % _BLOCK or (columns % _BLOCK and columns < k):
        return f"rows of {k} in groups of {columns} are not whole blocks of {_BLOCK}"
    scale = _a_block(weight, weight.scale)
    if "global_scale" in weight.aux:
        scale = scale * np.asarray(weight.aux["global_scale"], np.float32)
    if not _is_half(scale):
        return "its scales are no float16 numbers"
    q = codes.meanings(_unpacked(weight), weight.qtype, None, np).astype(np.int16)
    q = q.reshape(*q.shape[:-1], k // _BLOCK, _BLOCK)
    zero = None if weight.zero_point is None else _a_block(weight, weight.zero_point)
    if weight.additive and zero is not None:
        found = _with_minimum(q, scale, zero)
        return found or "its minima are no float16 numbers, or its codes have more than 5 bits"
    if zero is None or (zero == np.round(zero)).all():
        signed = q if zero is None else q - zero[..., None].astype(np.int16)
    else:
        signed = None
    for qtype in _SIGNED:
        low, high = _SIGNED[qtype]
        if signed is not None and low <= signed.min() and signed.max() <= high:
            return Blocks(qtype, _joined(qtype, scale, None, signed - low))
        if qtype == "q4_0" and zero is not None:
            product = -zero.astype(np.float64) * scale.astype(np.float64)
            found = _with_minimum(q, scale, product)
            if found is not None and found.qtype == "q4_1":
                return found
    return "its codes less their zero points take more than 8 bits, or are no integers"


def _unpacked(weight: QArray) -> np.ndarray:
    return codes.unpack(
        np.asarray(weight.qvalue), codes.CODES[weight.qtype].bits, weight.shape[1], np
    )


def _a_block(weight: QArray, values: np.ndarray) -> np.ndarray:
    """What each group has, float32 [..., N, K / 32]."""
    assert weight.group is not None
    n, k = weight.shape
    spread = codes.spread(np.asarray(values), weight.group, weight.shape, np)
    spread = np.broadcast_to(spread, (*spread.shape[:-2], n, spread.shape[-1]))
    if spread.shape[-1] == 1:
        return np.repeat(spread, k // _BLOCK, axis=-1)
    return spread[..., ::_BLOCK]


def _is_half(values: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        return bool((values.astype(np.float16) == values).all())


def _with_minimum(q: np.ndarray, scale: np.ndarray, minimum: np.ndarray) -> Blocks | None:
    """Blocks of codes from 0 on over a minimum."""
    if not _is_half(minimum) or q.min() < 0:
        return None
    for qtype, high in _UNSIGNED.items():
        if q.max() <= high:
            return Blocks(qtype, _joined(qtype, scale, minimum, q))
    return None


def _joined(qtype: str, scale: np.ndarray, minimum: np.ndarray | None, q: np.ndarray) -> np.ndarray:
    """Bytes of blocks; q: from 0 on, [..., N, blocks, 32] (q8_0: from -128 on, moved by 128)."""
    q = q.astype(np.uint8)
    parts = [_half(scale)] if minimum is None else [_half(scale), _half(minimum)]
    if qtype == "q8_0":
        parts.append(q ^ np.uint8(0x80))
    else:
        if qtype in ("q5_0", "q5_1"):
            parts.append(np.packbits(q >> 4, axis=-1, bitorder="little"))
        low = q & np.uint8(15)
        parts.append(low[..., :16] | low[..., 16:] << np.uint8(4))
    whole = np.concatenate(parts, axis=-1)
    return whole.reshape(*whole.shape[:-2], -1)


def _half(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values.astype("<f2")[..., None]).view(np.uint8)
