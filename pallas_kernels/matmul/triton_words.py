"""Codes of weights in planes as bfloat16 in the Triton kernel, four at a time (see `words`)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import words
from pallas_kernels.matmul import planes_tile
from pallas_kernels.matmul.planes import Planes

# Bytes of 0, 0.5, 1, 1.5, 2, 3, 4, 6 in bfloat16, the low ones and the high ones.
_E2M1 = ((0xC0800000, 0xC0804000), (0x3F3F3F00, 0x40404040))


def takes(planes: Planes) -> bool:
    """Whether codes are of those that are decoded here."""
    if planes.value == "int":
        return planes.bits < 7
    return planes.qtype == "fp4_e2m1" or (planes.value == "lookup" and planes.bits == 4)


def numbers(
    tiles: Sequence[Sequence[jax.Array]],
    planes: Planes,
    segment: int,
    table: Sequence[jax.Array] = (),
) -> jax.Array:
    """Codes of one segment as bfloat16: 128 + code where they are integers, else the number.

    Args:
      tiles, planes, segment: see `planes_tile.codes`. Bytes are uint8.
      table: of a codebook, see `table_of`.
    """
    parts, lines = [], ["mov.b32 a, 0;"]
    shift = 0
    for runs, width, count in zip(tiles, planes.widths, planes_tile.runs(planes), strict=True):
        field, run = divmod(segment, count)
        lines += [
            f"shr.b32 b, ${2 + len(parts)}, {field * width};",
            f"and.b32 b, b, {0x01010101 * ((1 << width) - 1):#010x};",
            f"shl.b32 b, b, {shift};",
            "or.b32 a, a, b;",
        ]
        parts.append(runs[run])
        shift += width
    if planes.value == "int":
        lines += words.beside("a", words.ABOVE["bfloat16"])
    elif planes.value == "lookup":
        # A word of the table is beside each byte of a register: four operands of it.
        lines += _of_codebook([f"${2 + len(parts) + 4 * i}" for i in range(len(table))])
        parts += [jnp.full(parts[0].shape, word) for word in table]
    else:
        lines += _of_e2m1()
    return words.decoded(lines, parts, jnp.bfloat16)


def table_of(codebook: Sequence[jax.Array]) -> list[jax.Array]:
    """The low and then the high bytes of 16 scalars, rounded to bfloat16: four to an int32."""
    bits = [
        lax.bitcast_convert_type(entry.astype(jnp.bfloat16), jnp.int16).astype(jnp.int32)
        for entry in codebook
    ]
    found = []
    for shift in (0, 8):
        for first in range(0, 16, 4):
            word = jnp.int32(0)
            for place, entry in enumerate(bits[first : first + 4]):
                word = word | (((entry >> shift) & 255) << (8 * place))
            found.append(word)
    return found


_SELECTORS = [
    "shr.b32 b, a, 4;",
    "or.b32 b, a, b;",  # bytes 0 and 2 have two codes each now
    "prmt.b32 b, b, 0, 0x4420;",
    "and.b32 b, b, 0x7777;",
]
_RESULTS = ["prmt.b32 $0, c, d, 0x5140;", "prmt.b32 $1, c, d, 0x7362;"]


def _of_codebook(table: Sequence[str]) -> list[str]:
    """Numbers from a codebook of 16: of the two halves that the last three bits find, the first bit
    takes one."""
    lines = [*_SELECTORS, "shl.b32 a, a, 4;", "prmt.b32 a, a, 0, 0xba98;"]  # a first bit, 8 times
    for into, words_of in zip("cd", (table[:4], table[4:]), strict=True):
        lines += [
            f"prmt.b32 e, {words_of[0]}, {words_of[1]}, b;",
            f"prmt.b32 f, {words_of[2]}, {words_of[3]}, b;",
            f"lop3.b32 {into}, a, f, e, 0xca;",
        ]
    return [*lines, *_RESULTS]


def _of_e2m1() -> list[str]:
    """Floats of 4 bits in the bytes of `a`: a permutation looks up four bytes of a table of eight,
    by the low three bits of nibbles."""
    lines = [*_SELECTORS]
    for into, (lower, upper) in zip("cd", _E2M1, strict=True):
        lines += [
            f"mov.b32 e, {lower:#010x};",
            f"mov.b32 f, {upper:#010x};",
            f"prmt.b32 {into}, e, f, b;",
        ]
    return [
        *lines,
        "shl.b32 a, a, 4;",
        "and.b32 a, a, 0x80808080;",  # signs
        "or.b32 d, d, a;",
        *_RESULTS,
    ]
