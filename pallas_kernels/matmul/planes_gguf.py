"""GGUF blocks taken apart into codes and scales, for the layouts of `planes`, and put together.

A block is a string of fields: float16 numbers, codes of weights, and in the larger types codes of
scales as well. Every bit goes to one place and back, so that nothing is rounded and a block comes
back as it was:

- The small types have a float16 scale for 32 columns, q4_1 and q5_1 a float16 that is added.
- The others have two levels: a float16 `super_scale` for 256 columns times an integer scale for 16
  or 32; and where there is a minimum, a `super_zero` (with the sign turned, so that it is added)
  times an integer zero point: weight = (d * scale) * code + dmin * zero_point.

The layouts of bits are those of `pallas_kernels.unpack` (ggml block types, little-endian).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pallas_kernels.unpack import BLOCKS, IQ4_CODEBOOK


class Run(NamedTuple):
    """Bits [shift, shift + bits) of bytes [at, at + count) are bits [up, up + bits) of codes start,
    start + step, start + 2 * step and so on."""

    at: int
    count: int
    shift: int
    bits: int
    start: int
    up: int = 0
    step: int = 1


@dataclass(frozen=True)
class Blocks:
    """A type of blocks, taken apart.

    Attributes:
      qtype: key of `codes.CODES`: what its codes are.
      columns: that share a scale.
      codes: where the codes of weights lie.
      half_scale, half_zero: byte of the float16 scale and of what is added, or None.
      scales, zeros: where the integer scales and zero points of a block of two levels lie.
      scale_zero: the code of a scale that means 0; None where it is unsigned. (A scale of 8 bits is
        in two's complement: its bits are its code, and 0 means 0.)
      negated: half_zero is subtracted.
    """

    qtype: str
    columns: int
    codes: tuple[Run, ...]
    half_scale: int
    half_zero: int | None = None
    scales: tuple[Run, ...] = ()
    zeros: tuple[Run, ...] = ()
    scale_zero: int | None = None
    negated: bool = False

    @property
    def lookup(self) -> bool:
        return self.qtype == "lookup4"


class Parts(NamedTuple):
    """Of rows of blocks: codes uint8 [..., N, K]; scale and zero_point [..., N, K / columns];
    super_scale and super_zero float16 [..., N, K / 256]. None where the type has none."""

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None
    super_scale: np.ndarray | None
    super_zero: np.ndarray | None


def _nibbles(at: int) -> tuple[Run, ...]:
    """32 codes in 16 bytes: the low nibbles, then the high ones."""
    return Run(at, 16, 0, 4, 0), Run(at, 16, 4, 4, 16)


def _fifth_bits(at: int) -> tuple[Run, ...]:
    """Bit e of four bytes is the fifth of code e."""
    return tuple(Run(at, 4, shift, 1, shift, 4, 8) for shift in range(8))


def _runs(
    groups: int, run: Callable[[int], tuple[int, int]], bits: int, up: int = 0
) -> Iterator[Run]:
    """The groups of 32 codes of a larger block, each in 32 bytes: `run` tells (byte, shift)."""
    for group in range(groups):
        at, shift = run(group)
        yield Run(at, 32, shift, bits, 32 * group, up)


def _two_bits(at: int, up: int = 0) -> Iterator[Run]:
    return _runs(8, lambda g: (at + 32 * (g // 4), 2 * (g % 4)), 2, up)


def _one_bit(at: int, up: int) -> Iterator[Run]:
    return _runs(8, lambda g: (at, g), 1, up)


def _four_bits(at: int) -> Iterator[Run]:
    return _runs(8, lambda g: (at + 32 * (g // 2), 4 * (g % 2)), 4)


def _six_bits(at: int, shift: int) -> tuple[Run, ...]:
    """Eight of the 16 numbers of 6 bits in the 12 bytes from byte 4 on (q4_k, q5_k)."""
    return Run(at, 4, 0, 6, 0), Run(12, 4, shift, 4, 4), Run(at, 4, 6, 2, 4, 4)


_SCALES_OF_Q3_K = (
    *(Run(96, 8, 4 * i, 4, 8 * i) for i in range(2)),
    *(Run(104, 4, 2 * i, 2, 4 * i, 4) for i in range(4)),
)
_SCALES_OF_IQ4_XS = (
    *(Run(4, 4, 4 * i, 4, i, 0, 2) for i in range(2)),
    *(Run(2, 2, 2 * i, 2, i, 4, 4) for i in range(4)),
)
_AFFINE = {"scales": _six_bits(4, 0), "zeros": _six_bits(8, 4), "negated": True}
_CODES_OF_Q6_K = (
    *_runs(8, lambda g: (64 * (g // 4) + 32 * (g % 2), 4 * (g % 4 // 2)), 4),
    *_two_bits(128, 4),
)
_CODES_OF_IQ4_XS = tuple(
    Run(8 + 16 * g, 16, 4 * i, 4, 32 * g + 16 * i) for g in range(8) for i in range(2)
)

TYPES = {
    "q4_0": Blocks("uint4b8", 32, _nibbles(2), 0),
    "q4_1": Blocks("uint4", 32, _nibbles(4), 0, 2),
    "q5_0": Blocks("uint5b16", 32, (*_nibbles(6), *_fifth_bits(2)), 0),
    "q5_1": Blocks("uint5", 32, (*_nibbles(8), *_fifth_bits(4)), 0, 2),
    "q8_0": Blocks("int8", 32, (Run(2, 32, 0, 8, 0),), 0),
    "q2_k": Blocks(
        "uint2",
        16,
        tuple(_two_bits(16)),
        80,
        82,
        scales=(Run(0, 16, 0, 4, 0),),
        zeros=(Run(0, 16, 4, 4, 0),),
        negated=True,
    ),
    "q3_k": Blocks(
        "uint3b4",
        16,
        (*_two_bits(32), *_one_bit(0, 2)),
        108,
        scales=_SCALES_OF_Q3_K,
        scale_zero=32,
    ),
    "q4_k": Blocks("uint4", 32, tuple(_four_bits(16)), 0, 2, **_AFFINE),
    "q5_k": Blocks("uint5", 32, (*_four_bits(48), *_one_bit(16, 4)), 0, 2, **_AFFINE),
    "q6_k": Blocks(
        "uint6b32", 16, _CODES_OF_Q6_K, 208, scales=(Run(192, 16, 0, 8, 0),), scale_zero=0
    ),
    "iq4_nl": Blocks("lookup4", 32, _nibbles(2), 0),
    "iq4_xs": Blocks("lookup4", 32, _CODES_OF_IQ4_XS, 0, scales=_SCALES_OF_IQ4_XS, scale_zero=32),
}
"""The types of blocks that the layouts hold."""


def codebook(qtype: str, leading: tuple[int, ...]) -> np.ndarray | None:
    """float32 [..., 1, 16] of the types that look their values up; None of others."""
    if not TYPES[qtype].lookup:
        return None
    return np.broadcast_to(np.array(IQ4_CODEBOOK, np.float32), (*leading, 1, 16)).copy()


def take_apart(raw: np.ndarray, qtype: str) -> Parts:
    """The codes and scales of rows of blocks, uint8 [..., N, row_bytes]; `put_together` undoes it.

    Raises KeyError of a type that is not in `TYPES`.
    """
    kind, (elements, size) = TYPES[qtype], BLOCKS[qtype]
    blocks = raw.reshape(*raw.shape[:-1], -1, size)
    rows = (*raw.shape[:-1], -1)

    def half(at: int, flip: bool = False) -> np.ndarray:
        bits = blocks[..., at : at + 2].copy().view(np.uint16)[..., 0]
        return (bits ^ np.uint16(0x8000 * flip)).view(np.float16)

    codes = _gather(blocks, kind.codes, elements).reshape(rows)
    scale = half(kind.half_scale)
    zero = None if kind.half_zero is None else half(kind.half_zero, kind.negated)
    if not kind.scales:
        return Parts(codes, scale, zero, None, None)
    groups = elements // kind.columns
    fine = _gather(blocks, kind.scales, groups).reshape(rows)
    if kind.scale_zero is not None:
        fine = (fine - np.uint8(kind.scale_zero)).view(np.int8)
    least = _gather(blocks, kind.zeros, groups).reshape(rows) if kind.zeros else None
    return Parts(codes, fine, least, scale, zero)


def put_together(parts: Parts, qtype: str) -> np.ndarray:
    """The rows of blocks, uint8 [..., N, row_bytes], that `take_apart` was given."""
    kind, (elements, size) = TYPES[qtype], BLOCKS[qtype]
    codes = parts.codes
    blocks = np.zeros((*codes.shape[:-1], codes.shape[-1] // elements, size), np.uint8)

    def put_half(at: int | None, array: np.ndarray | None, flip: bool = False) -> None:
        if at is not None and array is not None:
            bits = np.ascontiguousarray(array).view(np.uint16) ^ np.uint16(0x8000 * flip)
            blocks[..., at : at + 2] = bits[..., None].view(np.uint8)

    _scatter(blocks, kind.codes, codes)
    scale, zero = parts.scale, parts.zero_point
    if kind.scales:
        _scatter(blocks, kind.scales, scale.view(np.uint8) + np.uint8(kind.scale_zero or 0))
        if zero is not None:
            _scatter(blocks, kind.zeros, zero)
        scale, zero = parts.super_scale, parts.super_zero
    put_half(kind.half_scale, scale)
    put_half(kind.half_zero, zero, kind.negated)
    return blocks.reshape(*codes.shape[:-1], -1)


def _gather(blocks: np.ndarray, runs: tuple[Run, ...], count: int) -> np.ndarray:
    """Codes, uint8 [..., count], of blocks, uint8 [..., bytes]."""
    codes = np.zeros((*blocks.shape[:-1], count), np.uint8)
    for run in runs:
        bits = blocks[..., run.at : run.at + run.count] >> np.uint8(run.shift)
        codes[..., _places(run)] |= (bits & np.uint8((1 << run.bits) - 1)) << np.uint8(run.up)
    return codes


def _scatter(blocks: np.ndarray, runs: tuple[Run, ...], codes: np.ndarray) -> None:
    """Puts codes, uint8 [..., all of a row], where `_gather` takes them from."""
    codes = codes.reshape(*blocks.shape[:-1], -1)
    for run in runs:
        bits = (codes[..., _places(run)] >> np.uint8(run.up)) & np.uint8((1 << run.bits) - 1)
        blocks[..., run.at : run.at + run.count] |= bits << np.uint8(run.shift)


def _places(run: Run) -> slice:
    return slice(run.start, run.start + run.count * run.step, run.step)
