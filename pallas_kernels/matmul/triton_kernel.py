"""The Pallas kernel for GPUs (Triton) of products with weights in planes, alone or of experts.

A program makes `outputs` x `rows` of the result, over all columns or over one of several parts of
them. It computes W @ x^T: the decoded weight is the left operand, which the matrix units of Hopper
take from registers. A chunk is `columns` columns of one segment of a block (see `planes_tile`); all
segments that lie in the same bytes are taken in one step of the loop. `triton_plan` says what
happens where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.matmul import planes_tile
from pallas_kernels.matmul.triton_plan import Plan


def product(plan: Plan, operands: Mapping[str, jax.Array], interpret: bool) -> jax.Array:
    """Calls the kernel.

    Args:
      operands: "x" [rows, k], of type `plan.dot`; "qvalue", "scale", "zero", "super_scale",
        "super_zero", "global_scale", "codebook" of the weight, floats of 8 bits as uint8; "x_scale"
        [groups, rows]; with experts "expert", "start" and "end", int32, of each tile of rows; with
        `counted` "num_rows".

    Returns:
      float32 [rows, N]. The parts of a sum are added one after the other.
    """
    blocks, n = plan.blocks, plan.planes.shape[0]
    tiles = operands["expert"].shape[0] if plan.experts else pl.cdiv(plan.rows, blocks.rows)

    def kernel(*refs: Any) -> None:
        _program(plan, dict(zip(operands, refs[:-1], strict=True)), refs[-1])

    parts = pl.pallas_call(
        kernel,
        grid=(tiles, pl.cdiv(n, blocks.outputs), blocks.splits),
        out_shape=jax.ShapeDtypeStruct((blocks.splits, plan.rows, n), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name=f"matmul_{plan.planes.qtype}",
    )(*operands.values())
    total = parts[0]
    for part in range(1, blocks.splits):
        total = total + parts[part]
    return total


class _Weight:
    """What a program reads of its weight: outputs `first` to `first` + `outputs`."""

    def __init__(self, plan: Plan, refs: Mapping[str, Any], first: Any, expert: Any) -> None:
        self.plan, self.refs = plan, refs
        self.lead = () if expert is None else (expert,)
        size, n = plan.blocks.outputs, plan.planes.shape[0]
        self.outputs = pl.ds(first, size)
        index = first + lax.iota(jnp.int32, size)
        self.inside = None if n % size == 0 else index < n
        self.scale_row = jnp.minimum(index, n - 1) // plan.planes.group[0]

    def bytes(self, start: Any) -> jax.Array:
        """uint8 [outputs, columns] from a byte of each row on."""
        ref = self.refs["qvalue"].at[(*self.lead, self.outputs, pl.ds(start, self.columns))]
        if self.inside is None:
            return plt.load(ref)
        return plt.load(ref, mask=self.inside[:, None], other=0)

    @property
    def columns(self) -> int:
        return self.plan.blocks.columns

    def beside(self, name: str, column: Any, size: int) -> jax.Array:
        """Scales or zero points as stored, one for each `size` columns, from a column of a chunk
        on: [outputs, 1], or one for each group of the chunk, or for each of its columns where
        groups do not divide it.
        """
        ref = self.refs[name]
        groups = ref.shape[-2]
        alone = self.plan.planes.group[0] == 1
        if groups == 1 or size % self.columns == 0:
            several = 1
        elif alone and self.columns % size == 0:
            several = self.columns // size
        else:
            group = jnp.minimum((column + lax.iota(jnp.int32, self.columns)) // size, groups - 1)
            shape = (self.plan.blocks.outputs, self.columns)
            at = (
                jnp.broadcast_to(group[None, :], shape),
                jnp.broadcast_to(self.scale_row[:, None], shape),
            )
            return plt.load(ref.at[(*self.lead, *at)])
        # Columns that K was filled up with may lie behind the last group.
        group, behind = 0 if groups == 1 else column // size, None
        if several > 1 and self.plan.planes.k > self.plan.planes.shape[1]:
            behind = group + lax.iota(jnp.int32, several) < groups
        elif several == 1 and groups > 1:
            group = jnp.minimum(group, groups - 1)
        if not alone:
            at = (jnp.full_like(self.scale_row, group), self.scale_row)
            return plt.load(ref.at[(*self.lead, *at)])[:, None]
        ref = ref.at[(*self.lead, pl.ds(group, several), self.outputs)]
        mask = None if self.inside is None else self.inside[None, :]
        if behind is not None:
            mask = behind[:, None] if mask is None else behind[:, None] & mask
        return plt.load(ref, mask=mask, other=None if mask is None else 0).T

    def spread(self, of_groups: jax.Array) -> jax.Array:
        """What `beside` gives, as [outputs, 1 or columns]."""
        outputs, groups = of_groups.shape
        if groups in (1, self.columns):
            return of_groups
        wide = jnp.broadcast_to(of_groups[:, :, None], (outputs, groups, self.columns // groups))
        return wide.reshape(outputs, self.columns)

    def scale(self, column: Any) -> jax.Array:
        planes = self.plan.planes
        scale = self.beside("scale", column, planes.group[1])
        scale = self._times("super_scale", column, planes_tile.scales(scale, self.plan.scale))
        whole = self.whole() if self.plan.scales_globally_first else None
        return scale if whole is None else scale * whole

    def zero(self, column: Any) -> jax.Array:
        """What is subtracted from codes, or added to weights."""
        zero = self.beside("zero", column, self.plan.planes.group[1]).astype(jnp.float32)
        return self._times("super_zero", column, zero)

    def _times(self, name: str, column: Any, fine: jax.Array) -> jax.Array:
        size = self.plan.planes.super_columns
        if size is None:
            return fine
        return fine * self.beside(name, column, size).astype(jnp.float32)

    def whole(self) -> Any:
        """The global scale, or None."""
        if "global_scale" not in self.refs:
            return None
        return self.refs["global_scale"][(*self.lead, 0, 0)]

    def values(self, codes: jax.Array, dtype: Any) -> jax.Array:
        """What codes stand for, with neither scale nor zero point."""
        if "codebook" not in self.refs:
            return planes_tile.values(codes, self.plan.planes, jnp.dtype(dtype))
        ref = self.refs["codebook"]
        # (Selects would be 15 for each code; the codebook stays in the first cache.)
        index = codes.astype(jnp.int32)
        return plt.load(ref.at[(*self.lead, jnp.zeros_like(index), index)]).astype(dtype)

    def operand(self, codes: jax.Array, column: Any) -> jax.Array:
        """The left operand of a dot, [outputs, columns]."""
        plan, planes = self.plan, self.plan.planes
        dot = jnp.dtype(plan.dot)
        if plan.scaling == "weight":
            return planes_tile.rounded(self.scaled(codes, column), plan.rounded).astype(dot)
        if dot == jnp.int8:
            if planes.value == "signed":
                return lax.bitcast_convert_type(codes, jnp.int8)
            if planes.bits == 8:
                return lax.bitcast_convert_type(codes ^ 128, jnp.int8)
            return codes.astype(jnp.int8) - planes.offset
        if planes.zero is None or plan.sums:
            return self.values(codes, dot)
        # In bfloat16 these are integers of 8 bits and a sign, exactly.
        return planes_tile.values(codes, planes, dot, zero=self.zero(column).astype(dot))

    def scaled(self, codes: jax.Array, column: Any) -> jax.Array:
        """The weight itself, [outputs, columns]."""
        plan, planes, scale = self.plan, self.plan.planes, self.scale(column)
        if plan.scale_is_narrow:
            return self.values(codes, plan.dot) * self.spread(scale.astype(plan.dot))
        scale, lookup = self.spread(scale), planes.value == "lookup"
        values = self.values(codes, jnp.float32 if lookup else plan.dot).astype(jnp.float32)
        if planes.zero is None:
            return values * scale
        zero = self.spread(self.zero(column))
        return values * scale + zero if planes.zero == "add" else (values - zero) * scale


def _program(plan: Plan, refs: Mapping[str, Any], out: Any) -> None:
    blocks = plan.blocks
    tile, split = pl.program_id(0), pl.program_id(2)
    expert = None
    if plan.experts:
        expert, start, end = (refs[name][tile] for name in ("expert", "start", "end"))
    else:
        start = tile * blocks.rows
        end = refs["num_rows"][0] if plan.counted else plan.rows
    first = pl.program_id(1) * blocks.outputs
    weight = _Weight(plan, refs, first, expert)
    rows = pl.ds(start, blocks.rows)
    whole_tiles = not plan.experts and not plan.counted and plan.rows % blocks.rows == 0
    inside = None if whole_tiles else start + lax.iota(jnp.int32, blocks.rows) < end

    def x_tile(column: Any) -> jax.Array:
        ref = refs["x"].at[rows, pl.ds(column, blocks.columns)]
        return plt.load(ref) if inside is None else plt.load(ref, mask=inside[:, None], other=0)

    def x_scale(column: Any) -> jax.Array:
        group = jnp.minimum(column // plan.x_group, refs["x_scale"].shape[0] - 1)
        ref = refs["x_scale"].at[group, rows]
        found = plt.load(ref) if inside is None else plt.load(ref, mask=inside, other=0)
        return found[None, :]

    take = _chunks(plan, weight, x_tile, x_scale)
    per_split = pl.cdiv(plan.steps, blocks.splits)
    low = split * per_split
    high = jnp.minimum(low + per_split, plan.steps)
    high = high if whole_tiles else jnp.where(start < end, high, low)
    integers = plan.dot == "int8" and plan.scaling == "end"
    zeros = jnp.zeros((blocks.outputs, blocks.rows), jnp.int32 if integers else jnp.float32)
    sums = jnp.zeros((blocks.rows,), jnp.float32)
    total, sums = lax.fori_loop(low, high, take, (zeros, sums))
    total = total.astype(jnp.float32)
    if plan.scaling == "end":
        total = _scaled(plan, weight, 0, total, sums)
    whole = weight.whole()
    if whole is not None and not plan.scales_globally_first:
        total = total * whole
    mask = None if inside is None else inside[:, None]
    if weight.inside is not None:
        mask = weight.inside[None, :] if mask is None else mask & weight.inside[None, :]
    plt.store(out.at[split, rows, weight.outputs], total.T, mask=mask)


def _chunks(
    plan: Plan,
    weight: _Weight,
    x_tile: Callable[[Any], jax.Array],
    x_scale: Callable[[Any], jax.Array],
) -> Callable[[Any, tuple[jax.Array, jax.Array]], tuple[jax.Array, jax.Array]]:
    """A step of the loop: chunk `step` % (chunks of a segment) of all segments of a block."""
    planes, columns = plan.planes, plan.blocks.columns
    length = planes_tile.segment_columns(planes)
    precision = lax.Precision.HIGHEST if plan.dot == "float32" else lax.Precision.DEFAULT
    preferred = jnp.int32 if plan.dot == "int8" else jnp.float32

    def take(step: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        total, sums = carry
        block, chunk = step // (length // columns), step % (length // columns)
        tiles = [
            [
                weight.bytes(
                    start + block * (planes.block * width // 8) + run * length + chunk * columns
                )
                for run in range(count)
            ]
            for start, width, count in zip(
                planes.offsets, planes.widths, planes_tile.runs(planes), strict=True
            )
        ]
        for segment in range(planes_tile.segments(planes)):
            column = block * planes.block + segment * length + chunk * columns
            x = x_tile(column)
            w = weight.operand(planes_tile.codes(tiles, planes, segment), column)
            dot = lax.dot_general(
                w, x, (((1,), (1,)), ((), ())), precision, preferred_element_type=preferred
            )
            added = None
            if plan.sums:
                added = jnp.sum(x.astype(preferred), axis=1).astype(jnp.float32)
                sums = sums + added
            if plan.scaling == "chunk":
                dot = _scaled(plan, weight, column, dot.astype(jnp.float32), added)
            if plan.x_group is not None:
                dot = dot * x_scale(column)
            total = total + dot
        return total, sums

    return take


def _scaled(
    plan: Plan, weight: _Weight, column: Any, total: jax.Array, sums: jax.Array | None
) -> jax.Array:
    """A sum over columns of one group, scaled, with its zero points: float32 [outputs, rows]."""
    scale = weight.scale(column)
    if sums is None or not plan.sums:
        return total * scale
    if plan.residue:
        total = total - float(plan.residue) * sums[None, :]
    if plan.planes.zero == "subtract":
        total = total - weight.zero(column) * sums[None, :]
    if plan.planes.zero == "add":
        return total * scale + weight.zero(column) * sums[None, :]
    return total * scale
