"""The numeric types that weights are stored in: one frozen entry each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from pallas_kernels import unpack


@dataclass(frozen=True)
class QType:
    """A type whose values are stored as blocks of bytes along the last axis, scales included.

    Attributes:
      name: key in `QTYPES`.
      ggml_id: number of the type in a GGUF file.
      block_elements, block_bytes: size of one block.
      decode: uint8 [..., row_bytes] -> float32 [..., K], for numpy arrays with `xp=numpy`.
    """

    name: str
    ggml_id: int
    block_elements: int
    block_bytes: int
    decode: Callable[..., Any]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_elements

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of `k` elements; ValueError where `k` is not a whole number of blocks."""
        return unpack.row_bytes(self.name, k)


_GGML_IDS = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "q2_k": 10,
    "q3_k": 11,
    "q4_k": 12,
    "q5_k": 13,
    "q6_k": 14,
    "iq4_nl": 20,
    "iq4_xs": 23,
    "bf16": 30,
}

QTYPES: MappingProxyType[str, QType] = MappingProxyType(
    {
        name: QType(name, ggml_id, *unpack.BLOCKS[name], partial(unpack.dequantize, qtype=name))
        for name, ggml_id in _GGML_IDS.items()
    }
)
"""Every type by its name, in lower case."""

BY_GGML_ID: MappingProxyType[int, QType] = MappingProxyType(
    {qtype.ggml_id: qtype for qtype in QTYPES.values()}
)
"""Every type that a GGUF file can hold, by its number there."""
