"""How a model is split over the devices of a mesh: one table of rules, and what follows from it.

The whole step runs inside one `jax.shard_map`: each device runs the model on its own part, with a
config of its own, and sums meet in explicit collectives (`Parallel`). So kernels see the shapes of
one device, and nothing is gathered behind anyone's back.

A mesh has three axes. "data": replicas of the model. "expert" and "tensor": attention heads, hidden
units of feed-forward networks and the vocabulary are split over both; experts over "expert" alone,
each one's hidden units over "tensor".

Attention and feed-forward networks are each split twice (Megatron-LM, arXiv:1909.08053): what comes
first by its outputs, what comes last by its inputs, and one sum over devices restores the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.matmul.spec import CANONICAL
from qjax.errors import ShardingError
from qjax.qarray import Pieces, QArray

if TYPE_CHECKING:
    from jaxlib._jax import Device

    from qjax.models.config import ModelConfig

AXES = ("data", "expert", "tensor")
MODEL = ("expert", "tensor")
ALL_REDUCE = ("float32", "bfloat16", "int8", "fp8_e4m3")

# By the module's name: which way its weight is split.
_BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "q_b_proj", "kv_b_proj")
_BY_INPUTS = ("o_proj", "down_proj")
_BY_HEADS = ("k_b_proj", "v_b_proj")  # one matrix a head, stacked
_OF_VOCABULARY = ("embed_tokens", "lm_head")


def make_mesh(
    tensor: int = 1,
    *,
    expert: int = 1,
    data: int = 1,
    devices: Sequence[Device] | None = None,
) -> Mesh:
    """A mesh of the first data * expert * tensor devices, in the order that suits their network.

    Raises:
      ShardingError: there are not so many.
    """
    found = list(jax.devices() if devices is None else devices)
    shape = data, expert, tensor
    count = data * expert * tensor
    if min(shape) < 1 or count > len(found):
        hint = ""
        if found and found[0].platform == "cpu":
            flag = f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
            hint = f" (one CPU stands for several where {flag} is set before jax starts)"
        raise ShardingError(
            f"a mesh of {data} x {expert} x {tensor} (data, expert, tensor) takes {count} devices, "
            f"and there are {len(found)}{hint}"
        )
    return jax.make_mesh(shape, AXES, devices=found[:count], axis_types=(AxisType.Auto,) * 3)


@dataclass(frozen=True)
class Parallel:
    """How one copy of a model is split; static.

    Attributes:
      expert, tensor: devices along these axes of the mesh.
      vocabulary: whether embedding and head are split.
      all_reduce: what the sums of attention and feed-forward networks are sent as, one of
        `ALL_REDUCE`.
    """

    expert: int = 1
    tensor: int = 1
    vocabulary: bool = False
    all_reduce: str = "float32"

    @property
    def size(self) -> int:
        """Devices that share one copy of the model."""
        return self.expert * self.tensor

    @classmethod
    def of(cls, mesh: Mesh, config: ModelConfig, all_reduce: str = "float32") -> Parallel:
        """How a mesh splits a model.

        Raises:
          ShardingError: the mesh has other axes, or the model does not divide.
        """
        if mesh.axis_names != AXES:
            raise ShardingError(
                f"a mesh with the axes {mesh.axis_names}: make it by qjax.make_mesh, with {AXES}"
            )
        _, expert, tensor = mesh.devices.shape
        return cls.over(expert, tensor, config, all_reduce)

    @classmethod
    def over(
        cls, expert: int, tensor: int, config: ModelConfig, all_reduce: str = "float32"
    ) -> Parallel:
        """How so many devices split a model.

        Raises:
          ShardingError: it does not divide.
        """
        vocabulary = config.vocab_size % (expert * tensor) == 0
        found = cls(expert, tensor, vocabulary, all_reduce)
        check(config, found)
        return found


@dataclass(frozen=True)
class Split:
    """Over which axes of the mesh a parameter is split.

    Attributes:
      rows, columns: its outputs and its inputs (vectors have rows alone).
      lead: its leading axis: () for one that is whole, None where there is none.
      copies: devices in a row that hold the same rows.
    """

    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    lead: tuple[str, ...] | None = None
    copies: int = 1


def split_of(name: str, config: ModelConfig, parallel: Parallel) -> Split:
    """The rule for a parameter, by its name ("model.layers.0.mlp.up_proj.weight")."""
    *path, module, last = name.split(".")
    if module in _OF_VOCABULARY:
        return Split(MODEL if parallel.vocabulary else ())
    if path and path[-1] == "experts":
        if module == "down_proj":
            return Split((), ("tensor",) if last == "weight" else (), ("expert",))
        return Split(("tensor",), (), ("expert",))
    if module in _BY_HEADS:
        return Split(lead=MODEL)
    if module in ("k_proj", "v_proj"):
        return Split(MODEL, copies=_copies(config, parallel))
    if module in _BY_OUTPUTS:
        return Split(MODEL)
    if module in _BY_INPUTS:
        return Split((), MODEL) if last == "weight" else Split()
    if last == "sinks":
        return Split(MODEL)
    if last in ("k_scale", "v_scale") and config.kv_scales > 1:
        return Split(MODEL, copies=_copies(config, parallel))
    return Split()


def check(config: ModelConfig, parallel: Parallel) -> None:
    """Raises ShardingError, with the sizes that would work, where a model does not divide."""
    n = parallel.size
    lengths = {"attention heads": config.num_heads}
    moe = config.moe
    if moe is None or not all(moe.layers):
        lengths["hidden units of the feed-forward network"] = config.intermediate_size
    if moe is not None and moe.shared_size:
        lengths["hidden units of the shared expert"] = moe.shared_size
    for what, length in lengths.items():
        if length % n:
            raise ShardingError(_refusal(length, what, n))
    kv = config.num_kv_heads
    if kv % n and n % kv:
        works = [
            str(i) for i in range(1, 65) if config.num_heads % i == 0 and not (kv % i and i % kv)
        ]
        raise ShardingError(
            f"{kv} heads of keys and values cannot be split over {n} devices, nor copied to equal "
            f"shares of them: {', '.join(works)} devices work"
        )
    if moe is not None:
        experts = moe.router.num_experts
        if experts % parallel.expert:
            raise ShardingError(_refusal(experts, "experts", parallel.expert))
        if moe.intermediate_size % parallel.tensor:
            what = "hidden units of an expert"
            raise ShardingError(_refusal(moe.intermediate_size, what, parallel.tensor))


def _refusal(length: int, what: str, n: int) -> str:
    works = ", ".join(str(i) for i in range(1, min(length, 64) + 1) if length % i == 0)
    return f"{length} {what} cannot be split over {n} devices: {works} work"


def _copies(config: ModelConfig, parallel: Parallel) -> int:
    """Devices that share a head of keys and values."""
    return max(1, parallel.size // config.num_kv_heads)


def local_config(config: ModelConfig, parallel: Parallel) -> ModelConfig:
    """The config of the part that one device runs."""
    n = parallel.size
    latent = config.mla is not None and config.mla.split  # one cached head for all
    kv = config.num_kv_heads if latent else max(1, config.num_kv_heads // n)
    moe = config.moe
    if moe is not None:
        moe = replace(
            moe,
            intermediate_size=moe.intermediate_size // parallel.tensor,
            shared_size=moe.shared_size // n,
        )
    return replace(
        config,
        num_heads=config.num_heads // n,
        num_kv_heads=kv,
        intermediate_size=config.intermediate_size // n,
        vocab_size=config.vocab_size // n if parallel.vocabulary else config.vocab_size,
        kv_scales=kv if config.kv_scales > 1 else config.kv_scales,
        moe=moe,
    )


def sizes(split: Split, parallel: Parallel) -> tuple[int, int, int]:
    """Into how many pieces a parameter is cut: along its leading axis, outputs, inputs."""
    devices = {"expert": parallel.expert, "tensor": parallel.tensor}
    lead, rows, columns = (
        int(np.prod([devices[axis] for axis in axes], dtype=int))
        for axes in (split.lead or (), split.rows, split.columns)
    )
    return lead, rows, columns


def index_of(split: Split, parallel: Parallel, device: tuple[int, int]) -> tuple[int, int, int]:
    """Which of these pieces a device has, by its place along "expert" and "tensor"."""
    place = {"expert": device[0], "tensor": device[1]}
    devices = {"expert": parallel.expert, "tensor": parallel.tensor}

    def along(axes: tuple[str, ...]) -> int:
        found = 0
        for axis in axes:
            found = found * devices[axis] + place[axis]
        return found

    return along(split.lead or ()), along(split.rows) // split.copies, along(split.columns)


def specs(leaf: Any, split: Split) -> Any:
    """A parameter with a PartitionSpec in place of each array.

    Args:
      leaf: a QArray or an array; whole, or one device's piece.
    """
    lead = () if split.lead is None else (split.lead or None,)

    def along(array: Any, axes: dict[int, tuple[str, ...]]) -> P:
        """`axes`: what each axis, counted without the leading one, is split over."""
        rest = array.ndim - len(lead)
        named = {axis % rest: names for axis, names in axes.items() if names}
        return P(*lead, *(named.get(axis) for axis in range(rest)))

    if not isinstance(leaf, QArray):
        return along(leaf, {0: split.rows})
    both = {-2: split.rows, -1: split.columns}
    if leaf.layout != CANONICAL:  # see `QArray.pieces`
        both = {0: split.rows or split.columns}
    own = {
        "perm": {-1: split.columns},
        "act_pre_scale": {} if "perm" in leaf.aux else {-1: split.columns},
        "lora_a": {-1: split.columns},
        "lora_b": {-2: split.rows},
        "output_perm": {-1: split.rows},
        "super_scale": both,
        "super_zero": both,
    }
    aux = {key: along(array, own.get(key, {})) for key, array in leaf.aux.items()}
    scales = (None if x is None else along(x, both) for x in (leaf.scale, leaf.zero_point))
    scale, zero_point = scales
    return replace(
        leaf, qvalue=along(leaf.qvalue, both), scale=scale, zero_point=zero_point, aux=aux
    )


def joined(
    pieces: dict[Device, Any],
    split: Split,
    parallel: Parallel,
    mesh: Mesh,
    group: tuple[int, int] | None = None,
) -> Any:
    """A parameter of which each device of this process has its piece.

    Args:
      pieces: QArrays, or arrays, on their devices.
      group: of the whole weight.
    """
    first = next(iter(pieces.values()))
    wanted = jax.tree.leaves(specs(first, split))
    leaves = zip(*(jax.tree.leaves(piece) for piece in pieces.values()), strict=True)
    found = [
        jax.make_array_from_single_device_arrays(
            _whole_shape(mesh, spec, arrays[0].shape), NamedSharding(mesh, spec), list(arrays)
        )
        for spec, arrays in zip(wanted, leaves, strict=True)
    ]
    return _whole(first, found, split, parallel, group)


def described(piece: Any, split: Split, parallel: Parallel, mesh: Mesh) -> Any:
    """The parameter of which each device has such a piece, as jax.ShapeDtypeStruct."""
    found = [
        jax.ShapeDtypeStruct(
            _whole_shape(mesh, spec, x.shape), x.dtype, sharding=NamedSharding(mesh, spec)
        )
        for spec, x in zip(
            jax.tree.leaves(specs(piece, split)), jax.tree.leaves(piece), strict=True
        )
    ]
    return _whole(piece, found, split, parallel, getattr(piece, "group", None))


def local(leaf: Any) -> Any:
    """A split parameter's static fields as one device has them, with numbers for arrays."""
    if not isinstance(leaf, QArray):
        return 0
    (n, k), pieces = leaf.shape, leaf.pieces
    assert pieces is not None
    shape = n // pieces.rows, k // pieces.columns
    return replace(_hollow(leaf), shape=shape, pieces=None)


def _hollow(weight: QArray) -> QArray:
    """The weight with numbers for arrays, which are not checked."""
    return jax.tree.map(lambda _: 0, weight)


def _whole(
    piece: Any,
    leaves: list[Any],
    split: Split,
    parallel: Parallel,
    group: tuple[int, int] | None,
) -> Any:
    """A parameter from its arrays, and one device's piece of it."""
    if not isinstance(piece, QArray):
        return leaves[0]
    _, rows, columns = sizes(split, parallel)
    (n, k), pieces = piece.shape, Pieces(rows, columns, group)
    hollow = replace(_hollow(piece), shape=(n * rows, k * columns), pieces=pieces)
    return jax.tree.unflatten(jax.tree.structure(hollow), leaves)


def _whole_shape(mesh: Mesh, spec: P, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of an array whose pieces have this shape."""
    sizes = dict(zip(mesh.axis_names, mesh.devices.shape, strict=True))
    found = list(shape)
    for axis, names in enumerate(spec):
        for name in (names,) if isinstance(names, str) else names or ():
            found[axis] *= sizes[name]
    return tuple(found)
