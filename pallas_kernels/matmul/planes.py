"""The layouts of the kernels on accelerators: codes in planes of bits, scales beside them.

A block of `block` columns (256, or less where K asks for it) is stored without any code crossing a
byte, so that a kernel unpacks with one shift and one mask and never moves a code along a row:

- A code of 3, 5, 6 or 7 bits is cut into planes of 4, 2 and 1 bits, the low ones first.
- A plane of w bits takes block * w / 8 bytes of each block. Byte j holds columns j, j + block * w /
  8, j + 2 * block * w / 8 and so on of the block, from its low bits up: the low nibbles of a plane
  of 4 bits are the first half of the block, the high ones the second.

"planes" has [N, bytes of all blocks of the first plane, then of the second ...], and scales and
zero points [groups of columns, groups of rows]. "planes_t" has the bytes the other way round,
[bytes, N], as TPUs like them: columns of the weight along sublanes, outputs along lanes.

Codes of 8 bits in offset binary are turned into two's complement, which matrix units take.

Blocks of GGUF are taken apart for it (`planes_gguf`). Scales of some have two levels: integers,
uint8 or int8 [K / columns, N], times `super_scale`, float16 [K / 256, N]; zero points likewise
times `super_zero`. Such a weight is code * (super_scale * scale) + super_zero * zero_point, all in
float32.

K is filled up to whole blocks; columns added so meet inputs of zero. Everything is undone exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels import codes
from pallas_kernels.matmul import planes_gguf
from pallas_kernels.matmul.spec import CANONICAL, WeightArrays, WeightSpec, rounded

PLANES, TRANSPOSED = "planes", "planes_t"
LAYOUTS = (PLANES, TRANSPOSED)
BLOCKS = (256, 128, 64)
SUPER_COLUMNS = 256
_SIGNED = {"uint8b128": "int8"}
LEAST_SEGMENT = 16  # columns that a byte's field runs over; what a matrix unit takes at least


@dataclass(frozen=True)
class Planes:
    """How a kernel reads a weight in these layouts.

    Attributes:
      shape: (N, K) of the weight.
      k: K filled up to whole blocks.
      bits: of a code. widths: of its planes, low bits first.
      block: columns of a block.
      value: what a code is: "int" (less `offset`), "signed" (two's complement, 8 bits), "float" (of
        `qtype`), "lookup" (an entry of the codebook).
      qtype: of the codes, key of `codes.CODES`.
      group: rows and columns that share a scale.
      zero: None; "subtract", (code - zero) * scale; or "add", code * scale + zero.
      super_columns: columns that share a `super_scale`, and a `super_zero` if there is a zero; None
        where scales have one level.
    """

    shape: tuple[int, int]
    k: int
    bits: int
    widths: tuple[int, ...]
    block: int
    value: str
    qtype: str
    offset: int
    group: tuple[int, int]
    zero: str | None
    super_columns: int | None = None

    @property
    def offsets(self) -> tuple[int, ...]:
        """At which byte of a row each plane begins."""
        starts = [0]
        for width in self.widths:
            starts.append(starts[-1] + self.k * width // 8)
        return tuple(starts[:-1])

    @property
    def row_bytes(self) -> int:
        return self.k * self.bits // 8


def widths_of(bits: int) -> tuple[int, ...]:
    """Widths of the planes of a code, the low bits in the widest."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def block_of(k: int, bits: int) -> tuple[int, int]:
    """(columns of a block, K filled up to whole blocks): the largest that divides K."""
    narrowest = widths_of(bits)[-1]
    fitting = [size for size in BLOCKS if size * narrowest // 8 >= LEAST_SEGMENT]
    block = next((size for size in fitting if k % size == 0), fitting[-1])
    return block, -(-k // block) * block


def describe(spec: WeightSpec) -> Planes:
    """How a weight of this description is laid out.

    Raises:
      NotImplementedError: the layouts do not hold it; the reason is the message.
    """
    if spec.qtype in planes_gguf.TYPES:
        blocks = planes_gguf.TYPES[spec.qtype]
        qtype, group = blocks.qtype, (1, blocks.columns)
        zero = None if blocks.half_zero is None else "add"
        super_columns = SUPER_COLUMNS if blocks.scales else None
    elif spec.is_blocks:
        raise NotImplementedError(f"no layout of planes for blocks of type {spec.qtype}")
    else:
        qtype, group, super_columns = spec.qtype, spec.group, None
        zero = None if spec.zero_point is None else "add" if spec.additive else "subtract"
    qtype = _SIGNED.get(qtype, qtype)
    code = codes.CODES[qtype]
    kinds = {"uint": "int", "int": "signed", "float": "float", "lookup": "lookup"}
    if code.kind not in kinds or code.bits > 8:
        raise NotImplementedError(f"no layout of planes for codes of type {qtype}")
    assert group is not None
    block, k = block_of(spec.shape[1], code.bits)
    return Planes(
        spec.shape,
        k,
        code.bits,
        widths_of(code.bits),
        block,
        kinds[code.kind],
        qtype,
        code.zero,
        group,
        zero,
        super_columns,
    )


def prepare(spec: WeightSpec, arrays: WeightArrays, layout: str) -> tuple[WeightSpec, WeightArrays]:
    """A canonical weight [..., N, K] (numpy) in one of `LAYOUTS`.

    Raises:
      NotImplementedError: see `describe`.
    """
    planes, raw = describe(spec), np.asarray(arrays.qvalue)
    if spec.is_blocks:
        unpacked, *scales = planes_gguf.take_apart(raw, spec.qtype)
        names = planes_gguf.Parts._fields[1:]
        arrays = WeightArrays(
            raw, codebook=planes_gguf.codebook(spec.qtype, raw.shape[:-2])
        )._replace(**dict(zip(names, scales, strict=True)))
    else:
        unpacked = _signed(codes.unpack(raw, planes.bits, spec.shape[1], np), spec)
    qvalue = pack(unpacked, planes)
    if layout == TRANSPOSED:
        qvalue = np.ascontiguousarray(qvalue.swapaxes(-1, -2))
    laid_out = _turned(arrays._replace(qvalue=qvalue))
    spec = replace(
        spec, layout=layout, scale=_dtype(arrays.scale), zero_point=_dtype(arrays.zero_point)
    )
    return spec, laid_out


def unprepare(spec: WeightSpec, arrays: WeightArrays) -> tuple[WeightSpec, WeightArrays]:
    """The canonical weight that `prepare` was given."""
    planes = describe(spec)
    qvalue = np.asarray(arrays.qvalue)
    if spec.layout == TRANSPOSED:
        qvalue = qvalue.swapaxes(-1, -2)
    unpacked = unpack(qvalue, planes, np)[..., : spec.shape[1]]
    arrays = _turned(arrays)
    if spec.is_blocks:
        scales = (getattr(arrays, name) for name in planes_gguf.Parts._fields[1:])
        raw = planes_gguf.put_together(planes_gguf.Parts(unpacked, *scales), spec.qtype)
        return replace(spec, layout=CANONICAL, scale=None, zero_point=None), WeightArrays(raw)
    canonical = arrays._replace(qvalue=codes.pack(_signed(unpacked, spec), planes.bits))
    return replace(spec, layout=CANONICAL), canonical


def _signed(unpacked: np.ndarray, spec: WeightSpec) -> np.ndarray:
    """Codes in offset binary, uint8, as those in two's complement, and the other way round."""
    return unpacked ^ np.uint8(0x80) if spec.qtype in _SIGNED else unpacked


def pack(unpacked: np.ndarray, planes: Planes) -> np.ndarray:
    """Codes, uint8 [..., K], as planes, uint8 [..., row_bytes]."""
    missing = planes.k - unpacked.shape[-1]
    unpacked = np.pad(unpacked, [(0, 0)] * (unpacked.ndim - 1) + [(0, missing)])
    parts, shift = [], 0
    for width in planes.widths:
        part = (unpacked >> np.uint8(shift)) & np.uint8((1 << width) - 1)
        fields = part.reshape(*part.shape[:-1], -1, 8 // width, planes.block * width // 8)
        places = (np.arange(8 // width, dtype=np.uint8) * np.uint8(width))[:, None]
        merged = np.bitwise_or.reduce(fields << places, axis=-2)
        parts.append(merged.reshape(*part.shape[:-1], -1))
        shift += width
    return np.concatenate(parts, axis=-1).astype(np.uint8)


def unpack(qvalue: Any, planes: Planes, xp: ModuleType = jnp) -> Any:
    """Planes, uint8 [..., row_bytes], as codes, uint8 [..., k]."""
    result, shift = None, 0
    for start, width in zip(planes.offsets, planes.widths, strict=True):
        part = qvalue[..., start : start + planes.k * width // 8]
        part = part.reshape(*part.shape[:-1], -1, 1, planes.block * width // 8)
        places = (np.arange(8 // width, dtype=np.uint8) * np.uint8(width))[:, None]
        fields = (part >> places) & np.uint8((1 << width) - 1)
        code = fields.reshape(*qvalue.shape[:-1], planes.k) << np.uint8(shift)
        result = code if result is None else result | code
        shift += width
    return result


def decode(spec: WeightSpec, arrays: WeightArrays) -> Any:
    """A weight in these layouts as float32 [..., N, K]."""
    planes, qvalue = describe(spec), arrays.qvalue
    if spec.layout == TRANSPOSED:
        qvalue = qvalue.swapaxes(-1, -2)
    unpacked = unpack(qvalue, planes)[..., : spec.shape[1]]
    scale, zero = scales(planes, arrays)
    weight = codes.scaled(
        codes.meanings(unpacked, planes.qtype, arrays.codebook),
        spec.shape,
        planes.group,
        scale.swapaxes(-1, -2),
        None if zero is None else zero.swapaxes(-1, -2),
        arrays.global_scale,
        planes.zero == "add",
    )
    return rounded(weight, spec)


def scales(planes: Planes, arrays: WeightArrays) -> tuple[Any, Any]:
    """Scale and zero point, [..., groups of columns, groups of rows]: of one level as they are
    stored, of two multiplied out, float32.
    """
    if planes.super_columns is None:
        return arrays.scale, arrays.zero_point
    times = planes.super_columns // planes.group[1]

    def whole(fine: Any, coarse: Any) -> Any:
        if fine is None:
            return None
        return fine.astype(np.float32) * jnp.repeat(coarse.astype(np.float32), times, axis=-2)

    return whole(arrays.scale, arrays.super_scale), whole(arrays.zero_point, arrays.super_zero)


_TURNED = ("scale", "zero_point", "super_scale", "super_zero")


def _turned(arrays: WeightArrays) -> WeightArrays:
    """With groups of rows and of columns the other way round; of numpy arrays."""

    def turned(array: Any) -> Any:
        return None if array is None else np.ascontiguousarray(np.asarray(array).swapaxes(-1, -2))

    return arrays._replace(**{name: turned(getattr(arrays, name)) for name in _TURNED})


def _dtype(array: Any) -> str | None:
    return None if array is None else np.dtype(array.dtype).name
