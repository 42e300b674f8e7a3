"""The Pallas kernel for Hopper GPUs (Mosaic GPU) of products with weights in planes.

A program makes a tile of W @ x^T, over all columns or over one of several parts of them. One
warpgroup has the tensor memory accelerator bring a block of columns at a time into shared memory.
The others decode what they were given, a chunk of one segment of the block (see `planes_tile`) at a
time, into registers, which are the left operand of their matrix products (wgmma); the right one is
x^T in shared memory. While one product runs, the next operand is decoded. `mosaic_gpu_plan` says
what is scaled where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.matmul import planes_tile
from pallas_kernels.matmul.mosaic_gpu_plan import OUTPUTS, Plan

LOADER_REGISTERS = 40  # of a thread of the warpgroup that loads
COPIED_BYTES = 128  # what lies in shared memory begins at multiples of so many


def product(plan: Plan, operands: Mapping[str, jax.Array], interpret: bool) -> jax.Array:
    """Calls the kernel.

    Args:
      operands: "x" [rows, k], of type `plan.dot`, whole tiles; with groups of x "x_scale" [groups,
        rows]; "qvalue" and, as the weight has it, "codebook"; unless they act in the end, "scale",
        "zero", "super_scale" and "super_zero", with a column for each output, floats of 8 bits as
        uint8. Where each tile of rows has a weight of its own, "expert", int32 [tiles], says which,
        and weights lie one after the other in all of these.

    Returns:
      float32 [rows, N], unscaled if scales act in the end. The parts of a sum are added one after
      the other.
    """
    blocks, n, rows = plan.blocks, plan.planes.shape[0], operands["x"].shape[0]
    if "x_scale" in operands:
        tiles = operands["x_scale"].reshape(-1, rows // blocks.rows, blocks.rows)
        tiles = jnp.pad(tiles, ((0, 0), (0, 0), (0, _x_scale_width(plan) - blocks.rows)))
        operands = {**operands, "x_scale": tiles.reshape(len(tiles), -1)}
    stage = {}
    if interpret:
        stage = {
            "left": plgpu.SMEM((blocks.warpgroups, OUTPUTS, blocks.columns), jnp.dtype(plan.dot)),
            "right": plgpu.SMEM(
                (blocks.warpgroups, blocks.columns, blocks.rows), jnp.dtype(plan.dot)
            ),
        }

    def kernel(*refs: Any, **stage: Any) -> None:
        _program(plan, dict(zip(operands, refs[:-1], strict=True)), refs[-1], stage)

    parts = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((blocks.splits, n, rows), jnp.float32),
        grid=(rows // blocks.rows, n // plan.outputs, blocks.splits),
        grid_names=("tile", "outputs", "split"),
        num_threads=blocks.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=stage,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=_interpreter() if interpret else False,
    )(*operands.values())
    total = parts[0]
    for part in range(1, blocks.splits):
        total = total + parts[part]
    return total.T


def _interpreter() -> Any:
    """Has jax interpret kernels of Mosaic GPU on a CPU; made public by jax 0.11."""
    made = getattr(plgpu, "InterpretGPUParams", None)
    if made is None:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as made
    return made()


def _in_tiles(columns: int, bits: int) -> tuple[Any, ...]:
    """How a tile lies in shared memory: in parts of so many columns, rows of them swizzled."""
    swizzle = min(128, columns * bits // 8)
    return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)


def _x_scale_width(plan: Plan) -> int:
    """How many the scales of a tile of rows of x are filled up to."""
    return max(plan.blocks.rows, COPIED_BYTES // 4)


class _Beside:
    """Scales or zero points, of `size` columns each, as they come into shared memory."""

    def __init__(self, plan: Plan, name: str) -> None:
        planes, self.name = plan.planes, name
        self.of_x = name == "x_scale"
        size = planes.super_columns if name.startswith("super") else planes.group[1]
        size = plan.x_group if self.of_x else size
        assert size is not None
        self.block, self.size = planes.block, size
        self.width = _x_scale_width(plan) if self.of_x else plan.outputs
        self.rows = max(1, self.block // self.size)
        self.of_weight = -(-planes.k // self.size) // self.rows

    def require_aligned(self, dtype: Any) -> None:
        """Raises NotImplementedError where stages of the pipeline would lie between the places that
        copies may go to."""
        size = self.rows * self.width * jnp.dtype(dtype).itemsize
        if size % COPIED_BYTES:
            raise NotImplementedError(f"{self.name}: {size} bytes a step, no multiple of 128")

    def spec(self, first: Any, outputs: Any, tile: Any, expert: Any) -> Any:
        """Those of the blocks from `first` on."""
        each, place = max(1, self.size // self.block), tile if self.of_x else outputs
        before = 0 if self.of_x else expert * self.of_weight
        return plgpu.BlockSpec(
            (self.rows, self.width),
            lambda step: (before + (first + step) // each, place),
            memory_space=plgpu.SMEM,
        )


def _program(plan: Plan, refs: Mapping[str, Any], out: Any, stage: Mapping[str, Any]) -> None:
    blocks, planes = plan.blocks, plan.planes
    tile, outputs, split, warpgroup = (
        lax.axis_index(name) for name in ("tile", "outputs", "split", "warpgroup")
    )
    first = split * plan.steps
    expert = refs["expert"][tile] if "expert" in refs else 0
    of_warpgroup = pl.ds(warpgroup * OUTPUTS, OUTPUTS)
    own = pl.ds(outputs * plan.outputs + warpgroup * OUTPUTS, OUTPUTS)
    staged = {name: ref.at[warpgroup] for name, ref in stage.items()}
    names = ("scale", "zero", "super_scale", "super_zero", "x_scale")
    besides = [_Beside(plan, name) for name in names if name in refs]
    for each in besides:
        each.require_aligned(refs[each.name].dtype)
    codebook = None
    if "codebook" in refs:
        codebook = [refs["codebook"][expert, entry] for entry in range(1 << planes.bits)]

    of_expert = expert * (planes.shape[0] // plan.outputs)

    def bytes_of(offset: int, width: int) -> Any:
        size = planes.block * width // 8
        return plgpu.BlockSpec(
            (plan.outputs, size),
            lambda step: (of_expert + outputs, offset // size + first + step),
            transforms=_in_tiles(blocks.columns, 8),
            memory_space=plgpu.SMEM,
        )

    x_spec = plgpu.BlockSpec(
        (blocks.rows, planes.block),
        lambda step: (tile, first + step),
        transforms=_in_tiles(blocks.columns, 8 * jnp.dtype(plan.dot).itemsize),
        memory_space=plgpu.SMEM,
    )
    of_planes = [
        bytes_of(offset, width) for offset, width in zip(planes.offsets, planes.widths, strict=True)
    ]

    def stored(arrived: Mapping[str, Any], name: str, column: int) -> jax.Array:
        """float32 [outputs of a warpgroup], of a column of the block."""
        ref, size = arrived[name]
        found = ref[column // size, of_warpgroup]
        if name == "scale":
            return planes_tile.scales(found, plan.scale)
        return found.astype(jnp.float32)

    def beside(arrived: Mapping[str, Any], name: str, column: int, size: int) -> jax.Array:
        """float32 [outputs of a warpgroup, size], of the chunk from a column of the block on."""
        wide, each = None, min(planes.group[1], blocks.columns)
        for start in range(0, blocks.columns, each):
            found = stored(arrived, name, column + start)
            if planes.super_columns is not None:
                found = found * stored(arrived, f"super_{name}", column + start)
            found = lax.broadcast_in_dim(found, (OUTPUTS, size), (0,))
            if wide is not None:
                found = jnp.where(
                    lax.broadcasted_iota(jnp.int32, found.shape, 1) < start, wide, found
                )
            wide = found
        assert wide is not None
        return wide

    integers = plan.dot == "int8"
    accumulator = plgpu.WGMMAAccumulatorRef(
        (OUTPUTS, blocks.rows), jnp.int32 if integers else jnp.float32
    )

    def take(_: Any, *arguments: Any) -> Any:
        """A block of columns; `total` is a sum in registers, or where matrix products add to."""
        of_w, (x, *rest, total) = arguments[: len(of_planes)], arguments[len(of_planes) :]
        arrived = {each.name: (ref, each.size) for each, ref in zip(besides, rest, strict=True)}
        pending = False
        for column, codes in _chunks(plan, of_w, of_warpgroup):
            left = _operand(
                plan,
                codes,
                codebook,
                lambda name, at=column: beside(arrived, name, at, blocks.columns),
            )
            right = x.at[:, pl.ds(column, blocks.columns)]
            if plan.by_chunks:
                dot = pl.run_scoped(
                    lambda sums, left=left, right=right: _alone(sums, left, right, staged),
                    accumulator,
                ).astype(jnp.float32)
                if plan.scaling == "chunk":
                    dot = dot * beside(arrived, "scale", column, blocks.rows)
                if plan.x_group is not None:
                    ref, size = arrived["x_scale"]
                    of_rows = ref[column // size, pl.ds(0, blocks.rows)]
                    dot = dot * lax.broadcast_in_dim(of_rows, dot.shape, (1,))
                total = total + dot
                continue
            if pending:
                plgpu.wgmma_wait(0)
            _multiply(total, left, right, staged)
            pending = True
        if pending:
            plgpu.wgmma_wait(0)
        return total

    def compute(run: Callable[[Any], Any]) -> None:
        if plan.by_chunks:
            total = run(jnp.zeros((OUTPUTS, blocks.rows), jnp.float32))
        else:

            def finished(sums: Any) -> jax.Array:
                run(sums)
                return sums[...].astype(jnp.float32)

            total = pl.run_scoped(finished, accumulator)
        out[split, own, pl.ds(tile * blocks.rows, blocks.rows)] = total

    pipeline = plgpu.emit_pipeline_warp_specialized(
        take,
        grid=(plan.steps,),
        memory_registers=LOADER_REGISTERS,
        in_specs=[
            *of_planes,
            x_spec,
            *(each.spec(first, outputs, tile, expert) for each in besides),
        ],
        wg_axis="warpgroup",
        num_compute_wgs=blocks.warpgroups,
        max_concurrent_steps=blocks.stages,
        compute_context=compute,
    )
    pipeline(*[refs["qvalue"]] * len(of_planes), refs["x"], *(refs[each.name] for each in besides))


def _chunks(plan: Plan, of_planes: Any, outputs: Any) -> Iterator[tuple[int, jax.Array]]:
    """First columns, in the block, and codes of its chunks."""
    planes, columns = plan.planes, plan.blocks.columns
    length = planes_tile.segment_columns(planes)

    def part(ref: Any, start: int) -> jax.Array:
        found = ref[outputs, pl.ds(start, columns)]
        return found if planes.bits == 8 else found.astype(jnp.int16)

    for chunk in range(0, length, columns):
        runs = [
            [part(ref, run * length + chunk) for run in range(count)]
            for ref, count in zip(of_planes, planes_tile.runs(planes), strict=True)
        ]
        for segment in range(planes_tile.segments(planes)):
            yield segment * length + chunk, planes_tile.codes(runs, planes, segment)


def _operand(
    plan: Plan, codes: jax.Array, codebook: Any, beside: Callable[[str], jax.Array]
) -> jax.Array:
    """The left operand of a matrix product: [outputs, columns], of type `plan.dot`."""
    planes = plan.planes
    if plan.dot != "bfloat16":
        if planes.bits < 8:
            return (codes - planes.offset).astype(plan.dot)
        return lax.bitcast_convert_type(codes, jnp.dtype(plan.dot))
    if planes.value == "lookup" or (planes.value == "float" and planes.bits == 8):
        number = planes_tile.values(codes, planes, jnp.float32, codebook)
    elif planes.zero == "subtract" and plan.scaling == "chunk":
        # Integers of 8 bits and a sign, exactly.
        zero = beside("zero").astype(jnp.bfloat16)
        return planes_tile.values(codes, planes, jnp.bfloat16, zero=zero)
    else:
        number = planes_tile.values(codes, planes, jnp.bfloat16)
    if plan.scaling != "weight":
        return number.astype(jnp.bfloat16)
    number, scale = number.astype(jnp.float32), beside("scale")
    if planes.zero == "add":
        number = number * scale + beside("zero")
    elif planes.zero == "subtract":
        number = (number - beside("zero")) * scale
    else:
        number = number * scale
    return number.astype(jnp.bfloat16)


def _alone(sums: Any, left: jax.Array, right: Any, staged: Mapping[str, Any]) -> jax.Array:
    _multiply(sums, left, right, staged)
    return sums[...]


def _multiply(sums: Any, left: jax.Array, right: Any, staged: Mapping[str, Any]) -> None:
    """Begins to add left @ right.T to the sums; `right` lies in shared memory."""
    if staged:
        # The interpreter multiplies only what lies in shared memory, and as it lies there.
        staged["left"][...] = left
        staged["right"][...] = right[...].T
        plgpu.wgmma(sums, staged["left"], staged["right"])
    else:
        plgpu.wgmma(sums, left, right.T)
