"""Scales for each row, or each group of columns, on TPUs: a kernel that reads x once.

A program takes some rows of x, whole. Groups are runs of lanes of one register, or of several: a
row of 128 lanes that holds several groups is reduced once for each, the others masked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import platform
from pallas_kernels.inputs import ActSpec, Inputs
from pallas_kernels.quantize.rounding import (
    INTERPRETED,
    KERNEL,
    Arithmetic,
    Extremes,
    extremes,
    nearest,
    scales,
)
from pallas_kernels.quantize.spec import Quantized, code_dtype, require_own_scales

LANES = 128
ROWS = 32  # of a register of 8-bit numbers
PIECE = 512  # columns of a long row that are worked on at once
MOST_BYTES = 2 << 20  # of x in a program


def rows_of(rows: int, k: int) -> int:
    """How many rows a program takes: all of them, or whole registers."""
    fitting = MOST_BYTES // (4 * k) // ROWS * ROWS
    return rows if rows <= max(fitting, ROWS) else max(fitting, ROWS)


def quantize(
    x: jax.Array, act: ActSpec, inputs: Inputs, *, num_rows: jax.Array | None
) -> Quantized:
    """See `pallas_kernels.quantize.api.quantize`."""
    del num_rows  # no row's scale depends on another row
    require_own_scales(act)
    interpret = platform.interprets("tpu")
    rows, k = x.shape
    size = act.group_size or k
    if act.group_size and ((size % LANES and LANES % size) or k % max(size, LANES)):
        raise NotImplementedError(f"groups of {size} of {k} columns, in rows of {LANES} lanes")
    from jax.experimental.pallas import tpu as pltpu  # jax has it on some systems only

    some, groups = rows_of(rows, k), k // size
    by = INTERPRETED if interpret else KERNEL
    whole = [] if inputs.global_scale is None else [inputs.global_scale.astype(jnp.float32)]
    beside = 1 if act.symmetric else 2
    dtypes = [code_dtype(act.dtype)] + [jnp.float32] * beside
    # Scales of several groups are written 128 at once.
    widths = [k] + [groups if groups == 1 else pl.cdiv(groups, LANES) * LANES] * beside
    width = max(size, LANES)

    def kernel(x_ref: Any, *refs: Any) -> None:
        scalar = refs[0][0, 0] if whole else None
        codes_ref, *beside_refs = refs[len(whole) :]

        def convert(columns: Any) -> tuple[list[jax.Array], list[jax.Array] | None]:
            """Writes the codes of some columns; gives their scales and zero points."""
            tile = x_ref[:, columns].astype(jnp.float32)
            scale, zero = found = _scales(tile, act, size, scalar, by)
            offset = None if zero is None else _spread(zero, tile.shape)
            codes = nearest(tile, _spread(scale, tile.shape), offset, act.dtype, by)
            codes_ref[:, columns] = _narrow(codes, dtypes[0])
            return found

        def join(columns: Any, found: Extremes) -> Extremes:
            return found.joined(extremes(x_ref[:, columns].astype(jnp.float32), act, (1,)))

        if groups == 1:
            none = jnp.zeros((some, 1))
            found = Extremes(None if act.symmetric else none, none)
            scale, zero = scales(_over(k, join, found), act, scalar, by)

            def write(columns: Any, nothing: tuple) -> tuple:
                tile = x_ref[:, columns].astype(jnp.float32)
                codes = nearest(tile, scale, zero, act.dtype, by)
                codes_ref[:, columns] = _narrow(codes, dtypes[0])
                return nothing

            _over(k, write, ())
            for ref, own in zip(beside_refs, (scale, zero), strict=False):
                ref[...] = own
            return
        lane = lax.broadcasted_iota(jnp.int32, (some, LANES), 1)
        for block in range(pl.cdiv(groups, LANES)):
            first = block * LANES * size

            def step(i: jax.Array, kept: tuple, first: int = first) -> tuple:
                start = pl.multiple_of(first + i * width, LANES)
                found = filter(None, convert(pl.ds(start, width)))
                return tuple(_put(own, row, lane, i) for own, row in zip(found, kept, strict=True))

            count = min(LANES * size, k - first) // width
            kept = lax.fori_loop(
                0, count, step, tuple(jnp.zeros((some, LANES)) for _ in beside_refs)
            )
            for ref, row in zip(beside_refs, kept, strict=True):
                ref[:, block * LANES : (block + 1) * LANES] = row

    codes, *found = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(rows, some),),
        in_specs=[
            pl.BlockSpec((some, k), lambda i: (i, 0)),
            *(pl.BlockSpec(memory_space=pltpu.SMEM) for _ in whole),
        ],
        out_specs=[pl.BlockSpec((some, width), lambda i: (i, 0)) for width in widths],
        out_shape=[
            jax.ShapeDtypeStruct((rows, width), dtype)
            for width, dtype in zip(widths, dtypes, strict=True)
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name=f"quantize_{act.dtype}",
    )(x, *whole)
    return Quantized(codes, *(each[:, :groups] for each in found))


def _over(k: int, step: Callable[[Any, Any], Any], carry: Any) -> Any:
    """What a loop over the columns of a row leaves, piece by piece."""
    whole = k // PIECE
    if whole:

        def piece(i: jax.Array, carry: Any) -> Any:
            return step(pl.ds(pl.multiple_of(i * PIECE, PIECE), PIECE), carry)

        carry = lax.fori_loop(0, whole, piece, carry)
    return step(slice(whole * PIECE, k), carry) if k % PIECE else carry


def _scales(
    tile: jax.Array, act: ActSpec, size: int, scalar: Any, by: Arithmetic
) -> tuple[list[jax.Array], list[jax.Array] | None]:
    """Scales and zero points, [rows, 1], of the groups of a tile from the left."""
    columns = tile.shape[1]
    parts = [
        tile if size >= columns else jnp.where(_group(tile.shape, size) == i, tile, 0.0)
        for i in range(max(1, columns // size))
    ]
    found = [scales(extremes(part, act, (1,)), act, scalar, by) for part in parts]
    zeros = [zero for _, zero in found if zero is not None]
    return [scale for scale, _ in found], zeros or None


def _put(own: list[jax.Array], row: jax.Array, lane: jax.Array, i: jax.Array) -> jax.Array:
    """Puts what the groups of tile i have, [rows, 1] each, into a row of lanes."""
    for j, each in enumerate(own):
        row = jnp.where(lane == i * len(own) + j, each, row)
    return row


def _spread(each: list[jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """One [rows, 1] for each group as one for each column."""
    result = jnp.broadcast_to(each[0], shape)
    for i, own in enumerate(each[1:], start=1):
        result = jnp.where(_group(shape, shape[1] // len(each)) == i, own, result)
    return result


def _group(shape: tuple[int, ...], size: int) -> jax.Array:
    """The group of each lane; its size is a power of two."""
    return lax.broadcasted_iota(jnp.int32, shape, 1) >> (size.bit_length() - 1)


def _narrow(codes: jax.Array, dtype: Any) -> jax.Array:
    """Integers by way of int32, as registers hold them."""
    return codes.astype(jnp.int32).astype(dtype) if dtype == jnp.int8 else codes.astype(dtype)
