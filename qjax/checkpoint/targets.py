"""Which piece of each parameter goes to which device, as a checkpoint is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from qjax.errors import ShardingError
from qjax.models.config import ModelConfig
from qjax.qarray import QArray
from qjax.sharding import Parallel, Split, index_of, joined, sizes, split_of

if TYPE_CHECKING:
    from jaxlib._jax import Device


@dataclass(frozen=True)
class Wanted:
    """A piece of a weight.

    Attributes:
      experts: (into how many pieces its leading axis is cut, which of them).
      parts, index: likewise of outputs and inputs, see `qjax.parts.part`.
    """

    experts: tuple[int, int] = (1, 0)
    parts: tuple[int, int] = (1, 1)
    index: tuple[int, int] = (0, 0)

    def of_experts(self, count: int) -> slice:
        """Those of so many experts that belong to it."""
        parts, index = self.experts
        return slice(index * count // parts, (index + 1) * count // parts)

    def experts_of(self, weight: QArray) -> QArray:
        """A stacked weight with these experts alone."""
        if self.experts[0] == 1:
            return weight
        return jax.tree.map(lambda x: x[self.of_experts(len(x))], weight)


WHOLE = Wanted()


@dataclass(frozen=True)
class Targets:
    """The devices of this process, and their places in a mesh."""

    mesh: Mesh
    config: ModelConfig
    parallel: Parallel
    places: dict[Device, tuple[int, int]]

    @classmethod
    def of(cls, mesh: Mesh, config: ModelConfig) -> Targets:
        """Raises ShardingError where the mesh does not split this model."""
        here = jax.process_index()
        places = {
            device: (expert, tensor)
            for (_, expert, tensor), device in np.ndenumerate(mesh.devices)
            if device.process_index == here
        }
        if not places:
            raise ShardingError(
                f"process {here} has none of the {mesh.devices.size} devices of the mesh: it must "
                f"have {jax.device_count()}, those of all processes"
            )
        return cls(mesh, config, Parallel.of(mesh, config), places)

    def weight(
        self, name: str, read: Callable[[Wanted], QArray], group: tuple[int, int] | None
    ) -> QArray:
        """A weight of which each device has its piece; `read` makes one on the host, of a weight
        with this group."""
        split = split_of(name, self.config, self.parallel)
        devices: dict[Wanted, list[Device]] = {}
        for device, place in self.places.items():
            devices.setdefault(self._wanted(split, place), []).append(device)
        found: dict[Device, Any] = {}
        for wanted, those in devices.items():
            piece = read(wanted)
            found |= {device: jax.device_put(piece, device) for device in those}
        in_order = {device: found[device] for device in self.places}
        return joined(in_order, split, self.parallel, self.mesh, group)

    def vector(self, name: str, whole: np.ndarray) -> jax.Array:
        split = split_of(name, self.config, self.parallel)
        found = {}
        for device, place in self.places.items():
            wanted = self._wanted(split, place)
            piece, axis = whole, 0
            if split.lead is not None:
                piece, axis = piece[wanted.of_experts(len(piece))], 1
            parts, index = wanted.parts[0], wanted.index[0]
            if parts > 1:
                piece = np.split(piece, parts, axis)[index]
            found[device] = jax.device_put(np.ascontiguousarray(piece), device)
        return joined(found, split, self.parallel, self.mesh)

    def _wanted(self, split: Split, place: tuple[int, int]) -> Wanted:
        lead, rows, columns = sizes(split, self.parallel)
        expert, row, column = index_of(split, self.parallel, place)
        return Wanted((lead, expert), (rows // split.copies, columns), (row, column))
