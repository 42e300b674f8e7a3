"""How the Mosaic GPU kernel computes a product, and how the work is cut up: all that is static.

Where scales act, "scaling":

- "end": each output has one. XLA multiplies the finished sum by it, and takes off a zero point
  through the sum of a row of x.
- "chunk": a chunk of columns lies in one group; its scale multiplies the float32 sum of the chunk.
- "weight": the weight is scaled first, in float32, and rounded to bfloat16.

Zero points that are integers are taken off the codes, whose differences bfloat16 holds exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.matmul import planes_tile
from pallas_kernels.matmul.planes import Planes, describe
from pallas_kernels.matmul.spec import WeightSpec

OUTPUTS = 64  # of a matrix product of a warpgroup
FEW_ROWS = 64
MOST_ROWS = 128  # of a tile
LEAST_ROWS = 8  # what a matrix product takes
LEAST_COLUMNS = 32  # of a chunk: the fewest bytes of a row that can be read from shared memory
LEAST_GROUP = 16
WIDE_COLUMNS = 64  # of a chunk; scaling a weight costs less than a sum of its own for fewer
SHARED_MEMORY = 200 << 10  # of a program, for the stages of its pipeline
MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Blocks:
    """How the work is cut up.

    Attributes:
      rows: of a tile, a multiple of 8.
      columns: of a chunk, a power of two that divides those of a segment. Of one group, but for
        groups of 16, which are two to a chunk.
      warpgroups: that compute, each `OUTPUTS` outputs of a tile. (One more loads.)
      splits: parts of the columns, each summed by a program of its own.
      stages: of the pipeline.
    """

    rows: int
    columns: int
    warpgroups: int
    splits: int
    stages: int


@dataclass(frozen=True)
class Plan:
    """All that is static.

    Attributes:
      planes: of the weight.
      blocks: see there.
      scaling: see the header.
      scale: dtype of the stored scales.
    """

    planes: Planes
    blocks: Blocks
    scaling: str
    scale: str

    @property
    def steps(self) -> int:
        """Steps of a pipeline: blocks of columns that a program takes."""
        return self.planes.k // self.planes.block // self.blocks.splits

    @property
    def outputs(self) -> int:
        """Outputs of a tile."""
        return OUTPUTS * self.blocks.warpgroups


def plan_of(spec: WeightSpec, rows: int, operands: tuple[str, ...] = ()) -> Plan:
    """How the kernel computes with x [rows, K].

    Args:
      operands: names of the weight's arrays, as `triton.weight_operands` has them.

    Raises:
      NotImplementedError: the kernel does not compute so; the reason is the message.
    """
    planes = describe(spec)
    n, group = planes.shape[0], planes.group
    one_group = group[1] >= planes.shape[1]
    if n % OUTPUTS:
        raise NotImplementedError(f"{n} outputs, not a multiple of {OUTPUTS}")
    if not one_group and planes.block % group[1] and group[1] % planes.block:
        raise NotImplementedError(f"groups of {group[1]} columns in blocks of {planes.block}")
    columns = planes_tile.segment_columns(planes)
    if columns < LEAST_COLUMNS:
        raise NotImplementedError(f"runs of {columns} columns, fewer than {LEAST_COLUMNS}")
    if group[1] < LEAST_GROUP:
        raise NotImplementedError(f"groups of {group[1]} columns, fewer than {LEAST_GROUP}")
    columns = columns if one_group else max(LEAST_COLUMNS, math.gcd(columns, group[1]))
    if planes.value == "lookup" and planes.bits > 4:
        raise NotImplementedError(f"a codebook of {1 << planes.bits} entries")
    if planes.zero == "add" and "global_scale" in operands:
        raise NotImplementedError("a global scale beside zero points that are added")
    integers = spec.zero_point is not None and jnp.issubdtype(spec.zero_point, jnp.integer)
    exact = planes.zero is None or (planes.zero == "subtract" and integers)
    if one_group:
        scaling = "end"
    elif exact and rows <= FEW_ROWS and columns >= WIDE_COLUMNS:
        scaling = "chunk"
    else:
        scaling = "weight"
    default = blocks(rows, planes, columns)
    measured = tuning.blocks("matmul", "mosaic_gpu", spec.kind, rows, *spec.shape)
    sizes = default if measured is None else _fitting(measured, default, planes, columns)
    return Plan(planes, sizes, scaling, str(spec.scale))


def blocks(rows: int, planes: Planes, columns: int) -> Blocks:
    """How the work is cut up where no measurement says better.

    Args:
      rows: of x.
      columns: the most that a chunk may have.
    """
    n, few = planes.shape[0], rows <= FEW_ROWS
    tile = min(max(LEAST_ROWS, 1 << (rows - 1).bit_length()), MOST_ROWS)
    # Few rows: as many programs as keep the memory busy, whatever the number of rows is.
    groups = 1 if few or n % (2 * OUTPUTS) else 2
    tiles = n // (groups * OUTPUTS) * (1 if few else -(-rows // tile))
    steps, splits = planes.k // planes.block, 1
    while tiles * splits < MULTIPROCESSORS and steps % (2 * splits) == 0 and steps >= 8 * splits:
        splits *= 2
    sizes = Blocks(tile, min(columns, 128 if few else 64), groups, splits, 1)
    return replace(sizes, stages=_stages(4, sizes, planes))


def _stages(wanted: int, sizes: Blocks, planes: Planes) -> int:
    """So many, or what shared memory and steps there are for."""
    of_weights = sizes.warpgroups * OUTPUTS * planes.block * planes.bits // 8
    of_x = sizes.rows * planes.block * 2
    steps = planes.k // planes.block // sizes.splits
    return max(1, min(wanted, SHARED_MEMORY // (of_weights + of_x), steps))


def _fitting(measured: dict[str, int], default: Blocks, planes: Planes, columns: int) -> Blocks:
    """Measured block sizes, where this call can have them."""
    sizes = replace(default, **measured)
    steps = planes.k // planes.block
    sizes = replace(
        sizes,
        columns=max(LEAST_COLUMNS, math.gcd(columns, sizes.columns)),
        warpgroups=sizes.warpgroups if planes.shape[0] % (sizes.warpgroups * OUTPUTS) == 0 else 1,
        splits=math.gcd(steps, sizes.splits),
    )
    return replace(sizes, stages=_stages(sizes.stages, sizes, planes))


def candidates(kind: str, rows: int, n: int, k: int) -> Iterator[dict[str, int]]:
    """Block sizes worth measuring for a weight [n, k] and x [rows, k]."""
    del kind
    few = rows <= FEW_ROWS
    tile = max(LEAST_ROWS, 1 << (rows - 1).bit_length())
    for size in (tile,) if few else (64, 128, 256):
        for columns in (64, 128):
            for warpgroups in (1, 2):
                for splits in (1, 2, 4, 8) if few else (1,):
                    tiles = n // (warpgroups * OUTPUTS) * splits
                    if splits > 1 and (tiles > 16 * MULTIPROCESSORS or k < 512 * splits):
                        continue
                    for stages in (3, 5):
                        yield asdict(Blocks(size, columns, warpgroups, splits, stages))
