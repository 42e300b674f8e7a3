"""QArray: a weight as it is stored, with what is needed to compute with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pallas_kernels.codes import is_finite
from pallas_kernels.inputs import ActSpec
from pallas_kernels.matmul.spec import CANONICAL, WeightArrays, WeightSpec, decode
from qjax import lazy
from qjax.errors import UnsupportedError
from qjax.qtypes import QTYPES

_WEIGHT_AUX = WeightArrays._fields[3:]
AUX_KEYS = frozenset(
    {
        *_WEIGHT_AUX,  # global_scale, codebook, super_scale, super_zero
        *("perm", "act_pre_scale", "act_scale", "act_zero_point", "act_global_scale"),  # of inputs
        *("lora_a", "lora_b", "output_perm"),  # of outputs
    }
)


@dataclass(frozen=True)
class Pieces:
    """How a weight is cut, each piece on a device of its own (see `qjax.sharding`).

    Attributes:
      rows, columns: into how many pieces outputs and inputs are cut.
      group: of the whole weight; pieces have smaller ones where it would be cut.
    """

    rows: int
    columns: int
    group: tuple[int, int] | None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["qvalue", "scale", "zero_point", "aux"],
    meta_fields=[
        *("qtype", "shape", "group", "additive", "rounded", "act", "hadamard", "layout", "pieces")
    ],
)
@dataclass(frozen=True)
class QArray:
    """A quantized or plain weight of N outputs and K inputs; a pytree.

    Attributes:
      qvalue: uint8 [..., N, row_bytes]: raw blocks, or codes bit-packed along K, the first one in
        the lowest bits. Leading axes are experts.
      qtype: key of `QTYPES`.
      shape: logical (N, K), without leading axes.
      scale: of codes, [..., ceil(N / rows), ceil(K / columns)] of a float dtype. None for block
        types, which carry their own (but where a private layout takes blocks apart).
      zero_point: None, or like scale, of an integer or float dtype.
      aux: further arrays by reserved key, see `AUX_KEYS`: global_scale float32 [..., 1, 1]
        (multiplies scale); codebook float32 [..., 1, entries]; super_scale, super_zero (of a layout
        that takes blocks apart, see `WeightArrays`); perm int32 [1, K] (input columns are
        taken in this order first); act_pre_scale [1, K] (multiplies the input); act_scale,
        act_zero_point, act_global_scale [1, 1]; lora_a [R, K] and lora_b [N, R];
        output_perm int32 [1, N] (output i is that of the stored row output_perm[i]).
      group: rows and columns that share a scale; None for block types.
      additive: a weight is code * scale + zero_point, not (code - zero_point) * scale.
      rounded: "bfloat16" or "float16": what a tool rounds weights of codes to as it dequantizes
        them, and exact numerics with it.
      act: how activations are to be quantized, or None for not at all.
      hadamard: sizes of the normalized Hadamard matrices that runs of input and of output columns
        are multiplied by; 0 for none.
      layout: "canonical", or the tiling private to the kernel whose `prepare` made it.
      pieces: of a weight on several devices; None for a whole one, and for a piece. They lie one
        after another, each laid out for itself.

    Raises:
      ValueError: the fields contradict each other. (Arrays are checked only where they are numpy or
        jax arrays, since jax also fills pytrees with placeholders.)
    """

    qvalue: Any
    qtype: str
    shape: tuple[int, int]
    scale: Any = None
    zero_point: Any = None
    aux: dict[str, Any] = field(default_factory=dict)
    group: tuple[int, int] | None = None
    additive: bool = False
    rounded: str | None = None
    act: ActSpec | None = None
    hadamard: tuple[int, int] = (0, 0)
    layout: str = CANONICAL
    pieces: Pieces | None = None

    def __post_init__(self) -> None:
        if self.qtype not in QTYPES:
            raise ValueError(f"QArray: qtype {self.qtype!r} is none of {', '.join(QTYPES)}")
        if len(self.shape) != 2:
            raise ValueError(f"QArray: shape {self.shape} is not (N, K)")
        blocks = QTYPES[self.qtype].is_blocks
        whole = blocks and self.layout == CANONICAL
        if whole and not (self.scale is None and self.zero_point is None and self.group is None):
            raise ValueError(f"QArray: {self.qtype} blocks carry their own scales and zero points")
        if not blocks and self.group is None:
            raise ValueError(f"QArray: {self.qtype} codes need a group (rows, columns) of scales")
        if isinstance(self.aux, dict) and not self.aux.keys() <= AUX_KEYS:
            unknown, known = sorted(self.aux.keys() - AUX_KEYS), sorted(AUX_KEYS)
            raise ValueError(f"QArray: aux keys {unknown} are none of {known}")
        if isinstance(self.qvalue, np.ndarray | jax.Array) and self.layout == CANONICAL:
            self._check_arrays(WeightSpec(self.qtype, self.shape, group=self.group))

    def _check_arrays(self, spec: WeightSpec) -> None:
        if self.qvalue.dtype == np.uint8 and self.qvalue.shape[-2:] != spec.canonical_shape:
            raise ValueError(
                f"QArray: {self.qtype} {self.shape} takes bytes of shape {spec.canonical_shape}, "
                f"got {self.qvalue.shape}"
            )
        for name in ("scale", "zero_point"):
            array = getattr(self, name)
            if isinstance(array, np.ndarray | jax.Array) and array.shape[-2:] != spec.scale_shape:
                raise ValueError(
                    f"QArray: {name} of {self.qtype} {self.shape} in groups of {self.group} has "
                    f"shape {spec.scale_shape}, got {array.shape}"
                )

    @classmethod
    def from_dense(cls, weight: np.ndarray | lazy.LazyArray) -> QArray:
        """Wraps a float32, float16 or bfloat16 array [..., N, K] without copying it where it is
        contiguous.

        Raises:
          UnsupportedError: another dtype.
        """
        names = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
        if weight.dtype.name not in names:
            known = ", ".join(names)
            raise UnsupportedError(f"a dense weight of dtype {weight.dtype}; these work: {known}")
        raw = lazy.as_bytes(weight)
        return cls(raw, names[weight.dtype.name], (weight.shape[-2], weight.shape[-1]))

    @staticmethod
    def stack(weights: Sequence[QArray]) -> QArray:
        """Host weights that differ in their values alone, as one with a leading axis (experts).

        Where some have their columns in another order ("perm"), the others get the usual one.

        Raises:
          ValueError: they differ in type, shape or in which arrays they have.
        """
        if any("perm" in weight.aux for weight in weights):
            usual = np.arange(weights[0].shape[1], dtype=np.int32)[None]
            weights = [replace(w, aux={"perm": usual} | w.aux) for w in weights]
        structures = {jax.tree.structure(weight) for weight in weights}
        if len(structures) != 1:
            raise ValueError(f"QArray: {len(structures)} kinds of weights cannot be stacked")
        return jax.tree.map(lambda *leaves: lazy.stack(leaves), *weights)

    def rows(self, wanted: slice) -> QArray:
        """Some outputs of a canonical weight on the host.

        Raises:
          UnsupportedError: rows are stored in another order, and these take more of one group than
            of another.
        """
        assert self.layout == CANONICAL
        start, stop, step = wanted.indices(self.shape[0])
        if step != 1:
            return self.take_rows(np.arange(start, stop, step))
        if "output_perm" in self.aux:
            return self._stored_rows(self.aux["output_perm"][0, start:stop])

        def cut(array: Any) -> Any:
            """Of scales: their rows, spread where groups do not begin at `start`."""
            if array is None or array.shape[-2] == 1:
                return array
            assert self.group is not None
            size = self.group[0]
            if start % size and size > 1:
                return array[..., np.arange(start, stop) // size, :]
            return array[..., start // size : -(-stop // size), :]

        group, scale = self.group, cut(self.scale)
        if group is not None and group[0] > 1:
            spread = scale is not None and scale.shape[-2] == stop - start and start % group[0]
            single = scale is not None and self.scale.shape[-2] == 1
            group = (1 if spread else stop - start if single else group[0], group[1])
        aux = {
            key: value[..., start:stop, :] if key == "lora_b" else value
            for key, value in self.aux.items()
        }
        return replace(
            self,
            qvalue=self.qvalue[..., start:stop, :],
            shape=(stop - start, self.shape[1]),
            scale=scale,
            zero_point=cut(self.zero_point),
            aux=aux,
            group=group,
        )

    def _stored_rows(self, order: np.ndarray) -> QArray:
        """The outputs that these stored rows give, which stay in the order they are stored in."""
        assert self.group is not None
        kept = np.sort(order)
        tiles, columns = -(-self.shape[0] // self.group[0]), self.group[1]
        counts = np.bincount(kept // self.group[0], minlength=tiles)
        if len(set(counts.tolist())) != 1:
            raise UnsupportedError(
                f"{len(kept)} of {self.shape[0]} outputs cannot be taken apart: they have unequal "
                f"parts in its groups of {self.group[0]} rows"
            )
        return replace(
            self,
            qvalue=self.qvalue[..., kept, :],
            shape=(len(kept), self.shape[1]),
            group=(int(counts[0]), columns),
            aux={**self.aux, "output_perm": np.searchsorted(kept, order).astype(np.int32)[None]},
        )

    def take_rows(self, order: np.ndarray) -> QArray:
        """Outputs in another order, of a canonical weight on the host."""
        assert self.layout == CANONICAL
        if "output_perm" in self.aux:
            permuted = self.aux["output_perm"][..., order]
            return replace(self, aux={**self.aux, "output_perm": permuted})

        def pick(array: Any, size: int) -> Any:
            return array if array is None or array.shape[-2] == 1 else array[..., order // size, :]

        size = 1 if self.group is None else self.group[0]
        several = self.scale is not None and self.scale.shape[-2] > 1
        return replace(
            self,
            qvalue=self.qvalue[..., order, :],
            shape=(len(order), self.shape[1]),
            scale=pick(self.scale, size),
            zero_point=pick(self.zero_point, size),
            group=(1 if several else len(order), self.group[1]) if self.group else None,
        )

    @property
    def spec(self) -> WeightSpec:
        """The kernels' static description; how inputs are treated is not in it.

        Raises ValueError for a weight in pieces, of which each has its own.
        """
        if self.pieces is not None:
            raise ValueError(
                f"QArray: this {self.qtype} weight lies in pieces on several devices: run the "
                "model by qjax.generate, qjax.forward or qjax.Engine, or load it without a mesh"
            )

        def dtype(array: Any) -> str | None:
            return None if array is None else jnp.dtype(array.dtype).name

        return WeightSpec(
            self.qtype,
            self.shape,
            self.layout,
            self.group,
            dtype(self.scale),
            dtype(self.zero_point),
            "global_scale" in self.aux,
            self.additive,
            self.rounded,
        )

    @property
    def arrays(self) -> WeightArrays:
        """What a kernel computes with."""
        return WeightArrays(
            self.qvalue, self.scale, self.zero_point, *map(self.aux.get, _WEIGHT_AUX)
        )

    @property
    def is_finite(self) -> bool:
        """Whether no code of this weight on the host means NaN or infinity."""
        return is_finite(np.asarray(self.qvalue), self.qtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """Bits of storage a weight, padding of the layout included."""
        leading = self.qvalue.shape[:-2]
        return 8 * self.nbytes / (np.prod(leading, dtype=np.int64) * self.shape[0] * self.shape[1])

    def dequantize(self) -> jax.Array:
        """float32 [..., N, K], rows and columns in the order of the stored codes (see aux
        "output_perm" and "perm").

        Raises ValueError in a private layout (`ops.unprepare` it first), or in pieces.
        """
        given = [array for array in self.arrays if array is not None]
        if all(map(_on_host, given)):
            # Numpy, unlike jax, compiles nothing for the operations of each shape.
            return jnp.asarray(self.to_numpy())
        return decode(self._canonical_spec(), WeightArrays(*map(_on_device, self.arrays)))

    def to_numpy(self) -> np.ndarray:
        """The same by numpy, not to be written to: it may be the stored array itself."""
        with np.errstate(all="ignore"):
            return decode(self._canonical_spec(), WeightArrays(*map(_numpy, self.arrays)), np)

    def _canonical_spec(self) -> WeightSpec:
        spec = self.spec  # refuses pieces
        if self.layout != CANONICAL:
            raise ValueError(f"QArray: cannot dequantize the private layout {self.layout!r}")
        return spec

    def with_arrays(self, layout: str, arrays: WeightArrays) -> QArray:
        """The same weight with its arrays laid out anew."""
        aux = {key: value for key, value in self.aux.items() if key not in _WEIGHT_AUX}
        aux |= {key: array for key in _WEIGHT_AUX if (array := getattr(arrays, key)) is not None}
        return replace(
            self,
            layout=layout,
            qvalue=arrays.qvalue,
            scale=arrays.scale,
            zero_point=arrays.zero_point,
            aux=aux,
        )


def _on_host(array: Any) -> bool:
    """Whether numpy can read it where it lies."""
    if isinstance(array, Tracer):
        return False
    if not isinstance(array, jax.Array):
        return True
    here = array.is_fully_addressable
    return here and all(device.platform == "cpu" for device in array.devices())


def _numpy(array: Any) -> Any:
    return None if array is None else np.asarray(array)


def _on_device(array: Any) -> Any:
    return None if array is None else jnp.asarray(array)
