"""The hidden states of all samples in front of one layer."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.compress import layers, sensitivity, statistics
from qjax.compress.layers import Flat
from qjax.compress.statistics import InputStats
from qjax.models import functional
from qjax.params import Params

TOKENS = 2048  # that run at once: with more, a CPU asks for new memory each time


class Hidden:
    """Attributes:
    values: float32 [S, T, E] on the host, the inputs of the layer that comes next.
    """

    def __init__(self, params: Params, values: np.ndarray):
        self.config, self.values = params.config, values

    @classmethod
    def embedded(cls, params: Params, tokens: np.ndarray) -> Hidden:
        """In front of the first layer, for samples int32 [S, T]."""
        size = (*tokens.shape, params.config.hidden_size)
        hidden = cls(params, np.empty(size, np.float32))
        embed = jax.jit(functional.embed, static_argnums=0)
        for rows in hidden.batches():
            found = embed(params.config, params.tree, jnp.asarray(tokens[rows].reshape(-1)))
            hidden.values[rows] = np.asarray(found).reshape(hidden.values[rows].shape)
        return hidden

    def batches(self) -> Iterator[slice]:
        """Samples that run together."""
        count, length, _ = self.values.shape
        size = max(1, TOKENS // length)
        return (slice(first, min(first + size, count)) for first in range(0, count, size))

    def statistics(self, index: int, layer: Flat) -> dict[str, InputStats]:
        """Of the inputs of the modules of layer `index`, see `layers.input_stats`."""
        return reduce(_merged, (part for _, part in self._run(layers.input_stats, index, layer)))

    def statistics_on_the_way(self, index: int, layer: Flat) -> dict[str, InputStats]:
        """`statistics` and `advance` in one run."""

        def parts() -> Iterator[dict[str, InputStats]]:
            for rows, (part, y) in self._run(layers.stats_and_outputs, index, layer):
                self.values[rows] = y
                yield part

        return reduce(_merged, parts())

    def output_weights(self, index: int, layer: Flat) -> dict[str, jax.Array]:
        """See `sensitivity.output_weights`; of the first samples, which tell enough."""
        kind = functional.same_layer(self.config, index)
        count = max(1, TOKENS // self.values.shape[1])
        x = jnp.asarray(self.values[:count])
        return sensitivity.output_weights(self.config, kind, layer, x, jax.random.key(index))

    def advance(self, index: int, layer: Flat) -> None:
        """Puts the outputs of layer `index` in the place of its inputs."""
        for rows, y in self._run(layers.outputs, index, layer):
            self.values[rows] = y

    def outputs(self, index: int, layer: Flat) -> np.ndarray:
        """What `advance` would put there: float32 [S, T, E] on the host."""
        found = np.empty_like(self.values)
        for rows, y in self._run(layers.outputs, index, layer):
            found[rows] = y
        return found

    def cached_extremes(self, index: int, layer: Flat) -> tuple[jax.Array, jax.Array]:
        """See `layers.cached_extremes`."""
        found = [each for _, each in self._run(layers.cached_extremes, index, layer)]
        keys, values = (jnp.stack(each).max(0) for each in zip(*found, strict=True))
        return keys, values

    def _run(
        self, program: Callable[..., Any], index: int, layer: Flat
    ) -> Iterator[tuple[slice, Any]]:
        """program(config, index, layer, x) of every batch x, in order, on the first device; where
        there are several, as many batches are on their way, each on a device of its own."""
        kind, devices = functional.same_layer(self.config, index), jax.local_devices()
        copies = [jax.device_put(layer, one) for one in devices]
        waiting: deque[tuple[slice, Any]] = deque()
        for number, rows in enumerate(self.batches()):
            here = number % len(devices)
            x = jax.device_put(self.values[rows], devices[here])
            waiting.append((rows, program(self.config, kind, copies[here], x)))
            if len(waiting) == len(devices):
                yield _fetched(*waiting.popleft())
        yield from itertools.starmap(_fetched, waiting)


def _fetched(rows: slice, found: Any) -> tuple[slice, Any]:
    return rows, jax.device_put(found, jax.local_devices()[0])


@jax.jit
def _merged(a: dict[str, InputStats], b: dict[str, InputStats]) -> dict[str, InputStats]:
    return {name: statistics.merge(stats, b[name]) for name, stats in a.items()}
