"""How the Mosaic GPU kernel computes a product, and how the work is cut up: all that is static.

Where scales act, "scaling":

- "end": each output has one. XLA multiplies the finished sum by it, and takes off a zero point
  through the sum of a row of x.
- "chunk": a chunk of columns lies in one group; its scale multiplies the float32 sum of the chunk.
- "weight": the weight is scaled first, in float32, and rounded to bfloat16: not where x is codes.

Zero points that are integers are taken off the codes, whose differences bfloat16 holds exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.codes import ML_DTYPES
from pallas_kernels.matmul import planes_tile
from pallas_kernels.matmul.planes import Planes, describe
from pallas_kernels.matmul.spec import WeightSpec

OUTPUTS = 64  # of a matrix product of a warpgroup
FEW_ROWS = 64
MOST_ROWS = 128  # of a tile
LEAST_ROWS = 8  # what a matrix product takes
LEAST_COLUMNS = 32  # of a chunk: the fewest bytes of a row that can be read from shared memory
LEAST_GROUP = 16
# Of a chunk: scaling a weight costs less than a sum of its own for fewer, and matrix units take
# fewer codes of 8 bits from shared memory only.
WIDE_COLUMNS = 64
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
      dot: dtype of x and of the other operand of a matrix product.
      x_group: columns that share a scale of x; None where x has none in here.
    """

    planes: Planes
    blocks: Blocks
    scaling: str
    scale: str
    dot: str
    x_group: int | None

    @property
    def by_chunks(self) -> bool:
        """Whether each chunk has a sum of its own: to be scaled, or since matrix units keep fewer
        bits of sums of 8-bit floats than float32 has."""
        return self.scaling == "chunk" or self.x_group is not None or "float8" in self.dot

    @property
    def steps(self) -> int:
        """Steps of a pipeline: blocks of columns that a program takes."""
        return self.planes.k // self.planes.block // self.blocks.splits

    @property
    def outputs(self) -> int:
        """Outputs of a tile."""
        return OUTPUTS * self.blocks.warpgroups


def plan_of(
    spec: WeightSpec,
    rows: int,
    dtype: Any = jnp.bfloat16,
    *,
    exact_codes: bool = False,
    x_group: int | None = None,
    has_global_scale: bool = False,
) -> Plan:
    """How the kernel computes with x [rows, K] of this dtype.

    Args:
      exact_codes: x are codes, if their dtype does not tell.
      x_group: columns that share a scale of x, where there are several groups.
      has_global_scale: whether the weight has.

    Raises:
      NotImplementedError: the kernel does not compute so; the reason is the message.
    """
    planes, dtype = describe(spec), jnp.dtype(dtype)
    exact_codes = exact_codes or dtype.itemsize == 1
    n, group = planes.shape[0], planes.group
    one_group = group[1] >= planes.shape[1]
    if n % OUTPUTS:
        raise NotImplementedError(f"{n} outputs, not a multiple of {OUTPUTS}")
    columns = planes_tile.segment_columns(planes)
    if columns < LEAST_COLUMNS:
        raise NotImplementedError(f"runs of {columns} columns, fewer than {LEAST_COLUMNS}")
    for size in ([] if one_group else [group[1]]) + ([] if x_group is None else [x_group]):
        if planes.block % size and size % planes.block:
            raise NotImplementedError(f"groups of {size} columns in blocks of {planes.block}")
        if size < (LEAST_COLUMNS if exact_codes else LEAST_GROUP):
            raise NotImplementedError(f"groups of {size} columns")
        columns = max(LEAST_COLUMNS, math.gcd(columns, size))
    if planes.value == "lookup" and (planes.bits > 4 or exact_codes):
        raise NotImplementedError(f"a codebook of {1 << planes.bits} entries")
    if planes.zero == "add" and has_global_scale:
        raise NotImplementedError("a global scale beside zero points that are added")
    integers = spec.zero_point is not None and jnp.issubdtype(spec.zero_point, jnp.integer)
    exact = planes.zero is None or (planes.zero == "subtract" and integers)
    if one_group:
        scaling = "end"
    elif exact and (exact_codes or (rows <= FEW_ROWS and columns >= WIDE_COLUMNS)):
        scaling = "chunk"
    elif exact_codes:
        raise NotImplementedError("codes by codes with zero points that are no integers")
    else:
        scaling = "weight"
    default = blocks(rows, planes, columns)
    kind = tuning.product_kind(spec.kind, dtype)
    measured = tuning.blocks("matmul", "mosaic_gpu", kind, rows, *spec.shape)
    sizes = default if measured is None else _fitting(measured, default, planes, columns)
    plain = (planes.zero is None or one_group) and columns >= WIDE_COLUMNS
    dot = _dot(dtype, planes, plain)
    return Plan(planes, sizes, scaling, str(spec.scale), dot, x_group)


def _dot(dtype: Any, planes: Planes, plain: bool) -> str:
    """In which type codes of x, or x itself, meet codes of the weight.

    Args:
      plain: no zero point is subtracted from codes, and a chunk is wide enough for 8 bits.
    """
    if planes.value == "float":
        alike = planes.bits == 8 and dtype == ML_DTYPES[planes.qtype]
    else:
        in_8_bits = planes.value == "signed" or (planes.value == "int" and planes.bits < 8)
        alike = in_8_bits and dtype == jnp.int8
    return dtype.name if plain and alike else "bfloat16"


def blocks(rows: int, planes: Planes, columns: int) -> Blocks:
    """How the work is cut up where no measurement says better.

    Args:
      rows: of x.
      columns: the most that a chunk may have.
    """
    n, few = planes.shape[0], rows <= FEW_ROWS
    tile = min(max(LEAST_ROWS, 1 << (rows - 1).bit_length()), MOST_ROWS)
    # Few rows: programs for all multiprocessors at once, whatever the number of rows is. (Each
    # takes all registers of one.)
    groups = 1 if few or n % (2 * OUTPUTS) else 2
    tiles = n // (groups * OUTPUTS) * (1 if few else -(-rows // tile))
    steps, splits = planes.k // planes.block, 1
    while (
        2 * tiles * splits <= MULTIPROCESSORS and not steps % (2 * splits) and steps >= 8 * splits
    ):
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
        columns=max(min(columns, WIDE_COLUMNS), math.gcd(columns, sizes.columns)),
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
