"""QArray: a weight as it is stored, with what is needed to compute with it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from pallas_kernels.matmul.spec import CANONICAL, WeightSpec
from qjax.errors import UnsupportedError
from qjax.qtypes import QTYPES

AUX_KEYS = frozenset(
    {"global_scale", "act_scale", "act_pre_scale", "perm", "codebook", "lora_a", "lora_b"}
)


@dataclass(frozen=True)
class ActSpec:
    """How a weight wants its activations quantized.

    Attributes:
      dtype: name of the numeric type, such as "int8".
      strategy: what shares one scale: "tensor", "token" or "group".
      dynamic: whether scales are computed from the activations, or come with the weight.
    """

    dtype: str
    strategy: str
    dynamic: bool

    def __post_init__(self) -> None:
        if self.strategy not in ("tensor", "token", "group"):
            raise ValueError(f"ActSpec: strategy {self.strategy!r} is none of tensor, token, group")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["qvalue", "scale", "zero_point", "aux"],
    meta_fields=["qtype", "shape", "act", "layout"],
)
@dataclass(frozen=True)
class QArray:
    """A quantized or plain weight of N outputs and K inputs; a pytree.

    Attributes:
      qvalue: the codes. For block types uint8 [..., N, row_bytes], raw blocks; leading axes are
        experts.
      qtype: key of `QTYPES`.
      shape: logical (N, K), without leading axes.
      scale, zero_point: None for block types, which carry their own.
      aux: further arrays by reserved key, see `AUX_KEYS`.
      act: how activations are to be quantized, or None for not at all.
      layout: "canonical", or the tiling private to the kernel whose `prepare` made it.

    Raises:
      ValueError: the fields contradict each other. (Arrays are checked only where they are uint8,
        since jax also fills pytrees with placeholders.)
    """

    qvalue: Any
    qtype: str
    shape: tuple[int, int]
    scale: Any = None
    zero_point: Any = None
    aux: dict[str, Any] = field(default_factory=dict)
    act: ActSpec | None = None
    layout: str = CANONICAL

    def __post_init__(self) -> None:
        if self.qtype not in QTYPES:
            raise ValueError(f"QArray: qtype {self.qtype!r} is none of {', '.join(QTYPES)}")
        if len(self.shape) != 2:
            raise ValueError(f"QArray: shape {self.shape} is not (N, K)")
        if self.scale is not None or self.zero_point is not None:
            raise ValueError(f"QArray: {self.qtype} blocks carry their own scales and zero points")
        if isinstance(self.aux, dict) and not self.aux.keys() <= AUX_KEYS:
            unknown, known = sorted(self.aux.keys() - AUX_KEYS), sorted(AUX_KEYS)
            raise ValueError(f"QArray: aux keys {unknown} are none of {known}")
        is_raw = getattr(self.qvalue, "dtype", None) == np.uint8
        expected = WeightSpec(self.qtype, self.shape).canonical_shape
        if is_raw and self.layout == CANONICAL and self.qvalue.shape[-2:] != expected:
            raise ValueError(
                f"QArray: {self.qtype} {self.shape} takes bytes of shape {expected}, "
                f"got {self.qvalue.shape}"
            )

    @classmethod
    def from_dense(cls, weight: np.ndarray) -> QArray:
        """Wraps a float32, float16 or bfloat16 array [..., N, K] without copying it where it is
        contiguous.

        Raises:
          UnsupportedError: another dtype.
        """
        names = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
        if weight.dtype.name not in names:
            known = ", ".join(names)
            raise UnsupportedError(f"a dense weight of dtype {weight.dtype}; these work: {known}")
        raw = np.ascontiguousarray(weight).view(np.uint8)
        return cls(raw, names[weight.dtype.name], (weight.shape[-2], weight.shape[-1]))

    @property
    def spec(self) -> WeightSpec:
        """The kernels' static description.

        Raises:
          UnsupportedError: no kernel computes such a weight yet.
        """
        if self.aux or self.act is not None:
            extra = ", ".join([*sorted(self.aux), *(["act"] if self.act else [])])
            raise UnsupportedError(f"no kernel computes {self.qtype} weights with {extra}")
        return WeightSpec(self.qtype, self.shape, self.layout)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """Bits of storage a weight, padding of the layout included."""
        leading = self.qvalue.shape[:-2] if self.layout == CANONICAL else ()
        return 8 * self.nbytes / (np.prod(leading, dtype=np.int64) * self.shape[0] * self.shape[1])

    def dequantize(self) -> jax.Array:
        """float32 [..., N, K]. Raises ValueError in a private layout: `ops.unprepare` it first."""
        if self.layout != CANONICAL:
            raise ValueError(f"QArray: cannot dequantize the private layout {self.layout!r}")
        return QTYPES[self.qtype].decode(self.qvalue)

    def with_layout(self, layout: str, qvalue: Any) -> QArray:
        """The same weight with its codes laid out anew."""
        return replace(self, layout=layout, qvalue=qvalue)
