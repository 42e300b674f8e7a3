"""Bytes in Triton kernels, decoded four at a time, as they lie in a register.

Triton's compiler takes an array of bytes apart, and shifts, masks and converts each in a register
of its own; that takes longer than the memory needs to bring them. What is here are instructions of
PTX for whole registers. A byte that is put below a fixed one is a number of 16 bits: 0x43 makes it
128 + byte in bfloat16, of bytes below 128, and 0x64 makes it 1024 + byte in float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

ABOVE = {"bfloat16": 0x43, "float16": 0x64}  # the fixed byte; its number is that of byte 0


def decoded(lines: Sequence[str], arrays: Sequence[jax.Array], dtype: Any) -> jax.Array:
    """An array of 16 bits from arrays of one shape: of bytes, and of words.

    Args:
      lines: of PTX. $0 and $1 are the registers of what bytes 0 and 1, and 2 and 3, become; those
        of the arrays begin with $2, one for four bytes, and one for each word. `a`, `b`, `c`, `d`,
        `e` and `f` are free.
    """
    registers = sum(array.dtype.itemsize for array in arrays)
    (found,) = plt.elementwise_inline_asm(
        f"{{ .reg .b32 a, b, c, d, e, f; {' '.join(lines)} }}",
        args=list(arrays),
        constraints=",".join(["=&r", "=&r", *["r"] * registers]),
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(arrays[0].shape, dtype)],
    )
    return found


def beside(source: str, above: int) -> list[str]:
    """Bytes of the register `source`, each below a fixed one."""
    return [
        f"mov.b32 f, {0x01010101 * above:#010x};",
        f"prmt.b32 $0, {source}, f, 0x4140;",
        f"prmt.b32 $1, {source}, f, 0x4342;",
    ]


def signed(codes: jax.Array) -> jax.Array:
    """int8 as float16."""
    lines = ["xor.b32 a, $2, 0x80808080;", *beside("a", ABOVE["float16"])]
    return decoded(lines, [codes], jnp.float16) - jnp.float16(1024 + 128)


def nibbles(packed: jax.Array) -> list[jax.Array]:
    """The low and the high 4 bits of uint8 as float16."""
    parts = []
    for shift in (0, 4):
        lines = [f"shr.b32 a, $2, {shift};", "and.b32 a, a, 0x0f0f0f0f;"]
        lines += beside("a", ABOVE["float16"])
        parts.append(decoded(lines, [packed], jnp.float16) - jnp.float16(1024))
    return parts
