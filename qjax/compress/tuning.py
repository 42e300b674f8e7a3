"""AutoRound on a decoder layer: its weights are learned together, from what the layer gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.compress import grid as grids
from qjax.compress import layers
from qjax.compress.algorithms import autoround
from qjax.compress.algorithms.autoround import Learned, Moments, Start
from qjax.compress.grid import Grid
from qjax.compress.hidden import Hidden
from qjax.compress.layers import Flat
from qjax.compress.modifiers import AutoRoundModifier
from qjax.engine.exact_jit import exact_jit
from qjax.models import functional
from qjax.models.config import ModelConfig
from qjax.qarray import QArray

_AT_ONCE = 10  # steps of one dispatch
_JUDGED = 32  # samples that tell whether the end is better than the start

Kinds = tuple[tuple[str, Grid], ...]  # of the weights that are learned, by the names in a `Flat`


def tuned(
    layer: Flat,
    start: Mapping[str, QArray],
    kinds: Mapping[str, Grid],
    hidden: Hidden,
    index: int,
    modifier: AutoRoundModifier,
) -> dict[str, QArray]:
    """Weights with which a layer's outputs are nearer to those of its float weights, on the inputs
    that the quantized layers before it give.

    Args:
      layer: float weights.
      start: by name below the layer, weights to start from: integers, canonical.
      kinds: the grid of each.
      hidden: the layer's inputs.
      index: of the layer.

    Returns:
      Like start; these themselves where nothing better was found.
    """
    config, kind = hidden.config, functional.same_layer(hidden.config, index)
    names = tuple((f"{name}.weight", kinds[name]) for name in sorted(start))
    starts, first = {}, {}
    for (key, grid), name in zip(names, sorted(start), strict=True):
        codes, scales = grids.decoded(start[name])
        starts[key], first[key] = _start(layer[key], jnp.asarray(codes), scales, grid)
    learned, moments = first, autoround.no_moments(first)
    size = modifier.lr or 1 / modifier.iters
    setting = (config, kind, names, layer, starts)
    targets = hidden.outputs(index, layer)
    for number, rows in _batches(len(targets), modifier, index):
        x, y = hidden.values[rows], targets[rows]
        steps = jnp.int32([number, min(number + len(x), modifier.iters), modifier.iters])
        learned, moments = _steps(*setting, learned, moments, x, y, steps, jnp.float32(size))
    losses = [0.0, 0.0]
    for rows in _parts(min(len(targets), _JUDGED), modifier.batch_size):
        x, y = hidden.values[rows], targets[rows]
        for i, each in enumerate((first, learned)):
            losses[i] += float(_loss(*setting, each, x, y)) * len(x)
    if not losses[1] < losses[0]:
        return dict(start)
    found = {}
    for (key, grid), name in zip(names, sorted(start), strict=True):
        codes, scales = _end(starts[key], learned[key], grid)
        old = start[name]
        found[name] = grids.encoded(codes, scales, grid, act=old.act, aux=old.aux)
    return found


def _batches(
    count: int, modifier: AutoRoundModifier, seed: int
) -> Iterator[tuple[int, np.ndarray]]:
    """The samples of some steps, [steps, batch], and the number of the first; all samples in random
    order, again and again."""
    random, size = np.random.default_rng(seed), min(modifier.batch_size, count)
    steps = min(_AT_ONCE, modifier.iters)
    rows = np.zeros(0, np.int64)
    for number in range(0, modifier.iters, steps):
        while len(rows) < steps * size:
            rows = np.append(rows, random.permutation(count))
        yield number, rows[: steps * size].reshape(steps, size)
        rows = rows[steps * size :]


def _parts(count: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, count)) for first in range(0, count, size))


def _each(function: Any, *arguments: Any) -> Any:
    """Of a weight, or of each expert's."""
    experts = arguments[0].points if isinstance(arguments[0], Start) else arguments[0]
    return (jax.vmap(function) if experts.ndim == 3 else function)(*arguments)


@partial(jax.jit, static_argnames="grid")
def _start(w: jax.Array, codes: jax.Array, scales: Any, grid: Grid) -> tuple[Start, Learned]:
    return _each(partial(autoround.start, grid=grid), w, codes, scales)


@partial(jax.jit, static_argnames="grid")
def _end(start: Start, learned: Learned, grid: Grid) -> Any:
    return _each(partial(autoround.rounded, grid=grid), start, learned)


def _error(
    config: ModelConfig,
    kind: int,
    names: Kinds,
    layer: Flat,
    starts: dict[str, Start],
    learned: dict[str, Learned],
    x: jax.Array,
    y: jax.Array,
) -> jax.Array:
    """The mean squared error of a layer's outputs."""
    now = {
        key: _each(partial(autoround.dense, grid=grid), starts[key], learned[key])
        for key, grid in names
    }
    return jnp.mean(jnp.square(layers.run_uncached(config, kind, layer | now, x) - y))


_loss = exact_jit(static_argnames=("config", "kind", "names"))(_error)


@exact_jit(static_argnames=("config", "kind", "names"))
def _steps(
    config: ModelConfig,
    kind: int,
    names: Kinds,
    layer: Flat,
    starts: dict[str, Start],
    learned: dict[str, Learned],
    moments: Moments,
    x: jax.Array,
    y: jax.Array,
    steps: jax.Array,
    size: jax.Array,
) -> tuple[dict[str, Learned], Moments]:
    """Steps `steps[0]` to `steps[1]` of `steps[2]` on inputs x and targets y [steps, S, T, E]."""
    gradient = jax.grad(_error, argnums=5)

    def one(number: jax.Array, state: Any) -> Any:
        learned, moments = state
        at = number - steps[0]
        slope = gradient(config, kind, names, layer, starts, learned, x[at], y[at])
        left = size * (1 - number / steps[2])
        return autoround.step(learned, slope, moments, number, left)

    return lax.fori_loop(steps[0], steps[1], one, (learned, moments))
