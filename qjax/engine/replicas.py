"""Copies of a model on devices of their own, each with an engine: data parallelism."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from qjax.engine.engine import Engine
from qjax.engine.request import Request
from qjax.engine.sampling_params import SamplingParams
from qjax.engine.stats import EngineStats
from qjax.errors import ShardingError
from qjax.params import Params
from qjax.sharding import AXES


def replicas(params: Params) -> list[Params]:
    """The copies of a model along the axis "data" of its mesh, each with a mesh of its own; no
    array is moved.

    Raises:
      ShardingError: other processes have some of them.
    """
    mesh = params.mesh
    if mesh is None or mesh.devices.shape[0] == 1:
        return [params]
    here = jax.process_index()
    if any(device.process_index != here for device in mesh.devices.flat):
        raise ShardingError(
            f"{mesh.devices.shape[0]} copies of a model on the devices of several processes: give "
            "each copy processes of its own, behind a balancer"
        )
    found = []
    for devices in mesh.devices:
        own = Mesh(devices[None], AXES, axis_types=(AxisType.Auto,) * len(AXES))
        tree = jax.tree.map(lambda array, own=own: _within(array, own), params.tree)
        found.append(replace(params, tree=tree, mesh=own))
    return found


def _within(array: jax.Array, mesh: Mesh) -> jax.Array:
    """What these devices have of an array, which is all of it."""
    assert isinstance(array.sharding, NamedSharding)
    devices = set(mesh.devices.flat)
    held = [shard.data for shard in array.addressable_shards if shard.device in devices]
    sharding = NamedSharding(mesh, array.sharding.spec)
    return jax.make_array_from_single_device_arrays(array.shape, sharding, held)


def one_or_replicas(
    params: Params, make: Callable[..., Engine], seed: int | None
) -> Engine | Replicas:
    """An engine as `make(params, seed=...)` makes it; of several copies of a model, one on each."""
    copies = 1 if params.mesh is None else params.mesh.devices.shape[0]
    if copies == 1:
        return make(params, seed=seed)
    seeds = np.random.SeedSequence(SamplingParams(seed=seed).seed).generate_state(copies)
    return Replicas(params, [partial(make, seed=int(own)) for own in seeds])


class Replicas:
    """Several engines that are used as one: each request goes to the one with the fewest.

    Args:
      params: a model whose mesh has several copies of it.
      make: for each of them, what makes its engine.
    """

    def __init__(self, params: Params, make: Sequence[Callable[[Params], Engine]]):
        self.params = params
        pairs = zip(make, replicas(params), strict=True)
        self.engines: list[Engine] = [make_one(each) for make_one, each in pairs]
        self._owner: dict[int, Engine] = {}

    def add(
        self,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
        sample: int = 0,
        **options: Any,
    ) -> Request:
        """See `Engine.add`."""
        engine = min(self.engines, key=_load)
        request = engine.add(prompt_ids, params, sample, **options)
        self._owner[id(request)] = engine
        return request

    @property
    def busy(self) -> bool:
        return any(engine.busy for engine in self.engines)

    def step(self) -> list[Request]:
        """See `Engine.step`: one of each engine that has work, side by side on their devices."""
        changed = [request for engine in self.engines if engine.busy for request in engine.step()]
        for request in changed:
            if request.finish_reason is not None:
                self._owner.pop(id(request), None)
        return changed

    def abort(self, request: Request) -> None:
        """See `Engine.abort`."""
        engine = self._owner.pop(id(request), None)
        if engine is not None:
            engine.abort(request)

    def stats(self) -> EngineStats:
        """See `Engine.stats`: of all together."""
        return sum((engine.stats() for engine in self.engines), EngineStats())


def _load(engine: Engine) -> int:
    return len(engine.scheduler.waiting) + len(engine.scheduler.running)
