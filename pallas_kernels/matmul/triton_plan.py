"""How the Triton kernel computes a product, and how the work is cut up: all that is static.

Where scales act, "scaling":

- "end": each output has one; it multiplies the finished sum.
- "chunk": a chunk of columns lies in one group; its scale multiplies the float32 sum of the chunk.
- "weight": the weight is scaled first, and rounded to the type of the dot.

Zero points are taken off the codes, where the type of the dot holds the difference exactly, or act
on sums of x: s * (dot - z * sum(x)).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax.numpy as jnp

from pallas_kernels import platform, tuning
from pallas_kernels.matmul import planes_tile
from pallas_kernels.matmul.planes import Planes, describe
from pallas_kernels.matmul.spec import WeightSpec

FEW_ROWS = 64
X_FIRST_ROWS = 32
WIDE_COLUMNS = 64  # of a chunk; scaling a weight costs less than a step of the loop for fewer
LEAST_COLUMNS = 16  # of a dot; of one with integers of 8 bits, twice as many
SHARED_MEMORY = 200 << 10  # of a program, for the stages of its loop
NARROW = ("bfloat16", "float8_e4m3fn", "float8_e8m0fnu")
MULTIPROCESSORS = {"H100": 132, "H200": 132, "GH200": 132, "B200": 148, "A100": 108, "L40": 142}


@dataclass(frozen=True)
class Blocks:
    """How the work is cut up.

    Attributes:
      rows, outputs: of the tile of a program, powers of two.
      columns: of a chunk, a power of two that divides those of a segment.
      splits: parts of the columns, each summed by a program of its own.
      warps, stages: of a program, and of its pipeline.
    """

    rows: int
    outputs: int
    columns: int
    splits: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan:
    """All that is static.

    Attributes:
      planes: of the weight.
      blocks: see there.
      dot: dtype of x and of the other operand of a dot.
      scaling: see the header.
      scale: dtype of the stored scales.
      rounded: dtype that scaled weights are rounded to, with scaling "weight".
      sums: whether zero points act on sums of x, or on codes.
      residue: what codes still have to be reduced by, then: those of 8 bits are made signed.
      x_group: columns that share a scale of x; None where x has none in here. Not with "end".
      rows: of x. experts: whether weights have a leading axis, and tiles of rows a table.
      counted: whether an array says how many rows are not padding.
    """

    planes: Planes
    blocks: Blocks
    dot: str
    scaling: str
    scale: str
    rounded: str | None
    sums: bool
    residue: int
    x_group: int | None
    rows: int
    experts: bool = False
    counted: bool = False

    @property
    def x_first(self) -> bool:
        """Whether x is the left operand of products: of few rows, which are too few for the matrix
        units that take decoded weights from registers on the left. Others take them on the right.
        """
        return self.blocks.rows <= X_FIRST_ROWS

    @property
    def scales_globally_first(self) -> bool:
        """Whether a global scale multiplies each scale, or the finished sum."""
        return self.rounded is not None or self.planes.zero == "add"

    @property
    def scale_is_narrow(self) -> bool:
        """Whether a scale is a number of bfloat16, as the codes are, and rounding their product
        is all that happens to a weight."""
        number = self.planes.value != "lookup" and self.planes.zero is None
        whole = self.planes.super_columns is None and not self.scales_globally_first
        return self.dot == "bfloat16" and self.scale in NARROW and number and whole

    @property
    def steps(self) -> int:
        """Steps of the loop over all columns."""
        length = planes_tile.segment_columns(self.planes)
        return self.planes.k // self.planes.block * (length // self.blocks.columns)


def plan_of(
    spec: WeightSpec,
    rows: int,
    dtype: Any,
    *,
    exact_codes: bool = False,
    x_group: int | None = None,
    experts: int = 0,
    **static: Any,
) -> Plan:
    """How the kernel computes with x [rows, K] of this dtype.

    Args:
      exact_codes: x are codes, if their dtype does not tell.
      x_group: columns that share a scale of x, where there are several groups.
      experts: how many share the rows; 0 for a single weight.
      static: further fields of the plan.

    Raises:
      NotImplementedError: the kernel does not compute so; the reason is the message.
    """
    planes, dtype = describe(spec), jnp.dtype(dtype)
    exact_codes = exact_codes or dtype.itemsize == 1
    dot, columns = _dot(dtype, planes, exact_codes), _columns(planes, x_group)
    rounded = None if exact_codes or dot == "bfloat16" else spec.rounded
    one_scale = planes.group[1] >= planes.shape[1]
    few = rows <= FEW_ROWS or experts > 0
    scales_weights = not exact_codes and (
        (dot == "float32" and planes.zero == "add")
        or (dot == "bfloat16" and (not few or columns < WIDE_COLUMNS))
    )
    if rounded is not None or columns < LEAST_COLUMNS:
        scaling = "weight"
    elif one_scale and x_group is None and planes.zero != "add":
        scaling = "end"
    else:
        scaling = "weight" if scales_weights else "chunk"
    if scaling == "weight":
        columns = math.gcd(planes_tile.segment_columns(planes), x_group or 256)
        dot = "float32" if exact_codes else dot
    if columns < LEAST_COLUMNS:
        raise NotImplementedError(f"inputs with a scale for each {x_group} columns")
    if columns < 2 * LEAST_COLUMNS and dot == "int8":
        dot = "bfloat16"
    integers = spec.zero_point is not None and jnp.issubdtype(spec.zero_point, jnp.integer)
    on_codes = planes.zero == "subtract" and not exact_codes and (integers or dot == "float32")
    unsigned = dot == "int8" and planes.value == "int" and planes.bits == 8
    residue = planes.offset - 128 if unsigned else 0
    sums = scaling != "weight" and ((planes.zero is not None and not on_codes) or residue != 0)
    op = "matmul_grouped" if experts else "matmul"
    kind = tuning.product_kind(spec.kind, dtype)
    measured = tuning.blocks(op, "triton", kind, rows, *spec.shape)
    least = 2 * LEAST_COLUMNS if dot == "int8" else LEAST_COLUMNS
    default = blocks(rows, planes, columns, dot, experts)
    return Plan(
        planes,
        default if measured is None else _fitting(measured, default, columns, least),
        dot,
        scaling,
        str(spec.scale),
        rounded,
        sums,
        residue,
        x_group,
        rows,
        experts > 0,
        **static,
    )


def _columns(planes: Planes, x_group: int | None) -> int:
    """The most columns of a segment that share the scales of weight and x, whichever they are."""
    columns = math.gcd(planes_tile.segment_columns(planes), x_group or 256)
    one_scale = planes.group[1] >= planes.shape[1]
    return columns if one_scale else math.gcd(columns, planes.group[1])


def _dot(dtype: Any, planes: Planes, exact_codes: bool) -> str:
    """In which type codes of x, or x itself, meet the codes of the weight.

    Floats of 8 bits are bfloat16 here, which holds them: Triton, told to sum in float32, would make
    them float16 and use the slower matrix instructions that Hopper has from before.
    """
    if not exact_codes or dtype == jnp.float32:
        return dtype.name
    if planes.value == "lookup":
        return "float32"
    return "int8" if dtype == jnp.int8 and planes.value in ("int", "signed") else "bfloat16"


def blocks(rows: int, planes: Planes, columns: int, dot: str, experts: int = 0) -> Blocks:
    """How the work is cut up where no measurement says better.

    Args:
      rows: of x. experts: among how many they are divided, or 0.
      columns: the most that a chunk may have.
      dot: dtype of its operands.
    """
    n = planes.shape[0]
    each = -(-rows // experts) if experts else rows
    if dot == "float32":  # products of single numbers, which the compiler writes out
        tile, outputs, columns, warps, stages = min(_power(each), 32), 64, min(columns, 32), 4, 2
    elif each <= FEW_ROWS:
        tile, outputs, columns, warps, stages = _power(each), 64, min(columns, 128), 4, 3
    else:
        most = 128 // jnp.dtype(dot).itemsize
        warps = 8 if dot == "int8" else 4
        outputs = 64 if planes.value == "lookup" else 128  # a table takes registers
        tile, columns, stages = 128, min(columns, most), 3
    bytes_of_x = tile * planes_tile.segments(planes) * jnp.dtype(dot).itemsize
    bytes_of_w = outputs * sum(planes_tile.runs(planes))
    stages = min(stages, max(1, SHARED_MEMORY // (columns * (bytes_of_x + bytes_of_w))))
    if experts:
        return Blocks(tile, outputs, columns, 1, warps, stages)
    # Few rows: as many programs as keep the memory busy, whatever the number of rows is.
    tiles = -(-n // outputs) * (1 if rows <= FEW_ROWS else -(-rows // tile))
    wanted = 4 * _multiprocessors() if rows <= FEW_ROWS else _multiprocessors()
    splits = 1
    while tiles * splits < wanted and splits < 16 and planes.k // (2 * splits) >= 4 * planes.block:
        splits *= 2
    return Blocks(tile, outputs, columns, splits, warps, stages)


def _fitting(measured: dict[str, int], default: Blocks, columns: int, least: int) -> Blocks:
    """Measured block sizes, where this call can have them."""
    sizes = replace(default, **measured)
    return replace(sizes, columns=max(least, math.gcd(columns, sizes.columns)))


def candidates(kind: str, rows: int, n: int, k: int) -> Iterator[dict[str, int]]:
    """Block sizes worth measuring for a weight [n, k] and x [rows, k]."""
    del kind, k
    tile, few = min(_power(rows), 128), rows <= FEW_ROWS
    for outputs, warps in ((32, 2), (64, 2), (64, 4), (128, 4)) if few else ((128, 4), (128, 8)):
        for columns in (64, 128):
            for splits in (1, 2, 4, 8) if few else (1,):
                if splits > 1 and -(-n // outputs) * splits > 16 * _multiprocessors():
                    continue
                for stages in (3, 4):
                    yield asdict(Blocks(tile, outputs, columns, splits, warps, stages))


def _power(rows: int) -> int:
    """Rows of a tile that holds so many: a power of two that the matrix units take."""
    return max(LEAST_COLUMNS, 1 << (rows - 1).bit_length())


def _multiprocessors() -> int:
    name = platform.device().name
    return next((count for key, count in MULTIPROCESSORS.items() if key in name), 108)
