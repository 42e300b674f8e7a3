"""The Pallas kernel for TPUs (Mosaic) of products with weights in planes, alone or of experts.

The grid is (tiles of outputs, tiles of rows, steps of columns). A tile of a weight has columns
along sublanes and outputs along lanes: the segments of a block (see `planes_tile`) that one byte
holds become rows of registers one below the other, so that nothing moves across lanes, and most bit
fields are taken out of four bytes at a time. `tpu_plan` says what happens where.

With a table, tiles of rows are visited by one expert after the other, which has some of their rows;
visits that nobody needs, all at the end, read nothing and do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.matmul import planes_tile
from pallas_kernels.matmul.tpu_plan import Plan

TABLE = ("tile", "expert", "start", "end")
_CONSTANTS = ("global_scale", "codebook")
_REPEATED_BYTE = 0x01010101


def product(
    plan: Plan,
    operands: Mapping[str, jax.Array],
    table: Mapping[str, jax.Array] | None,
    interpret: bool,
) -> jax.Array:
    """Calls the kernel.

    Args:
      operands: "x" [k / unit, rows, unit] of type `plan.dot`, rows a multiple of 8 numbers of 32
        bits; of the weight, with a leading axis of experts (1 if it has none), "qvalue", "scale",
        "zero", "super_scale", "super_zero" [E, groups, N], "global_scale" and "codebook"
        [E, 1, entries]; "x_scale" [rows, groups]. Floats of less than 32 bits, but for bfloat16,
        are given as their bits.
      table: of int32 [visits], one for each of `TABLE`: which tile of rows, and whose weight meets
        its rows from "start" to "end"; or None, if one weight meets all.

    Returns:
      float32 [rows, N]. Rows that no visit has are unspecified.
    """
    blocks, n = plan.blocks, plan.planes.shape[0]
    rows = operands["x"].shape[1]
    visits = pl.cdiv(rows, blocks.rows) if table is None else table["tile"].shape[0]
    arrays, specs = _blocked(plan, operands)
    scalars = [] if table is None else [table[name] for name in TABLE]

    def kernel(*refs: Any) -> None:
        at = dict(zip(TABLE, refs, strict=False)) if scalars else None
        named = dict(zip(specs, refs[len(scalars) : -2], strict=True))
        _program(plan, at, named, refs[-2], refs[-1])

    rows_parallel = "arbitrary" if scalars else "parallel"  # experts may share a tile
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(pl.cdiv(n, blocks.outputs), visits, plan.steps),
            in_specs=list(specs.values()),
            out_specs=pl.BlockSpec(
                (blocks.rows, blocks.outputs), lambda j, i, s, *t: (_visit(plan, i, s, t)[0], j)
            ),
            scratch_shapes=[pltpu.VMEM((blocks.rows, blocks.outputs), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((rows, n), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", rows_parallel, "arbitrary"),
            vmem_limit_bytes=plan.vmem,
        ),
        interpret=interpret,
        name=f"matmul_{plan.planes.qtype}",
    )(*scalars, *arrays)


def _visit(plan: Plan, i: Any, s: Any, table: Any) -> tuple[Any, Any, Any]:
    """(tile of rows, step, expert) of a place in the grid: all as just before, where it is idle."""
    if not table:
        return i, s, 0
    tile, expert, start, end = table
    return tile[i], jnp.where(start[i] < end[i], s, plan.steps - 1), expert[i]


def _blocked(
    plan: Plan, operands: Mapping[str, jax.Array]
) -> tuple[list[jax.Array], dict[str, pl.BlockSpec]]:
    """The arrays as they go in, and which block of each a place in the grid needs, by name."""
    planes, blocks = plan.planes, plan.blocks
    arrays: list[jax.Array] = []
    specs: dict[str, pl.BlockSpec] = {}

    def add(name: str, array: jax.Array, shape: Any, place: Callable[..., Any], **where: Any):
        arrays.append(array)
        specs[name] = pl.BlockSpec(
            shape, lambda j, i, s, *table: place(j, *_visit(plan, i, s, table)), **where
        )

    x = operands["x"]
    add("x", x, (blocks.units, blocks.rows, plan.unit), lambda j, i, s, e: (s, i, 0))
    for p, (offset, width) in enumerate(zip(planes.offsets, planes.widths, strict=True)):
        size = plan.step * width // 8

        def place(j: Any, i: Any, s: Any, e: Any, first: int = offset // size) -> Any:
            return e, first + s, j

        add(f"plane {p}", operands["qvalue"], (None, size, blocks.outputs), place)
    for name, columns in _groups(plan).items():
        if name not in operands:
            continue
        array = operands[name]
        if name == "x_scale":
            array, step_of = _in_steps(plan, array.T[None], columns)
            array = array[0].swapaxes(1, 2)
            shape = (None, blocks.rows, array.shape[-1])
            add(name, array, shape, lambda j, i, s, e, at=step_of: (at(s), i, 0))
        else:
            array, step_of = _in_steps(plan, array, columns)
            shape = (None, None, array.shape[2], blocks.outputs)
            add(name, array, shape, lambda j, i, s, e, at=step_of: (e, at(s), 0, j))
    for name in _CONSTANTS:
        if name in operands:
            # (All of them: scalars come from a memory of their own.)
            array = operands[name].reshape(-1)
            add(name, array, None, lambda *_: (0,), memory_space=pltpu.SMEM)
    return arrays, specs


def _groups(plan: Plan) -> dict[str, int | None]:
    """Columns that share an entry of an array, by its name."""
    fine, coarse = plan.planes.group[1], plan.planes.super_columns
    sizes = {"scale": fine, "zero": fine, "super_scale": coarse, "super_zero": coarse}
    return sizes | {"x_scale": plan.x_group}


def _in_steps(
    plan: Plan, array: jax.Array, columns: int | None
) -> tuple[jax.Array, Callable[[Any], Any]]:
    """[E, groups, N] as [E, steps, groups of a step, N], and which of these steps a step reads.

    (Where a step has a multiple of 8 groups of 32 bits, no copy is made.)
    """
    experts, groups, n = array.shape
    if groups == 1:
        return array[:, None], lambda s: 0
    assert columns is not None
    if columns > plan.step:
        times = columns // plan.step
        return array[:, :, None], lambda s: jnp.minimum(s // times, groups - 1)
    per_step = -(-plan.step // columns)
    missing = per_step * plan.steps - groups
    if missing:
        array = jnp.pad(array, ((0, 0), (0, missing), (0, 0)))
    return array.reshape(experts, plan.steps, per_step, n), lambda s: s


def _program(plan: Plan, table: Any, refs: Mapping[str, Any], out: Any, total: Any) -> None:
    visit, step = pl.program_id(1), pl.program_id(2)
    expert = 0 if table is None else table["expert"][visit]
    weight = _Weight(plan, refs, expert)
    inside = used = None
    if table is not None:
        start, end = table["start"][visit], table["end"][visit]
        used = start < end
        first = table["tile"][visit] * plan.blocks.rows
        row = first + lax.broadcasted_iota(jnp.int32, out.shape, 0)
        inside = (row >= start) & (row < end)

    def work() -> None:
        found = _sum(plan, refs, weight)
        if plan.steps > 1:
            found = found + jnp.where(step == 0, 0.0, total[...])
            pl.when(step < plan.steps - 1)(lambda: total.__setitem__(..., found))
            pl.when(step == plan.steps - 1)(partial(finish, found))
        else:
            finish(found)

    def finish(found: jax.Array) -> None:
        if plan.scaling == "end":
            found = found * weight.scales
        out[...] = found if inside is None else jnp.where(inside, found, out[...])

    if used is None:
        work()
    else:
        pl.when(used)(work)


def _sum(plan: Plan, refs: Mapping[str, Any], weight: _Weight) -> jax.Array:
    """Over the columns of a step: float32 [rows, outputs], unscaled where that is at the end."""
    preferred = jnp.int32 if plan.dot == "int8" else jnp.float32
    precision = lax.Precision.HIGHEST if plan.dot == "float32" else lax.Precision.DEFAULT
    total = None
    for unit in range(plan.blocks.units):
        w = weight.operand(unit)
        for at in range(0, plan.unit, plan.chunk):
            column = unit * plan.unit + at
            x = refs["x"][unit, :, at : at + plan.chunk]
            dot = lax.dot_general(
                x,
                w[at : at + plan.chunk],
                (((1,), (0,)), ((), ())),
                precision,
                preferred_element_type=preferred,
            ).astype(jnp.float32)
            if plan.scaling != "weight":
                dot = _with_zeros(plan, weight, column, dot, x)
            if plan.x_group is not None:
                group = column // plan.x_group
                dot = dot * refs["x_scale"][:, group : group + 1]
            total = dot if total is None else total + dot
    assert total is not None
    return total


def _with_zeros(
    plan: Plan, weight: _Weight, column: int, dot: jax.Array, x: jax.Array
) -> jax.Array:
    """The sum of a chunk, scaled where that is done by chunks, with its zero points."""
    scale = weight.row(weight.scales, column) if plan.scaling == "chunk" else None
    if not plan.sums:
        return dot if scale is None else dot * scale
    sums = jnp.sum(x.astype(jnp.float32), axis=1, keepdims=True)
    zero = None if weight.zeros is None else weight.row(weight.zeros, column)
    if plan.planes.zero == "add":
        assert scale is not None
        assert zero is not None
        dot = dot - plan.residue * sums if plan.residue else dot
        return dot * scale + zero * sums
    subtracted = plan.residue if zero is None else zero + plan.residue
    dot = dot - subtracted * sums
    return dot if scale is None else dot * scale


class _Weight:
    """What a step reads of its weight. `scales` and `zeros` are float32 [groups, outputs]."""

    def __init__(self, plan: Plan, refs: Mapping[str, Any], expert: Any) -> None:
        self.plan, self.refs = plan, refs
        scales = planes_tile.scales(refs["scale"][...], plan.scale)
        self.scales = self._times("super_scale", scales)
        if "global_scale" in refs:
            self.scales = self.scales * refs["global_scale"][expert]
        self.zeros = None
        if "zero" in refs:
            zeros = planes_tile.scales(refs["zero"][...], str(plan.zero))
            self.zeros = self._times("super_zero", zeros)
        self.codebook = None
        if "codebook" in refs:
            entries = 1 << plan.planes.bits
            self.codebook = [refs["codebook"][expert * entries + i] for i in range(entries)]

    def _times(self, name: str, fine: jax.Array) -> jax.Array:
        coarse_columns = self.plan.planes.super_columns
        if coarse_columns is None:
            return fine
        coarse = planes_tile.scales(self.refs[name][...], "float16")
        times = coarse_columns // self.plan.planes.group[1]
        return fine * _repeated(coarse, times)[: fine.shape[0]]

    def row(self, array: jax.Array, column: int) -> jax.Array:
        """Scale or zero point of the group that a column of the step lies in: [1, outputs]."""
        group = 0 if array.shape[0] == 1 else column // self.plan.planes.group[1]
        return array[group : group + 1]

    def _spread(self, array: jax.Array, unit: int) -> jax.Array:
        """Scales or zero points for each column of a unit: [1 or unit, outputs]."""
        columns, size = self.plan.unit, self.plan.planes.group[1]
        if array.shape[0] == 1 or size >= columns:
            return self.row(array, unit * columns)
        first, count = unit * columns // size, -(-columns // size)
        return _repeated(array[first : first + count], size)[:columns]

    def operand(self, unit: int) -> jax.Array:
        """The right operand of the dots of a unit, [unit, outputs]."""
        plan, planes = self.plan, self.plan.planes
        dot = jnp.dtype(plan.dot)
        blocks = range(plan.unit // planes.block)
        codes = [self._codes(unit * len(blocks) + block) for block in blocks]
        code = codes[0] if len(codes) == 1 else jnp.concatenate(codes, axis=0)
        if plan.scaling == "weight":
            weight = planes_tile.rounded(self._scaled(code, unit), plan.rounded)
            return weight.astype(dot)
        if self.zeros is not None and planes.zero == "subtract" and not plan.sums:
            return self._values(code) - self._spread(self.zeros, unit)
        return code.astype(dot) if self._is_number(code) else self._values(code).astype(dot)

    def _scaled(self, code: jax.Array, unit: int) -> jax.Array:
        values, scale = self._values(code), self._spread(self.scales, unit)
        if self.zeros is None:
            return values * scale
        zero = self._spread(self.zeros, unit)
        return values * scale + zero if self.plan.planes.zero == "add" else (values - zero) * scale

    def _values(self, code: jax.Array) -> jax.Array:
        """What the result of `_codes` stands for: float32, with neither scale nor zero point."""
        if self._is_number(code):
            return code.astype(jnp.float32)
        planes = self.plan.planes
        return planes_tile.values(code.astype(jnp.int32), planes, jnp.float32, self.codebook)

    def _is_number(self, code: jax.Array) -> bool:
        integers = self.plan.planes.value in ("int", "signed")
        return integers or jnp.issubdtype(code.dtype, jnp.floating)

    def _codes(self, block: int) -> jax.Array:
        """Of a block of the step, [block, outputs]: integers as numbers, less their offset (those
        of 8 bits less 128, if `dot` is of integers), int8, int32 or uint8; floats of 8 bits as
        such; all others as unsigned codes, int8 or int32.
        """
        planes = self.plan.planes
        if planes.bits == 8:
            return self._bytes(self.refs["plane 0"][_rows(block, planes.block), :])
        length = planes_tile.segment_columns(planes)
        packed = length % 32 == 0
        tiles = []
        for p, (width, count) in enumerate(
            zip(planes.widths, planes_tile.runs(planes), strict=True)
        ):
            part = self.refs[f"plane {p}"][_rows(block, planes.block * width // 8), :]
            part = pltpu.bitcast(part, jnp.int32) if packed else part.astype(jnp.int32)
            size = part.shape[0] // count
            tiles.append([part[_rows(run, size)] for run in range(count)])
        segments = range(planes_tile.segments(planes))
        codes = jnp.concatenate(
            [planes_tile.codes(tiles, planes, segment, packed) for segment in segments], axis=0
        )
        if planes.value == "int" and planes.offset:
            codes = _less(codes, planes.offset) if packed else codes - planes.offset
        return pltpu.bitcast(codes, jnp.int8) if packed else codes

    def _bytes(self, codes: jax.Array) -> jax.Array:
        planes = self.plan.planes
        if planes.value == "float":
            return lax.bitcast_convert_type(codes, planes_tile.ML_DTYPES[planes.qtype])
        if planes.value == "signed":
            return lax.bitcast_convert_type(codes, jnp.int8)
        if self.plan.dot == "int8":
            return lax.bitcast_convert_type(codes ^ jnp.uint8(128), jnp.int8)
        return codes


def _rows(index: int, size: int) -> slice:
    return slice(index * size, (index + 1) * size)


def _less(words: jax.Array, number: int) -> jax.Array:
    """Words of four bytes below 128, each less a number: no byte borrows from the next."""
    high = 0x80 * _REPEATED_BYTE - (1 << 32)  # as int32
    return ((words | high) - number * _REPEATED_BYTE) ^ high


def _repeated(array: jax.Array, times: int) -> jax.Array:
    """[groups, outputs] with each row so many times."""
    groups, outputs = array.shape
    wide = jnp.broadcast_to(array[:, None, :], (groups, times, outputs))
    return wide.reshape(groups * times, outputs)
