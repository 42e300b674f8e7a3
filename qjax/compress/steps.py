"""What each modifier of a recipe does to one layer of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from qjax.compress import mappings, statistics
from qjax.compress.algorithms import awq, ggml, smoothquant
from qjax.compress.algorithms.gptq import relative_error
from qjax.compress.assignment import assign_all
from qjax.compress.gguf_mixes import mix_types
from qjax.compress.hidden import Hidden
from qjax.compress.layers import LAYERS, Flat, dense, modules, shared_inputs
from qjax.compress.modifiers import (
    AutoRoundModifier,
    AWQModifier,
    Modifier,
    QuantizationMixin,
    QuantizationModifier,
    SmoothQuantModifier,
    SpinQuantModifier,
)
from qjax.compress.rounding import METHODS, Weight, grid_of, quantized
from qjax.compress.statistics import InputStats
from qjax.compress.threads import side_by_side
from qjax.compress.tuning import tuned
from qjax.errors import CalibrationError, UnsupportedError
from qjax.models.config import ModelConfig
from qjax.models.functional import parameter_shapes
from qjax.qarray import QArray
from qjax.scheme import QuantizationScheme, is_ignored


@dataclass
class Layer:
    """A decoder layer, or a table beside the layers, while it is quantized.

    Attributes:
      index: its number; None for the embedding and the head.
      prefix: what the names of its modules begin with.
      floats: its parameters, float32; of weights that were rounded, what is left of them.
      stats: of the inputs of its modules; None where no samples run through the model.
      weights: what was rounded, by module.
      errors: for each of these the share of its outputs' energy that is lost (of the weight's
        itself without samples).
    """

    index: int | None
    prefix: str
    floats: Flat
    stats: dict[str, InputStats] | None = None
    weights: dict[str, QArray] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def stats_of(self, module: str) -> InputStats | None:
        """Those of a module; of modules that share their inputs, the first has them."""
        if self.stats is None:
            return None
        group = next(g for g in shared_inputs(self.modules) if module in g)
        return self.stats.get(group[0])

    @property
    def modules(self) -> list[str]:
        return [
            name.removesuffix(".weight")
            for name, value in self.floats.items()
            if name.endswith(".weight") and value.ndim > 1
        ]


@dataclass(frozen=True)
class Step:
    """A modifier with what it does to which modules of this model, by their full names.

    Attributes:
      types: of GGUF.
      squares: the mean square of each input, float32 [K] or [experts, K], where no samples tell.
    """

    modifier: Modifier
    schemes: Mapping[str, QuantizationScheme]
    types: Mapping[str, str]
    squares: Mapping[str, np.ndarray] = field(default_factory=dict)


# Modifiers that `apply` carries out, beside those with a method of rounding; a recipe with another
# must not pass for done.
CARRIED_OUT = (
    QuantizationModifier,
    AWQModifier,
    SmoothQuantModifier,
    SpinQuantModifier,  # before, see `rotation`
)


def plan(
    modifiers: tuple[Modifier, ...],
    config: ModelConfig,
    squares: Mapping[str, np.ndarray] | None = None,
) -> tuple[Step, ...]:
    """The steps of a recipe for a model.

    Args:
      squares: see `Step`.

    Raises:
      RecipeError: a modifier does not fit the model, or its settings contradict each other.
      UnsupportedError: a combination that qjax does not do.
    """
    for modifier in modifiers:
        if type(modifier) not in (*CARRIED_OUT, *METHODS):
            raise UnsupportedError(f"{type(modifier).__name__} is read, but not carried out")
    others = [name.rpartition(".")[0] for name in parameter_shapes(config)]
    claims = assign_all(modifiers, modules(config), others)
    weighed = bool(squares)
    for modifier, schemes in zip(modifiers, claims, strict=True):
        if isinstance(modifier, AutoRoundModifier):
            _check_learnable(schemes)
    return tuple(
        Step(
            each,
            schemes,
            _ggml_types(schemes, config, weighed or each.requires_calibration_data),
            squares or {},
        )
        for each, schemes in zip(modifiers, claims, strict=True)
    )


def _check_learnable(schemes: Mapping[str, QuantizationScheme]) -> None:
    """That AutoRound can learn all weights."""
    for name, scheme in schemes.items():
        weights, reason = scheme.weights, None
        if not name.startswith(LAYERS):
            reason = "not in a decoder layer, whose outputs tell what is better: ignore it"
        elif scheme.ggml is not None:
            reason = f"{scheme.ggml} is chosen by GGUF's own search: use QuantizationModifier"
        elif scheme.input_activations is not None:
            reason = "its inputs are rounded, too: use GPTQModifier"
        elif weights is None or weights.type != "int":
            reason = "only integers are learned: use QuantizationModifier"
        if reason is not None:
            raise UnsupportedError(f"AutoRoundModifier, {name}: {reason}")


def _ggml_types(
    schemes: Mapping[str, QuantizationScheme], config: ModelConfig, importance: bool
) -> dict[str, str]:
    mixes = sorted({s.ggml for s in schemes.values() if s.ggml is not None})
    if not mixes:
        return {}
    shapes = modules(config)
    found: dict[str, str] = {}
    for mix in mixes:
        types = mix_types(mix, config, shapes, importance=importance)
        found |= {name: types[name] for name, s in schemes.items() if s.ggml == mix}
    return found


def touches(steps: Sequence[Step], module: str) -> bool:
    """Whether any of them rounds a module."""
    return any(module in step.schemes for step in steps)


def apply(
    layer: Layer,
    steps: Sequence[Step],
    hidden: Hidden | None,
    config: ModelConfig,
    scale_dtype: str,
) -> None:
    """Does all of a recipe to one layer.

    Args:
      hidden: its inputs, where samples run through the model.
      scale_dtype: of the scales of integers.
    """
    for number, step in enumerate(steps):
        if isinstance(step.modifier, SmoothQuantModifier):
            smooth(layer, step.modifier, config)
        elif isinstance(step.modifier, AWQModifier):
            later = {k: v for other in steps[number + 1 :] for k, v in other.schemes.items()}
            counts = {} if hidden is None else hidden.output_weights(layer.index or 0, layer.floats)
            balance(layer, step.modifier, later, config, scale_dtype, counts)
        elif isinstance(step.modifier, AutoRoundModifier) and step.modifier.iters:
            learn(layer, step, hidden, scale_dtype)
        elif step.schemes:
            round_layer(layer, step, scale_dtype)


def smooth(layer: Layer, modifier: SmoothQuantModifier, config: ModelConfig) -> None:
    """SmoothQuant: the scale of inputs goes into the weights that they meet."""
    found = mappings.scalings(config, layer.floats)
    if modifier.mappings is None:
        # Those of LLM Compressor: what a norm gives, but not to experts, which differ too much.
        found = tuple(
            scaling
            for scaling in found
            if scaling.is_norm and not any(".experts." in name for name in scaling.balance)
        )
    for scaling in mappings.chosen(found, modifier.mappings, layer.prefix):
        if is_ignored(layer.prefix + scaling.smooth, modifier.ignore):
            continue
        stats = [_needed(layer, name) for name in scaling.balance]
        low, high = (
            scaling.channels(reduce(a.reshape(-1, a.shape[-1]) for a in each))
            for reduce, each in ((_least, [s.low for s in stats]), (_most, [s.high for s in stats]))
        )
        weights = [layer.floats[f"{name}.weight"] for name in scaling.balance]
        largest = scaling.channels(smoothquant.largest_of_columns(weights))
        s = smoothquant.scales(low, high, largest, modifier.smoothing_strength, modifier.algorithm)
        _fold(layer, scaling, s)


def _least(rows: Iterable[jax.Array]) -> jax.Array:
    return jnp.concatenate([*rows]).min(0)


def _most(rows: Iterable[jax.Array]) -> jax.Array:
    return jnp.concatenate([*rows]).max(0)


def balance(
    layer: Layer,
    modifier: AWQModifier,
    schemes: Mapping[str, QuantizationScheme],
    config: ModelConfig,
    scale_dtype: str,
    counts: Mapping[str, jax.Array],
) -> None:
    """AWQ: columns are scaled so that rounding to `schemes` (of whole names) loses least.

    Args:
      counts: what errors in the outputs of modules count, see `sensitivity`.
    """
    found = mappings.scalings(config, layer.floats)
    for scaling in mappings.chosen(found, modifier.mappings, layer.prefix):
        readers, grids, search = [], [], True
        for name in scaling.balance:
            scheme, weight = schemes.get(layer.prefix + name), layer.floats[f"{name}.weight"]
            if scheme is None or scheme.weights is None:
                continue
            readers.append(awq.Reader(weight, _needed(layer, name).moment, counts.get(name)))
            grids.append(grid_of(scheme, weight.shape, scale_dtype))
            search &= "minmax" not in (scheme.weights.observer or "")
        if readers:
            absmean = _needed(layer, scaling.balance[0]).absmean
            s = awq.best_scale(
                readers,
                absmean,
                grids,
                scaling,
                modifier.duo_scaling,
                modifier.n_grid,
                search=search,
            ).scale
            _fold(layer, scaling, s)


def _needed(layer: Layer, name: str) -> InputStats:
    stats = layer.stats_of(name)
    if stats is None:
        raise CalibrationError(
            f"{layer.prefix}{name}: no samples run through it, but it needs them"
        )
    return stats


def _fold(layer: Layer, scaling: mappings.Scaling, s: jax.Array) -> None:
    """Divides the outputs of a layer by s, in its weight and in what is known of its readers."""
    assert layer.stats is not None
    layer.floats |= mappings.fold(layer.floats, scaling, s)
    groups = {g[0] for g in shared_inputs(layer.modules) if set(g) & set(scaling.balance)}
    for first in groups & layer.stats.keys():
        layer.stats[first] = statistics.scaled(layer.stats[first], 1 / scaling.columns(s))


def learn(layer: Layer, step: Step, hidden: Hidden | None, scale_dtype: str) -> None:
    """AutoRound, of all the weights of a layer that it names."""
    assert isinstance(step.modifier, AutoRoundModifier)
    own = [name for name in layer.modules if layer.prefix + name in step.schemes]
    if not own:
        return
    assert layer.index is not None
    assert hidden is not None
    start: dict[str, QArray] = {}
    for group in shared_inputs(own):
        found = quantized(_weights(layer, step, group), step.modifier, scale_dtype)
        start |= {name.removeprefix(layer.prefix): weight for name, weight in found.items()}
    kinds = {
        name: grid_of(
            step.schemes[layer.prefix + name], layer.floats[f"{name}.weight"].shape, scale_dtype
        )
        for name in own
    }
    better = tuned(layer.floats, start, kinds, hidden, layer.index, step.modifier)
    for name, weight in better.items():
        _finish(layer, name, weight)


def _weights(layer: Layer, step: Step, names: Iterable[str]) -> list[Weight]:
    """Those of some modules, as `quantized` takes them."""
    return [
        Weight(
            layer.prefix + name,
            layer.floats[f"{name}.weight"],
            step.schemes[layer.prefix + name],
            layer.stats_of(name),
        )
        for name in names
    ]


def round_layer(layer: Layer, step: Step, scale_dtype: str) -> None:
    """Rounds the weights that a quantizing modifier names."""
    modifier = step.modifier
    assert isinstance(modifier, QuantizationMixin)
    own = [name for name in layer.modules if layer.prefix + name in step.schemes]

    def of_group(group: tuple[str, ...]) -> dict[str, QArray]:
        blocks = {n: _blocks(layer, n, step) for n in group if layer.prefix + n in step.types}
        rest = _weights(layer, step, (name for name in group if name not in blocks))
        found = quantized(rest, modifier, scale_dtype)
        return blocks | {name.removeprefix(layer.prefix): weight for name, weight in found.items()}

    groups = shared_inputs(own)
    # Without samples layers are side by side already, see `walk`. And programs of several devices
    # must reach each of them in the same order.
    alone = layer.stats is None or jax.local_device_count() > 1
    for found in (map if alone else side_by_side)(of_group, groups):
        for name, weight in found.items():
            _finish(layer, name, weight)


def _blocks(layer: Layer, name: str, step: Step) -> QArray:
    """A weight in blocks of a GGUF type."""
    qtype, importance = step.types[layer.prefix + name], step.squares.get(layer.prefix + name)
    values, stats = np.asarray(layer.floats[f"{name}.weight"]), layer.stats_of(name)
    if stats is not None:
        importance = np.asarray(jnp.diagonal(stats.moment, axis1=-2, axis2=-1))
    if values.ndim == 2:
        raw = ggml.quantize(values, qtype, importance)
    else:
        raw = np.stack(
            [
                ggml.quantize(each, qtype, None if importance is None else importance[expert])
                for expert, each in enumerate(values)
            ]
        )
    return QArray(raw, qtype, (values.shape[-2], values.shape[-1]))


@jax.jit
def _own_error(weight: jax.Array, rounded: jax.Array) -> jax.Array:
    """Of a weight's own energy, the share that rounding loses: float32 []."""
    lost = jnp.sum(jnp.square(weight - rounded))
    return lost / jnp.maximum(jnp.sum(jnp.square(weight)), 1e-30)


def _finish(layer: Layer, name: str, weight: QArray) -> None:
    """Puts a rounded weight in the place of its floats, and notes what was lost."""
    key = f"{name}.weight"
    before, after, stats = layer.floats[key], dense(weight), layer.stats_of(name)
    if stats is None:
        change = _own_error(before, after)
    elif before.ndim == 2:
        change = relative_error(before, after, stats.moment)
    else:
        each = jax.vmap(relative_error)(before, after, stats.moment)
        change = jnp.sum(each * stats.rows) / jnp.maximum(jnp.sum(stats.rows), 1)
    layer.floats[key] = after
    layer.weights[name] = weight
    layer.errors[name] = float(change)
