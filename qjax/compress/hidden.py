"""The hidden states of all samples in front of one layer."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from qjax.compress import layers, sensitivity, statistics
from qjax.compress.layers import Flat
from qjax.compress.statistics import InputStats
from qjax.models import functional
from qjax.params import Params

TOKENS = 4096  # that run at once


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
        found: dict[str, InputStats] | None = None
        kind = functional.same_layer(self.config, index)
        for rows in self.batches():
            part = layers.input_stats(self.config, kind, layer, jnp.asarray(self.values[rows]))
            found = part if found is None else _merged(found, part)
        assert found is not None
        return found

    def output_weights(self, index: int, layer: Flat) -> dict[str, jax.Array]:
        """See `sensitivity.output_weights`; of the first samples, which tell enough."""
        kind = functional.same_layer(self.config, index)
        count = max(1, TOKENS // 2 // self.values.shape[1])
        x = jnp.asarray(self.values[:count])
        return sensitivity.output_weights(self.config, kind, layer, x, jax.random.key(index))

    def advance(self, index: int, layer: Flat) -> None:
        """Puts the outputs of layer `index` in the place of its inputs."""
        kind = functional.same_layer(self.config, index)
        for rows in self.batches():
            x = jnp.asarray(self.values[rows])
            self.values[rows] = layers.outputs(self.config, kind, layer, x)

    def cached_extremes(self, index: int, layer: Flat) -> tuple[jax.Array, jax.Array]:
        """See `layers.cached_extremes`."""
        kind = functional.same_layer(self.config, index)
        found = [
            layers.cached_extremes(self.config, kind, layer, jnp.asarray(self.values[rows]))
            for rows in self.batches()
        ]
        keys, values = (jnp.stack(each).max(0) for each in zip(*found, strict=True))
        return keys, values


@jax.jit
def _merged(a: dict[str, InputStats], b: dict[str, InputStats]) -> dict[str, InputStats]:
    return {name: statistics.merge(stats, b[name]) for name, stats in a.items()}
