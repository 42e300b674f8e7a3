"""GGUF: every tensor is blocks of a ggml type, scales included (or plain floats).

Blocks stay as they are, but for those of the two formats that other checkpoints have as well, MXFP4
and NVFP4: their codes and scales are taken apart, which costs no memory and lets them share kernels
with these. Beside an NVFP4 weight may lie the scale of the whole tensor, "<name>.scale"; and
"<name>.input_scale", with which some GPUs round activations. llama.cpp on a CPU leaves them alone,
and so does qjax.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from qjax.errors import UnsupportedError
from qjax.formats.base import Arrays, Layer, QuantizationConfig, Record, Stored, expect, fault
from qjax.formats.ggml_exact import as_blocks
from qjax.lazy import LazyArray, as_bytes
from qjax.qarray import QArray
from qjax.qtypes import QTYPES


@dataclass(frozen=True)
class _Fp4:
    """Blocks of e2m1 codes: first the scales, then each group's codes, 4 bits each.

    Half a group after the other: byte i of a group's n bytes holds codes i and i + n.

    Attributes:
      columns: codes that share a scale.
      groups: of a block.
      scale: dtype of the scales.
    """

    columns: int
    groups: int
    scale: type

    @property
    def nbytes(self) -> int:
        return self.groups * (1 + self.columns // 2)


_FP4 = {
    "mxfp4": _Fp4(32, 1, ml_dtypes.float8_e8m0fnu),
    "nvfp4": _Fp4(16, 4, ml_dtypes.float8_e4m3fn),
}


class GGUF(QuantizationConfig):
    """Weights of a GGUF file."""

    name = "gguf"

    def layer(self, module: str, stored: Stored, shape: tuple[int, ...]) -> Layer:
        record = expect(module, stored, "weight")
        supported = [t.name for t in QTYPES.values() if t.ggml_id is not None] + list(_FP4)
        if record.qtype not in supported:
            raise UnsupportedError(
                f"{record.file}, {record.name}: type {record.qtype} is not supported here; "
                f"supported are {', '.join(supported)}"
            )
        # A weight of one row is stored without the axis of its rows.
        row = shape[1:] if shape[0] == 1 else shape
        expect(module, stored, "weight", record.qtype, shape, row)
        if record.qtype not in _FP4:
            return Layer(("weight",), _blocks(record.qtype, shape))
        reads = ("weight",)
        if "scale" in stored:
            expect(module, stored, "scale", "f32", (1,) if len(shape) == 2 else shape[:1])
            reads = ("weight", "scale")
        return Layer(reads, _fp4(record, shape), ignores=("input_scale",))

    def encode(self, module: str, weight: QArray) -> dict[str, np.ndarray]:
        return stored(module, weight)[1]


def stored(module: str, weight: QArray) -> tuple[str, dict[str, np.ndarray]]:
    """The type that holds a canonical weight exactly, and its tensors: uint8 "weight" [..., N,
    row_bytes], and float32 "scale" of the whole tensor for some of the type nvfp4.

    Raises:
      UnsupportedError: there is none.
    """
    if weight.act is not None:
        raise UnsupportedError(
            f"{module}: its inputs are rounded too, which a GGUF file cannot say; loaded with "
            "quantize_activations=False, a weight is all there is"
        )
    if QTYPES[weight.qtype].is_blocks and not weight.aux:
        return weight.qtype, {"weight": np.asarray(weight.qvalue)}
    for qtype, fp4 in _FP4.items():
        kept = (1, fp4.columns), np.dtype(fp4.scale), 0
        odd = weight.shape[1] % (fp4.columns * fp4.groups)
        if weight.qtype == "fp4_e2m1" and kept == (weight.group, weight.scale.dtype, odd):
            tensors = {"weight": _joined(weight, fp4)}
            if "global_scale" in weight.aux:
                tensors["scale"] = np.asarray(weight.aux["global_scale"]).reshape(-1)
            return qtype, tensors
    reason = "what is added to it has no place there"
    if not QTYPES[weight.qtype].is_blocks:
        blocks = as_blocks(weight)
        if not isinstance(blocks, str):
            return blocks.qtype, {"weight": blocks.raw}
        reason = blocks
    raise UnsupportedError(
        f"{module}: no type of GGUF holds {weight.qtype} {weight.shape} exactly: {reason}"
    )


def _blocks(qtype: str, shape: tuple[int, ...]) -> Callable[[Arrays], QArray]:
    def decode(arrays: Arrays) -> QArray:
        raw = as_bytes(arrays["weight"])
        return QArray(raw.reshape(*shape[:-1], -1), qtype, (shape[-2], shape[-1]))

    return decode


def _fp4(record: Record, shape: tuple[int, ...]) -> Callable[[Arrays], QArray]:
    """Takes blocks apart into codes, packed in order, and scales."""
    fp4 = _FP4[record.qtype]

    def decode(arrays: Arrays) -> QArray:
        raw = arrays["weight"].reshape(*shape[:-1], -1)
        rows, count = raw.shape[:-1], raw.shape[-1] // fp4.nbytes
        row = count * fp4.groups * fp4.columns // 2

        def blocks(index: tuple[slice, ...], size: int) -> np.ndarray:
            """Those that these bytes, `size` of each block, come from: [..., blocks, nbytes]."""
            *before, here = index
            inside = slice(here.start // size * fp4.nbytes, here.stop // size * fp4.nbytes)
            some = np.asarray(raw[(*before, inside)])
            return some.reshape(*some.shape[:-1], -1, fp4.nbytes)

        def scales(*index: slice) -> np.ndarray:
            found = blocks(index, fp4.groups)[..., : fp4.groups]
            scale = found.reshape(*found.shape[:-2], -1)
            if record.qtype == "nvfp4":
                if (scale & 0x80).any():
                    raise fault(record, "has a scale with a sign bit; NVFP4's have none")
                # ggml takes the pattern that would be NaN for zero.
                scale = np.where(scale == 0x7F, np.uint8(0), scale)
            return np.ascontiguousarray(scale).view(fp4.scale)

        def codes(*index: slice) -> np.ndarray:
            found = blocks(index, row // count)[..., fp4.groups :]
            halves = found.reshape(*found.shape[:-2], -1, fp4.columns // 2)
            even, odd = halves[..., 0::2], halves[..., 1::2]
            pairs = np.concatenate([even & 15 | odd << 4, even >> 4 | odd & 0xF0], axis=-1)
            return pairs.reshape(*found.shape[:-2], -1)

        aux = {}
        if "scale" in arrays:
            aux["global_scale"] = np.array(arrays["scale"]).reshape(*shape[:-2], 1, 1)
        return QArray(
            LazyArray(codes, (*rows, row), np.dtype(np.uint8), (1, row // count)),
            "fp4_e2m1",
            (shape[-2], shape[-1]),
            LazyArray(scales, (*rows, count * fp4.groups), np.dtype(fp4.scale), (1, fp4.groups)),
            aux=aux,
            group=(1, fp4.columns),
        )

    return decode


def _joined(weight: QArray, fp4: _Fp4) -> np.ndarray:
    """The blocks that `_fp4` takes apart."""
    codes = np.asarray(weight.qvalue).reshape(*weight.qvalue.shape[:-1], -1, 2, fp4.columns // 4)
    first, second = codes[..., 0, :], codes[..., 1, :]
    halves = np.stack([first & 15 | second << 4, first >> 4 | second & 0xF0], axis=-1)
    rows = weight.qvalue.shape[:-1]
    scale = np.asarray(weight.scale).view(np.uint8).reshape(*rows, -1, fp4.groups)
    blocks = [scale, halves.reshape(*rows, scale.shape[-2], -1)]
    return np.concatenate(blocks, axis=-1).reshape(*rows, -1)
