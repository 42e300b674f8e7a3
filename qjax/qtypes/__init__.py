"""The numeric types that weights are stored in: one frozen entry each."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from pallas_kernels import codes, unpack


@dataclass(frozen=True)
class QType:
    """A type of stored values.

    Attributes:
      name: key in `QTYPES`.
      is_blocks: whether scales lie inside blocks of bytes, or in arrays beside the codes.
      block_elements, block_bytes: size of one block; of codes, the fewest that end with a byte.
      ggml_id: number of the type in a GGUF file, or None where it has none.
    """

    name: str
    is_blocks: bool
    block_elements: int
    block_bytes: int
    ggml_id: int | None = None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_elements

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of `k` elements; ValueError where `k` is not a whole number of blocks."""
        return unpack.row_bytes(self.name, k) if self.is_blocks else codes.row_bytes(self.name, k)


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
    "iq2_xxs": 16,
    "iq2_xs": 17,
    "iq3_xxs": 18,
    "iq1_s": 19,
    "iq4_nl": 20,
    "iq3_s": 21,
    "iq2_s": 22,
    "iq4_xs": 23,
    "iq1_m": 29,
    "bf16": 30,
    "tq1_0": 34,
    "tq2_0": 35,
    "q1_0": 41,
    "q2_0": 42,
}


def _codes() -> dict[str, QType]:
    entries = {}
    for name, code in codes.CODES.items():
        elements = next(n for n in (1, 2, 4, 8) if n * code.bits % 8 == 0)
        entries[name] = QType(name, False, elements, elements * code.bits // 8)
    return entries


QTYPES: MappingProxyType[str, QType] = MappingProxyType(
    {name: QType(name, True, *unpack.BLOCKS[name], ggml_id) for name, ggml_id in _GGML_IDS.items()}
    | _codes()
)
"""Every type by its name, in lower case."""

BY_GGML_ID: MappingProxyType[int, QType] = MappingProxyType(
    {qtype.ggml_id: qtype for qtype in QTYPES.values() if qtype.ggml_id is not None}
)
"""Every type that a GGUF file can hold, by its number there."""
