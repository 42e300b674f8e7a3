"""How the TPU kernel computes a product, and how the work is cut up: all that is static.

Columns are taken in units of one or a few blocks (see `planes`); a unit is decoded at once. Where
scales act, "scaling":

- "end": each output has one; it multiplies the finished sum.
- "chunk": a chunk, 128 columns or more of a unit, lies in one group; its scale multiplies the
  float32 sum of the chunk, and weights are not rounded.
- "weight": the weight is scaled first, and rounded to the type of the dot. So it is with groups of
  fewer columns than a matrix unit takes at once.

Zero points are taken off the codes in products of float32, else they act on sums of x:
s * (dot - z * sum(x)).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax.numpy as jnp

from pallas_kernels import platform, tuning
from pallas_kernels.matmul.planes import Planes, describe
from pallas_kernels.matmul.spec import WeightSpec

LANES = 128
UNIT = 256  # columns that are decoded at once, if blocks are no larger: what matrix units take
STEP = 2048  # columns of a step of the grid
OUTPUTS = (512, 384, 256, 128)
ROWS = 512
MOST_UNITS = 64  # of a step: its loop is written out
ENTRIES = 16  # of a codebook: a select for each
VMEM = {"v2": 16, "v3": 16, "v4": 16, "v5p": 64, "v5": 64, "v5 lite": 128, "v5e": 128, "v6": 128}
OTHER_VMEM = 64  # MiB, of TPU7x and what is not known
_FLOATS = {"float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2"}


@dataclass(frozen=True)
class Blocks:
    """How the work is cut up.

    Attributes:
      rows, outputs: of a tile.
      units: of a step.
    """

    rows: int
    outputs: int
    units: int


@dataclass(frozen=True)
class Plan:
    """All that is static.

    Attributes:
      planes: of the weight.
      blocks: see there.
      unit, chunk: columns that are decoded at once, and that are summed by one dot.
      dot: dtype of its operands.
      scaling: see the header.
      scale: dtype of the stored scales. zero: of the zero points, or None.
      rounded: dtype that scaled weights are rounded to, with scaling "weight".
      sums: whether zero points act on sums of x.
      residue: what codes still have to be reduced by, then: those of 8 bits are made signed.
      x_group: columns that share a scale of x; None where x has none in here.
      vmem: bytes that the compiler may take.
    """

    planes: Planes
    blocks: Blocks
    unit: int
    chunk: int
    dot: str
    scaling: str
    scale: str
    zero: str | None
    rounded: str | None
    sums: bool
    residue: int
    x_group: int | None
    vmem: int

    @property
    def step(self) -> int:
        """Columns of a step."""
        return self.unit * self.blocks.units

    @property
    def steps(self) -> int:
        return self.planes.k // self.step


def plan_of(
    spec: WeightSpec,
    rows: int,
    dtype: Any,
    *,
    exact_codes: bool = False,
    x_group: int | None = None,
    entries: int = 0,
    experts: int = 0,
) -> Plan:
    """How the kernel computes with x [rows, K] of this dtype.

    Args:
      exact_codes: x are codes, if their dtype does not tell.
      x_group: columns that share a scale of x, where there are several groups: see `takes_groups`.
      entries: of a codebook, or 0.
      experts: how many share the rows; 0 for a single weight.

    Raises:
      NotImplementedError: the kernel does not compute so; the reason is the message.
    """
    planes, dtype = describe(spec), jnp.dtype(dtype)
    if entries > ENTRIES:
        raise NotImplementedError(f"codebooks of {entries} entries")
    exact_codes = exact_codes or dtype.itemsize == 1
    device = platform.device().name
    dot = _dot(dtype, planes, exact_codes, device)
    rounded = None if exact_codes or dot == "bfloat16" else spec.rounded
    of_weight = weight_groups(planes)
    groups = [*of_weight, *([] if x_group is None else [x_group])]
    unit = unit_of(planes, groups)
    chunk = math.gcd(unit, *groups)
    small = bool(of_weight) and not _is_whole(chunk, unit)
    if rounded is not None or small or (planes.zero == "add" and dot == "float32"):
        scaling = "weight"
    else:
        scaling = "chunk" if groups or planes.zero == "add" else "end"
    if scaling == "weight":
        chunk = math.gcd(unit, x_group or unit)
        dot = "float32" if exact_codes else dot
        narrow = [size for size in of_weight if size % 8]
        if narrow:
            raise NotImplementedError(f"a scale for each {narrow[0]} columns")
    unsigned = dot == "int8" and planes.value == "int" and planes.bits == 8
    sums = scaling != "weight" and dot != "float32" and (planes.zero is not None or unsigned)
    op = "matmul_grouped" if experts else "matmul"
    sizes = blocks(rows, planes, unit, groups, dot, device)
    kind = tuning.product_kind(spec.kind, dtype)
    measured = tuning.blocks(op, "tpu", kind, rows, *spec.shape)
    if measured is not None:
        sizes = _fitting(measured, sizes, rows, planes, unit, groups, dot)
    return Plan(
        planes,
        sizes,
        unit,
        chunk,
        dot,
        scaling,
        str(spec.scale),
        spec.zero_point,
        rounded,
        sums,
        planes.offset - 128 if unsigned else 0,
        x_group,
        vmem(device) * 3 // 4,
    )


def weight_groups(planes: Planes) -> list[int]:
    """Sizes of the groups of columns that do not hold all columns."""
    sizes = (planes.group[1], planes.super_columns)
    return [size for size in sizes if size is not None and size < planes.shape[1]]


def takes_groups(planes: Planes, x_group: int) -> bool:
    """Whether inputs may have a scale for each so many columns: one dot is of one group of them."""
    unit = unit_of(planes, [*weight_groups(planes), x_group])
    return _is_whole(math.gcd(unit, x_group), unit)


def _is_whole(chunk: int, unit: int) -> bool:
    """Whether a chunk of a unit is one in whole registers."""
    return chunk == unit or chunk % LANES == 0


def unit_of(planes: Planes, groups: Sequence[int]) -> int:
    """Whole blocks that hold whole groups or lie in one: up to `UNIT` columns if there are such,
    or else as few as can be, and if there are none, all columns.
    """
    sizes = [m * planes.block for m in _divisors(planes.k // planes.block)]
    whole = [unit for unit in sizes if _fits(unit, groups)]
    return max((unit for unit in whole if unit <= UNIT), default=min(whole, default=planes.k))


def _fits(columns: int, groups: Sequence[int]) -> bool:
    return all(size % columns == 0 or columns % size == 0 for size in groups)


def _divisors(number: int) -> list[int]:
    return [m for m in range(1, number + 1) if number % m == 0]


def _dot(dtype: Any, planes: Planes, exact_codes: bool, device: str) -> str:
    """In which type codes of x, or x itself, meet the codes of the weight."""
    if not exact_codes or dtype == jnp.float32:
        return dtype.name
    if planes.value == "lookup":
        return "float32"
    if dtype == jnp.int8 and planes.value in ("int", "signed"):
        return "int8"
    # Earlier ones multiply small floats as bfloat16.
    if "7x" in device and planes.qtype == _FLOATS.get(dtype.name):
        return dtype.name
    return "bfloat16"


def vmem(device: str) -> int:
    """Bytes of VMEM of a core of a device of this name ("TPU v6e", "TPU v5 lite", "TPU7x")."""
    found = [name for name in VMEM if name in device]
    return (VMEM[max(found, key=len)] if found else OTHER_VMEM) << 20


def least_rows(dot: str) -> int:
    """What a tile's rows are a multiple of."""
    return 32 // jnp.dtype(dot).itemsize


def blocks(
    rows: int, planes: Planes, unit: int, groups: Sequence[int], dot: str, device: str
) -> Blocks:
    """How the work is cut up where no measurement says better: what VMEM holds (half of it is
    reckoned with, for tiles are copied ahead), with large copies and few steps.

    Neither size changes the order in which a row is summed up.

    Args:
      rows: of x.
      device: its name.

    Raises:
      NotImplementedError: no tile is small enough.
    """
    least, n = least_rows(dot), planes.shape[0]
    tiles = -(-rows // ROWS)
    tile = -(-rows // tiles // least) * least
    budget = min(vmem(device) // 2, 32 << 20)
    while tile:
        for outputs in _widths(n):
            sizes = [Blocks(tile, outputs, units) for units in _units(planes, unit, groups)]
            held = [each for each in sizes if _bytes(each, planes, unit, dot) <= budget]
            if held:
                return held[0]
        tile = tile // 2 // least * least
    raise NotImplementedError(f"{unit} columns at once are too many")


def _widths(n: int) -> list[int]:
    """Outputs of a tile, those first that leave the least over."""
    if n <= OUTPUTS[0]:
        return [n, *(size for size in OUTPUTS if size < n)]
    return [*sorted(OUTPUTS[:3], key=lambda size: (-(-n // size) * size, -size)), LANES]


def _units(planes: Planes, unit: int, groups: Sequence[int]) -> list[int]:
    """Units of a step, the best number first: most of those up to `STEP` columns, unless these are
    few and one more is possible.
    """
    possible = [m for m in _divisors(planes.k // unit) if _fits(m * unit, groups) or m == 1]
    below = [m for m in possible if m * unit <= STEP or m == 1][::-1]
    above = [m for m in possible if m not in below and m <= MOST_UNITS]
    return below if 2 * below[0] * unit >= STEP else [*above[:1], *below]


def _bytes(sizes: Blocks, planes: Planes, unit: int, dot: str) -> int:
    """About what a step takes of VMEM."""
    size, step = jnp.dtype(dot).itemsize, unit * sizes.units
    width = -(-sizes.outputs // LANES) * LANES
    weights = 2 * step * planes.bits // 8 + 16 * unit + 8 * step // min(32, planes.group[1])
    return width * weights + 2 * sizes.rows * step * size + 20 * sizes.rows * width


def _fitting(
    measured: dict[str, int],
    default: Blocks,
    rows: int,
    planes: Planes,
    unit: int,
    groups: Sequence[int],
    dot: str,
) -> Blocks:
    """Measured block sizes, where this call can have them."""
    sizes, least = replace(default, **measured), least_rows(dot)
    n = planes.shape[0]
    outputs = n if sizes.outputs >= n else max(LANES, sizes.outputs // LANES * LANES)
    units = sizes.units if sizes.units in _units(planes, unit, groups) else default.units
    tile = min(-(-sizes.rows // least), -(-rows // least)) * least
    return Blocks(tile, outputs, units)


def candidates(kind: str, rows: int, n: int, k: int) -> Iterator[dict[str, int]]:
    """Block sizes worth measuring for a weight [n, k] and x [rows, k]."""
    del kind
    for tile in sorted({min(-(-rows // 32) * 32, size) for size in (128, 256, 512, 1024)}):
        for outputs in (256, 512, 1024):
            for units in (4, 8, 16):
                if outputs <= max(n, 256) and units * UNIT <= k:
                    yield asdict(Blocks(tile, outputs, units))
