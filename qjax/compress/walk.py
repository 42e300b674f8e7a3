"""The walk through a model: each layer in turn is looked at, quantized, and run once more, so that
the next one is made for the inputs that it will have.

One layer is held in floats, and the inputs of one layer for all samples. Where a `State` keeps what
is finished, a walk that was stopped goes on from the layer where it stopped. Without samples no
layer waits for another, and two are done side by side.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.inputs import FLOATS
from qjax.checkpoint.places import leaf_of
from qjax.compress import layers
from qjax.compress.hidden import Hidden
from qjax.compress.layers import Flat
from qjax.compress.rotation import Folded
from qjax.compress.state import Finished, State
from qjax.compress.steps import Layer, Step, apply, touches
from qjax.compress.threads import side_by_side
from qjax.errors import CalibrationError
from qjax.params import Params
from qjax.qarray import QArray


def walk(
    params: Params,
    steps: Sequence[Step],
    tokens: np.ndarray | None,
    *,
    scale_dtype: str,
    cache_scales: bool = False,
    state: State | None = None,
    rotations: Folded | None = None,
    as_it_is: bool = False,
) -> Generator[Finished, None, None]:
    """Goes through the layers of a model, then to its embedding and head.

    Args:
      params: the model; it stays as it is.
      steps: of the recipe, see `steps.plan`.
      tokens: samples int32 [S, T], or None where no layer is to be looked at.
      scale_dtype: of the scales of integers.
      cache_scales: whether each layer gets scales of its keys and values, for 8-bit floats.
      state: where finished layers are kept.
      rotations: that are folded into all weights first.
      as_it_is: each layer is looked at with the inputs that it has in the model as it is, not with
        those that rounded ones before it give, which takes another run. Not with `cache_scales`,
        nor with steps that run the layer again.

    Yields:
      Each layer's parameters: QArrays (canonical, on the host), those that nothing changed as they
      were, and float arrays.

    Raises:
      CalibrationError: numbers that are not finite come out of a layer, or a method cannot work
        with what it sees.
    """
    count = params.config.num_layers
    if tokens is None:

        def alone(index: int) -> Finished:
            layer, stored, before = _held(params, index, rotations)
            apply(layer, steps, None, params.config, scale_dtype)
            return Finished(index, _tree(layer, stored, before), layer.errors)

        yield from side_by_side(alone, range(count))
    else:
        yield from _looked_at(
            params, steps, tokens, scale_dtype, cache_scales, state, rotations, as_it_is
        )
    ends = {} if rotations is None else rotations.ends(params)
    if ends:
        yield Finished(None, ends, {})
    for name in (layers.EMBEDDING, layers.HEAD):
        if touches(steps, name):
            key = f"{name}.weight"
            stored = {key: ends[key] if key in ends else leaf_of(params, key)}
            layer = Layer(None, "", layers.floats_of(stored))
            apply(layer, steps, None, params.config, scale_dtype)
            yield Finished(None, _tree(layer, stored, {}), layer.errors)


def _looked_at(
    params: Params,
    steps: Sequence[Step],
    tokens: np.ndarray,
    scale_dtype: str,
    cache_scales: bool,
    state: State | None,
    rotations: Folded | None,
    as_it_is: bool,
) -> Iterator[Finished]:
    """The layers, each for the inputs that the ones before it give: finished, or `as_it_is`."""
    count = params.config.num_layers
    start = state.done(count) if state is not None else 0
    if start and state is not None:
        hidden = Hidden(params, state.hidden(start))
        yield from map(state.layer, range(start))
    else:
        hidden = Hidden.embedded(params, tokens)
        if rotations is not None:
            hidden.values = rotations.hidden(hidden.values)
    keeping: Future[None] | None = None
    with ThreadPoolExecutor(1, "qjax-keep") as disk:  # writes while the next layer is looked at
        for index in range(start, count):
            layer, stored, before = _held(params, index, rotations)
            if as_it_is:
                _wait(keeping)
                layer.stats = hidden.statistics_on_the_way(index, layer.floats)
            else:
                layer.stats = hidden.statistics(index, layer.floats)
            _check_finite(layer)
            apply(layer, steps, hidden, params.config, scale_dtype)
            tree = _tree(layer, stored, before)
            running = {key: _running(layer, key) for key in layer.floats}
            if cache_scales:
                tree |= _cache_scales(layer, hidden.cached_extremes(index, running))
            if index < count - 1 and not as_it_is:  # nothing reads what the last layer gives
                _wait(keeping)
                hidden.advance(index, running)
            done = Finished(index, tree, layer.errors)
            if state is not None:
                keeping = disk.submit(state.keep, done, hidden.values)
            yield done
        _wait(keeping)


def _wait(keeping: Future[None] | None) -> None:
    """Until the hidden states are written, which change next."""
    if keeping is not None:
        keeping.result()


def _held(params: Params, index: int, rotations: Folded | None) -> tuple[Layer, Flat, Flat]:
    """A layer in floats; its parameters as they are stored; and its floats before rotations."""
    stored = layers.stored_layer(params, index)
    layer = Layer(index, layers.prefix(index), layers.floats_of(stored))
    before = dict(layer.floats)
    if rotations is not None:
        layer.floats = rotations.layer(params.config, layer.floats)
    return layer, stored, before


def check(params: Params, sample: np.ndarray) -> None:
    """Runs one sample, int32 [T], through all layers: what is broken is told before the work.

    Raises:
      CalibrationError: numbers that are not finite come out of a layer.
    """
    hidden = Hidden.embedded(params, sample[None])
    for index in range(params.config.num_layers):
        hidden.advance(index, layers.floats_of(layers.stored_layer(params, index)))
        if not np.isfinite(hidden.values).all():
            raise CalibrationError(
                f"{layers.prefix(index)[:-1]}: its outputs are not finite (NaN or infinity) for "
                "the first sample; check the model's weights, or take a method without samples"
            )


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def _check_finite(layer: Layer) -> None:
    assert layer.stats is not None
    for name, stats in layer.stats.items():
        if not _all_finite(stats.moment):
            raise CalibrationError(
                f"{layer.prefix}{name}: its inputs are not finite (NaN or infinity) for these "
                "samples; check the model's weights, or take a method that needs no samples"
            )


def _tree(layer: Layer, stored: Flat, before: Flat) -> Flat:
    """A layer's parameters as they will run, by their full names."""
    tree = {}
    for key, values in layer.floats.items():
        name = key.removesuffix(".weight")
        if name in layer.weights:
            leaf = layer.weights[name]
        elif values is before.get(key):
            leaf = stored[key]
        elif isinstance(stored[key], QArray):
            leaf = QArray.from_dense(np.asarray(values))
        else:
            leaf = np.asarray(values)
        tree[layer.prefix + key] = leaf
    return tree


def _running(layer: Layer, key: str) -> Any:
    """A parameter for the run behind quantization: floats, with what happens to their inputs."""
    values, weight = layer.floats[key], layer.weights.get(key.removesuffix(".weight"))
    if weight is None or weight.act is None or values.ndim > 2:
        return values
    kept = {k: a for k, a in weight.aux.items() if k.startswith("act_")}
    return replace(QArray.from_dense(np.asarray(values)), act=weight.act, aux=kept)


def _cache_scales(layer: Layer, extremes: tuple[jax.Array, jax.Array]) -> Flat:
    """Scales with which the largest number is the largest of float8_e4m3: float32 [1] each."""
    return {
        f"{layer.prefix}self_attn.{name}_scale": np.asarray(
            jnp.maximum(largest.max(), 1e-12) / FLOATS["fp8_e4m3"].top
        )[None]
        for name, largest in zip("kv", extremes, strict=True)
    }
