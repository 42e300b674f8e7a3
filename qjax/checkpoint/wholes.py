"""Weights that lie in pieces on several devices, whole and canonical again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qjax import ops
from qjax.errors import UnsupportedError
from qjax.params import Params
from qjax.qarray import Pieces, QArray
from qjax.sharding import MODEL, Parallel, Split, joined, local, specs, split_of


def on_host(params: Params, name: str, leaf: Any) -> Any:
    """A parameter on the host: a canonical QArray, or an array.

    Raises:
      UnsupportedError: other processes have some of it.
    """
    if params.mesh is not None:
        if not all(array.is_fully_addressable for array in jax.tree.leaves(leaf)):
            raise UnsupportedError(
                "a model that several processes share is saved with format='orbax' alone"
            )
        leaf = whole(params, name, leaf)
    leaf = jax.tree.map(np.asarray, leaf)
    return ops.unprepare(leaf) if isinstance(leaf, QArray) else leaf


def whole(params: Params, name: str, leaf: Any) -> Any:
    """A parameter of a split model, canonical, with each device's part where it is."""
    mesh = params.mesh
    assert mesh is not None
    parallel = Parallel.of(mesh, params.config)
    split = split_of(name, params.config, parallel)
    if not isinstance(leaf, QArray):
        return leaf if split.copies == 1 else _without_copies(leaf, P(MODEL), split, mesh)
    pieces = leaf.pieces
    assert pieces is not None
    if leaf.layout != "canonical":
        leaf = joined(_unprepared(leaf, pieces), split, parallel, mesh, pieces.group)
    n, k = leaf.shape
    if split.copies > 1:
        n //= split.copies
        arrays = [
            _without_copies(array, spec, split, mesh) if any(spec) else array
            for array, spec in zip(
                jax.tree.leaves(leaf), jax.tree.leaves(specs(leaf, split)), strict=True
            )
        ]
        hollow = replace(jax.tree.map(lambda _: 0, leaf), shape=(n, k))
        leaf = jax.tree.unflatten(jax.tree.structure(hollow), arrays)
    if leaf.group is None or pieces.group is None:
        return replace(leaf, pieces=None)
    # Groups that were cut have their scale several times.
    steps = tuple(
        length // own if group >= length else group // own
        for length, own, group in zip((n, k), leaf.group, pieces.group, strict=True)
    )
    return replace(
        leaf,
        scale=_thinned(leaf.scale, steps, mesh),
        zero_point=_thinned(leaf.zero_point, steps, mesh),
        group=pieces.group,
        pieces=None,
    )


def _unprepared(leaf: QArray, pieces: Pieces) -> dict[Any, QArray]:
    """The pieces of this process's devices, canonical, on these."""
    structure = jax.tree.structure(local(leaf))
    shards = [
        {shard.device: shard.data for shard in array.addressable_shards}
        for array in jax.tree.leaves(leaf)
    ]
    found = {}
    for device in shards[0]:
        own = jax.tree.unflatten(structure, [np.asarray(each[device]) for each in shards])
        found[device] = jax.device_put(ops.unprepare(own), device)
    return found


def _without_copies(array: jax.Array, spec: P, split: Split, mesh: Mesh) -> jax.Array:
    """An array of whose rows several devices in a row hold the same."""
    (axis,) = (axis for axis, names in enumerate(spec) if names)
    shape = list(array.shape)
    shape[axis] //= split.copies
    data = mesh.devices.shape[0]
    devices = mesh.devices.reshape(data, -1, split.copies)
    finer = Mesh(devices, ("data", "rows", "copies"))
    sharding = NamedSharding(finer, P(*[None] * axis, "rows"))
    held = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(tuple(shape), sharding, held)


def _thinned(scales: jax.Array | None, steps: tuple[int, ...], mesh: Mesh) -> jax.Array | None:
    if scales is None or steps == (1, 1):
        return scales
    rows, columns = steps
    everywhere = NamedSharding(mesh, P())
    return jax.jit(lambda x: x[..., ::rows, ::columns], out_shardings=everywhere)(scales)
