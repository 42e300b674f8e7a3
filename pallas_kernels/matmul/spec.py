"""What a kernel knows about a weight before it sees the bytes."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import codes, unpack

CANONICAL = "canonical"
# The largest code of a rounded activation: 16 bits are two signed bytes, 256 * high + low.
LARGEST_CODE = {"int16": 127 * 256 + 127, "int8": 127}


class WeightArrays(NamedTuple):
    """The arrays of a weight; those that its type does not have are None.

    Attributes:
      qvalue: uint8 [..., N, row_bytes]: blocks (`unpack`) or codes (`codes`).
      scale, zero_point: [..., groups of rows, groups of columns].
      global_scale: float32 [..., 1, 1], multiplies the scales.
      codebook: float32 [..., 1, entries] of a lookup type.
      super_scale, super_zero: float16, what scales and zero points of two levels are multiplied
        by; in the layouts of `planes` only.
    """

    qvalue: Any
    scale: Any = None
    zero_point: Any = None
    global_scale: Any = None
    codebook: Any = None
    super_scale: Any = None
    super_zero: Any = None


@dataclass(frozen=True)
class WeightSpec:
    """Static description of a weight; together with its arrays it is all that a kernel gets.

    Attributes:
      qtype: key of `unpack.BLOCKS` or of `codes.CODES`.
      shape: logical (N, K): N outputs, K inputs.
      layout: "canonical" (uint8 [N, row_bytes], rows of raw blocks or packed codes, with scales as
        `WeightArrays` says), or the name of the private tiling of one implementation, which its
        `prepare` makes and its `unprepare` undoes.
      group: rows and columns that share a scale; None for blocks, which carry theirs.
      scale, zero_point: names of the dtypes of these arrays, or None. (Blocks have them where a
        layout takes them apart.)
      has_global_scale: whether there is one.
      additive: a weight is code * scale + zero_point, not (code - zero_point) * scale.
      rounded: "bfloat16" or "float16": weights of codes are rounded to it once they are scaled.
        Where `activation_dtype` allows to round activations, a kernel need not round them.
    """

    qtype: str
    shape: tuple[int, int]
    layout: str = CANONICAL
    group: tuple[int, int] | None = None
    scale: str | None = None
    zero_point: str | None = None
    has_global_scale: bool = False
    additive: bool = False
    rounded: str | None = None

    @property
    def is_blocks(self) -> bool:
        """Whether scales lie inside the bytes."""
        return self.qtype in unpack.BLOCKS

    @property
    def kind(self) -> str:
        """What products of one speed have in common, for tables of measurements: type, what shares
        a scale, dtypes: "uint4b8 g128 bfloat16", "fp8_e4m3 channel float32", "q4_k".
        """
        if self.group is None:
            return self.qtype
        (n, k), (rows, columns) = self.shape, self.group
        if columns >= k:
            shared = "channel" if rows == 1 else "tensor" if rows >= n else f"g{rows}xK"
        else:
            shared = f"g{columns}" if rows == 1 else f"g{rows}x{columns}"
        zero = None if self.zero_point is None else "add" if self.additive else "zero"
        return " ".join(filter(None, (self.qtype, shared, self.scale, zero)))

    @property
    def canonical_shape(self) -> tuple[int, int]:
        """Shape of the uint8 array in the canonical layout."""
        row_bytes = unpack.row_bytes if self.is_blocks else codes.row_bytes
        return self.shape[0], row_bytes(self.qtype, self.shape[1])

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Shape of scale and zero point in the canonical layout: groups of rows and of columns."""
        assert self.group is not None
        (n, k), (rows, columns) = self.shape, self.group
        return -(-n // rows), -(-k // columns)


def decode(spec: WeightSpec, arrays: WeightArrays, xp: ModuleType = jnp) -> Any:
    """A canonical weight, or some of its rows where each has scales of its own, as float32 [..., N,
    K].
    """
    if spec.is_blocks:
        return unpack.dequantize(arrays.qvalue, spec.qtype, xp)
    assert spec.group is not None
    weight = codes.dequantize(
        arrays.qvalue,
        spec.qtype,
        (arrays.qvalue.shape[-2], spec.shape[1]),
        spec.group,
        arrays.scale,
        arrays.zero_point,
        arrays.global_scale,
        arrays.codebook,
        spec.additive,
        xp,
    )
    return rounded(weight, spec, xp)


def rounded(weight: Any, spec: WeightSpec, xp: ModuleType = jnp) -> Any:
    """A decoded weight, float32, rounded as `spec.rounded` says."""
    if spec.rounded is None:
        return weight
    narrow = weight.astype(jnp.dtype(spec.rounded))
    # Without it a compiler may leave out both casts.
    return (narrow if xp is np else jax.lax.optimization_barrier(narrow)).astype(np.float32)


def require_canonical(spec: WeightSpec) -> None:
    """Refuses (NotImplementedError) a weight that another implementation has tiled for itself."""
    if spec.layout != CANONICAL:
        raise NotImplementedError(f"a weight in the private layout {spec.layout!r}")
