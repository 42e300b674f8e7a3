"""The Pallas kernel for GPUs (Triton) of products with weights in planes, alone or of experts.

A program makes `outputs` x `rows` of the result, over all columns or over one of several parts of
them. It computes W @ x^T: the decoded weight is the left operand, which the matrix units of Hopper
take from registers. A chunk is `columns` columns of one segment of a block (see `planes_tile`); all
segments that lie in the same bytes are taken in one step of the loop. `triton_plan` says what
happens where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.matmul import planes_tile, triton_words
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
        _program(plan, dict(zip(operands, refs[:-1], strict=True)), refs[-1], interpret)

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


# For each plane its runs of bytes, see `planes_tile`.
Tiles = Sequence[Sequence[jax.Array]]
# Scales and zero points by name, see `_Weight.beside`.
Stored = dict[str, jax.Array]


class _Weight:
    """What a program reads of its weight: outputs `first` to `first` + `outputs`."""

    def __init__(
        self, plan: Plan, refs: Mapping[str, Any], first: Any, expert: Any, interpret: bool
    ) -> None:
        self.plan, self.refs = plan, refs
        self.by_words = triton_words.takes(plan.planes) and not interpret
        self.lead = () if expert is None else (expert,)
        self.table, self.rest = self._tables() if self.by_words and "codebook" in refs else ((), ())
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
        if several == 1 and groups > 1:
            ref = ref.at[(*self.lead, group, self.outputs)]
            mask, other = self.inside, None if self.inside is None else 0
            return plt.load(ref, mask=mask, other=other)[:, None]
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

    def stored(self, column: Any) -> Stored:
        """All of them, for the chunk from a column on."""
        planes = self.plan.planes
        sizes = {"scale": planes.group[1], "zero": planes.group[1]}
        sizes |= {"super_scale": planes.super_columns, "super_zero": planes.super_columns}
        return {
            name: self.beside(name, column, size)
            for name, size in sizes.items()
            if size is not None and name in self.refs
        }

    def scale(self, stored: Stored) -> jax.Array:
        scale = planes_tile.scales(stored["scale"], self.plan.scale)
        if "super_scale" in stored:
            scale = scale * stored["super_scale"].astype(jnp.float32)
        whole = self.whole() if self.plan.scales_globally_first else None
        return scale if whole is None else scale * whole

    def zero(self, stored: Stored) -> jax.Array:
        """What is subtracted from codes, or added to weights."""
        zero = stored["zero"].astype(jnp.float32)
        if "super_zero" in stored:
            zero = zero * stored["super_zero"].astype(jnp.float32)
        return zero

    def whole(self) -> Any:
        """The global scale, or None."""
        if "global_scale" not in self.refs:
            return None
        return self.refs["global_scale"][(*self.lead, 0, 0)]

    def _tables(self) -> tuple[list[jax.Array], list[jax.Array]]:
        """Of the codebook in bfloat16, and of what is left of its entries."""
        ref = self.refs["codebook"]
        entries = [ref[(*self.lead, 0, entry)] for entry in range(16)]
        rest = [entry - entry.astype(jnp.bfloat16).astype(jnp.float32) for entry in entries]
        return triton_words.table_of(entries), triton_words.table_of(rest)

    def values(self, tiles: Tiles, segment: int, dtype: Any, zero: Any = 0) -> jax.Array:
        """What codes stand for, less a zero point of `dtype`, and not scaled."""
        planes, dtype = self.plan.planes, jnp.dtype(dtype)
        if self.by_words and dtype == jnp.bfloat16:
            number = triton_words.numbers(tiles, planes, segment, self.table)
            return number - (zero + (128 + planes.offset)) if planes.value == "int" else number
        if self.table and self.plan.dot == "bfloat16":  # 16 bits of fraction are enough for that
            parts = (
                triton_words.numbers(tiles, planes, segment, t) for t in (self.table, self.rest)
            )
            high, low = (part.astype(jnp.float32) for part in parts)
            return high + low
        codes = planes_tile.codes(tiles, planes, segment)
        if "codebook" not in self.refs:
            return planes_tile.values(codes, planes, dtype, zero=zero)
        ref = self.refs["codebook"]
        # (Selects would be 15 for each code; the codebook stays in the first cache.)
        index = codes.astype(jnp.int32)
        return plt.load(ref.at[(*self.lead, jnp.zeros_like(index), index)]).astype(dtype)

    def operand(self, tiles: Tiles, segment: int, stored: Stored) -> jax.Array:
        """The left operand of a dot, [outputs, columns]: a segment of what was loaded."""
        plan, planes = self.plan, self.plan.planes
        dot = jnp.dtype(plan.dot)
        if plan.scaling == "weight":
            scaled = self.scaled(tiles, segment, stored)
            return planes_tile.rounded(scaled, plan.rounded).astype(dot)
        if dot == jnp.int8:
            codes = planes_tile.codes(tiles, planes, segment)
            if planes.value == "signed":
                return lax.bitcast_convert_type(codes, jnp.int8)
            if planes.bits == 8:
                return lax.bitcast_convert_type(codes ^ 128, jnp.int8)
            return codes.astype(jnp.int8) - planes.offset
        if planes.zero is None or plan.sums:
            return self.values(tiles, segment, dot)
        # In bfloat16 these are integers of 8 bits and a sign, exactly.
        return self.values(tiles, segment, dot, self.zero(stored).astype(dot))

    def scaled(self, tiles: Tiles, segment: int, stored: Stored) -> jax.Array:
        """The weight itself, [outputs, columns]."""
        plan, planes, scale = self.plan, self.plan.planes, self.scale(stored)
        if plan.scale_is_narrow:
            scale = self.spread(scale.astype(plan.dot))
            return self.values(tiles, segment, plan.dot) * scale
        scale = self.spread(scale)
        dtype = jnp.float32 if planes.value == "lookup" else plan.dot
        values = self.values(tiles, segment, dtype).astype(jnp.float32)
        if planes.zero is None:
            return values * scale
        zero = self.spread(self.zero(stored))
        return values * scale + zero if planes.zero == "add" else (values - zero) * scale


def _program(plan: Plan, refs: Mapping[str, Any], out: Any, interpret: bool) -> None:
    blocks = plan.blocks
    tile, split = pl.program_id(0), pl.program_id(2)
    expert = None
    if plan.experts:
        expert, start, end = (refs[name][tile] for name in ("expert", "start", "end"))
    else:
        start = tile * blocks.rows
        end = refs["num_rows"][0] if plan.counted else plan.rows
    first = pl.program_id(1) * blocks.outputs
    weight = _Weight(plan, refs, first, expert, interpret)
    rows = pl.ds(start, blocks.rows)
    whole_tiles = not plan.experts and not plan.counted and plan.rows % blocks.rows == 0
    inside = None if whole_tiles else start + lax.iota(jnp.int32, blocks.rows) < end

    def x_tile(column: Any) -> jax.Array:
        ref = refs["x"].at[rows, pl.ds(column, blocks.columns)]
        return plt.load(ref) if inside is None else plt.load(ref, mask=inside[:, None], other=0)

    def x_scale(column: Any) -> jax.Array:
        group = jnp.minimum(column // plan.x_group, refs["x_scale"].shape[0] - 1)
        ref = refs["x_scale"].at[group, rows]
        return plt.load(ref) if inside is None else plt.load(ref, mask=inside, other=0)

    ahead, take = _chunks(plan, weight, x_tile, x_scale)
    per_split = pl.cdiv(plan.steps, blocks.splits)
    low = split * per_split
    high = jnp.minimum(low + per_split, plan.steps)
    high = high if whole_tiles else jnp.where(start < end, high, low)
    integers = plan.dot == "int8" and plan.scaling == "end"
    shape = (blocks.rows, blocks.outputs) if plan.x_first else (blocks.outputs, blocks.rows)
    zeros = jnp.zeros(shape, jnp.int32 if integers else jnp.float32)
    sums = jnp.zeros((blocks.rows,), jnp.float32)
    total, sums, _ = lax.fori_loop(low, high, take, (zeros, sums, ahead(low)))
    total = total.astype(jnp.float32)
    if plan.scaling == "end":
        total = _scaled(plan, weight, weight.stored(0), total, sums)
    whole = weight.whole()
    if whole is not None and not plan.scales_globally_first:
        total = total * whole
    mask = None if inside is None else inside[:, None]
    if weight.inside is not None:
        mask = weight.inside[None, :] if mask is None else mask & weight.inside[None, :]
    plt.store(out.at[split, rows, weight.outputs], total if plan.x_first else total.T, mask=mask)


Carry = tuple[jax.Array, jax.Array, list[Stored]]


def _chunks(
    plan: Plan,
    weight: _Weight,
    x_tile: Callable[[Any], jax.Array],
    x_scale: Callable[[Any], jax.Array],
) -> tuple[Callable[[Any], list[Stored]], Callable[[Any, Carry], Carry]]:
    """What a step of the loop reads beside codes, and a step: chunk `step` % (chunks of a segment)
    of all segments of a block.

    Scales and zero points are read a step ahead: the compiler brings what products read into shared
    memory before it is needed, but not what acts on their results.
    """
    planes, columns = plan.planes, plan.blocks.columns
    length = planes_tile.segment_columns(planes)
    precision = lax.Precision.HIGHEST if plan.dot == "float32" else lax.Precision.DEFAULT
    preferred = jnp.int32 if plan.dot == "int8" else jnp.float32

    def place(step: Any) -> tuple[Any, Any]:
        return step // (length // columns), step % (length // columns)

    def ahead(step: Any) -> list[Stored]:
        if plan.scaling == "end" and (planes.zero is None or plan.sums):
            return []
        block, chunk = place(jnp.minimum(step, plan.steps - 1))
        start = block * planes.block + chunk * columns
        return [
            weight.stored(start + segment * length)
            for segment in range(planes_tile.segments(planes))
        ]

    def take(step: Any, carry: Carry) -> Carry:
        total, sums, stored = carry
        following = ahead(step + 1)
        block, chunk = place(step)
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
            own = stored[segment] if stored else {}
            w = weight.operand(tiles, segment, own)
            dot = lax.dot_general(
                *((x, w) if plan.x_first else (w, x)),
                (((1,), (1,)), ((), ())),
                precision,
                preferred_element_type=preferred,
            )
            added = None
            if plan.sums:
                added = jnp.sum(x.astype(preferred), axis=1).astype(jnp.float32)
                sums = sums + added
            if plan.scaling == "chunk":
                dot = _scaled(plan, weight, own, dot.astype(jnp.float32), added)
            if plan.x_group is not None:
                of_rows = x_scale(column)
                dot = dot * (of_rows[:, None] if plan.x_first else of_rows[None, :])
            total = total + dot
        return total, sums, following

    return ahead, take


def _scaled(
    plan: Plan, weight: _Weight, stored: Stored, total: jax.Array, sums: jax.Array | None
) -> jax.Array:
    """A sum over columns of one group, scaled, with its zero points: float32, of the same shape."""

    def of_outputs(array: jax.Array) -> jax.Array:
        return array.T if plan.x_first else array

    scale = of_outputs(weight.scale(stored))
    if sums is None or not plan.sums:
        return total * scale
    of_rows = sums[:, None] if plan.x_first else sums[None, :]
    if plan.residue:
        total = total - float(plan.residue) * of_rows
    if plan.planes.zero == "subtract":
        total = total - of_outputs(weight.zero(stored)) * of_rows
    if plan.planes.zero == "add":
        return total * scale + of_outputs(weight.zero(stored)) * of_rows
    return total * scale
