"""What a kernel knows about a weight before it sees the bytes."""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels import unpack

CANONICAL = "canonical"


@dataclass(frozen=True)
class WeightSpec:
    """Static description of a weight; together with its uint8 array it is all that a kernel gets.

    Attributes:
      qtype: key of `unpack.BLOCKS`.
      shape: logical (N, K): N outputs, K inputs.
      layout: "canonical" (uint8 [N, row_bytes], rows of raw blocks), or the name of the private
        tiling of one implementation, which its `prepare` makes and its `unprepare` undoes.
    """

    qtype: str
    shape: tuple[int, int]
    layout: str = CANONICAL

    @property
    def canonical_shape(self) -> tuple[int, int]:
        """Shape of the uint8 array in the canonical layout."""
        return self.shape[0], unpack.row_bytes(self.qtype, self.shape[1])


def require_canonical(spec: WeightSpec) -> None:
    """Refuses (NotImplementedError) a weight that another implementation has tiled for itself."""
    if spec.layout != CANONICAL:
        raise NotImplementedError(f"a weight in the private layout {spec.layout!r}")
