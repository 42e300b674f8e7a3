"""Scales for each row, or each group of columns, on NVIDIA GPUs: a kernel that reads x once.

A program takes rows x columns of x, powers of two, in whole groups. (Where all of x shares a scale
XLA's own loops read it no more often.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import platform
from pallas_kernels.inputs import ActSpec, Inputs
from pallas_kernels.quantize.rounding import (
    INTERPRETED,
    Arithmetic,
    extremes,
    nearest,
    round_half_even,
    scales,
)
from pallas_kernels.quantize.spec import Quantized, code_dtype, require_own_scales

MOST_COLUMNS = 1 << 15  # of a group: 64 numbers a thread
ELEMENTS = 4096  # of a program, where a group is no longer


@dataclass(frozen=True)
class Blocks:
    """rows, columns: of a program. group: columns that share a scale. All are powers of two."""

    rows: int
    columns: int
    group: int

    @property
    def warps(self) -> int:
        return min(16, max(4, self.rows * self.columns // 2048))


def blocks(rows: int, k: int, act: ActSpec) -> Blocks:
    """How the work is cut up.

    Raises:
      NotImplementedError: groups of columns are no powers of two, or too long for a program.
    """
    group = act.group_size or pl.next_power_of_2(k)
    if group != pl.next_power_of_2(group) or group > MOST_COLUMNS:
        raise NotImplementedError(f"groups of {group} columns")
    columns = max(group, min(ELEMENTS, pl.next_power_of_2(k)))
    return Blocks(min(max(1, ELEMENTS // columns), pl.next_power_of_2(rows)), columns, group)


def quantize(
    x: jax.Array, act: ActSpec, inputs: Inputs, *, num_rows: jax.Array | None
) -> Quantized:
    """See `pallas_kernels.quantize.api.quantize`."""
    del num_rows  # no row's scale depends on another row
    require_own_scales(act)
    interpret = platform.interprets("gpu")
    rows, k = x.shape
    cut = blocks(rows, k, act)
    groups = pl.cdiv(k, act.group_size or k)
    from jax.experimental.pallas import triton as plt  # jax has it on some systems only

    whole = [] if inputs.global_scale is None else [inputs.global_scale.astype(jnp.float32)]
    out = [jax.ShapeDtypeStruct((rows, k), code_dtype(act.dtype))]
    out += [jax.ShapeDtypeStruct((rows, groups), jnp.float32)] * (1 if act.symmetric else 2)

    def divide(x: jax.Array, by: jax.Array | float) -> jax.Array:
        """x / by, rounded once: the division that Triton has is off by a unit in the last place."""
        spread = jnp.broadcast_to(jnp.asarray(by, jnp.float32), x.shape)
        (found,) = plt.elementwise_inline_asm(
            "div.rn.f32 $0, $1, $2;",
            args=[x, spread],
            constraints="=f,f,f",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
        )
        return found

    def kernel(x_ref: Any, *refs: Any) -> None:
        whole_refs, out_refs = refs[: len(whole)], refs[len(whole) :]
        row = pl.program_id(0) * cut.rows + lax.iota(jnp.int32, cut.rows)
        first = pl.program_id(1) * cut.columns
        column = first + lax.iota(jnp.int32, cut.columns)
        inside = (row[:, None] < rows) & (column[None, :] < k)
        place = (pl.ds(pl.program_id(0) * cut.rows, cut.rows), pl.ds(first, cut.columns))
        tile = plt.load(x_ref.at[place], mask=inside, other=0).astype(jnp.float32)
        tile = tile.reshape(cut.rows, cut.columns // cut.group, cut.group)
        by = INTERPRETED if interpret else Arithmetic(divide, round_half_even)
        scalar = whole_refs[0][0, 0] if whole else None
        scale, zero = scales(extremes(tile, act, (2,)), act, scalar, by)
        codes = nearest(tile, scale, zero, act.dtype, by).reshape(cut.rows, cut.columns)
        plt.store(out_refs[0].at[place], codes.astype(out[0].dtype), mask=inside)
        many = cut.columns // cut.group
        group = pl.program_id(1) * many + lax.iota(jnp.int32, many)
        held = (row[:, None] < rows) & (group[None, :] < groups)
        place = (place[0], pl.ds(pl.program_id(1) * many, many))
        for ref, array in zip(out_refs[1:], (scale, zero), strict=False):
            assert array is not None
            plt.store(ref.at[place], array.reshape(cut.rows, many), mask=held)

    return Quantized(
        *pl.pallas_call(
            kernel,
            grid=(pl.cdiv(rows, cut.rows), pl.cdiv(k, cut.columns)),
            out_shape=out,
            compiler_params=plt.CompilerParams(num_warps=cut.warps, num_stages=1),
            interpret=interpret,
            name=f"quantize_{act.dtype}",
        )(x, *whole)
    )
