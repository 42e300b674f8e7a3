"""`target_bits`: the bits of each layer, by what fewer of them would do to the model.

The layers are gone through once, unquantized. What rounding to each number of bits adds to the
energy of a decoder layer's outputs, as a share of that, is what a choice costs: errors of all
layers meet in one residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.compress import bits, layers
from qjax.compress.bits import Option
from qjax.compress.grid import Grid
from qjax.compress.hidden import Hidden
from qjax.compress.modifiers import QuantizationMixin
from qjax.compress.rotation import Folded
from qjax.compress.rounding import grid_of
from qjax.compress.steps import Layer, Step
from qjax.errors import RecipeError, UnsupportedError
from qjax.params import Params
from qjax.scheme import QuantizationScheme

CHOICES = (2, 3, 4, 5, 6, 8)  # bits
_SAMPLES = 32  # more tell little more


def within_budget(
    steps: Sequence[Step],
    params: Params,
    tokens: np.ndarray | None,
    rotations: Folded | None,
    scale_dtype: str,
    progress: bool,
) -> tuple[Step, ...]:
    """The steps, those with `target_bits` with bits chosen for each layer.

    Raises:
      UnsupportedError: weights that are not integers, or fewer bits than the smallest take.
    """
    return tuple(
        _chosen(step, params, tokens, rotations, scale_dtype, progress)
        if getattr(step.modifier, "target_bits", None) is not None
        else step
        for step in steps
    )


def _chosen(
    step: Step,
    params: Params,
    tokens: np.ndarray | None,
    rotations: Folded | None,
    scale_dtype: str,
    progress: bool,
) -> Step:
    modifier = step.modifier
    assert isinstance(modifier, QuantizationMixin)
    assert modifier.target_bits is not None
    assert tokens is not None
    shapes = layers.modules(params.config)
    choices = {
        name: _choices(name, scheme, shapes[name], scale_dtype)
        for name, scheme in step.schemes.items()
    }
    outside = [name for name in choices if ".layers." not in name]
    if outside:
        raise UnsupportedError(
            f"target_bits is shared out among decoder layers, of which {outside[0]} is none: "
            "ignore it, or give it a scheme of its own"
        )
    losses = _losses(choices, params, tokens[:_SAMPLES], rotations, progress)
    counts = {name: int(np.prod(shapes[name])) for name in choices}
    options = {
        name: [
            Option(grid.bits_per_weight(_matrix(shapes[name])) * counts[name], float(loss))
            for grid, loss in zip(grids.values(), losses[name], strict=True)
        ]
        for name, grids in choices.items()
    }
    tied = [group for group in layers.shared_inputs(choices) if len(group) > 1]
    found = bits.allotted(options, counts, modifier.target_bits, tied)
    schemes = {
        name: _with_bits(scheme, list(choices[name])[found[name]])
        for name, scheme in step.schemes.items()
    }
    return replace(step, schemes=schemes)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[-2], shape[-1]


def _choices(
    name: str, scheme: QuantizationScheme, shape: tuple[int, ...], scale_dtype: str
) -> dict[int, Grid]:
    """Bits -> grid, of those whose rows end with a byte."""
    args = scheme.weights
    if args is None or args.type != "int" or scheme.input_activations is not None:
        raise UnsupportedError(
            f"{name}: target_bits chooses among integers of {', '.join(map(str, CHOICES))} bits "
            "with inputs that are not rounded"
        )
    found = {
        count: grid_of(_with_bits(scheme, count), shape, scale_dtype)
        for count in CHOICES
        if shape[-1] * count % 8 == 0
    }
    if not found:
        raise RecipeError(f"{name}: rows of {shape[-1]} codes of no choice of bits end with a byte")
    return found


def _with_bits(scheme: QuantizationScheme, count: int) -> QuantizationScheme:
    assert scheme.weights is not None
    return replace(scheme, weights=replace(scheme.weights, num_bits=count))


def _losses(
    choices: Mapping[str, dict[int, Grid]],
    params: Params,
    tokens: np.ndarray,
    rotations: Folded | None,
    progress: bool,
) -> dict[str, Any]:
    """What each choice adds to the energy of the outputs of its decoder layer, as a share of it."""
    from tqdm import tqdm

    config = params.config
    hidden = Hidden.embedded(params, tokens)
    if rotations is not None:
        hidden.values = rotations.hidden(hidden.values)
    found = {}
    hide = None if progress else True
    for index in tqdm(range(config.num_layers), desc="choosing bits", disable=hide):
        floats = layers.floats_of(layers.stored_layer(params, index))
        if rotations is not None:
            floats = rotations.layer(config, floats)
        weights = hidden.output_weights(index, floats)
        stats = hidden.statistics_on_the_way(index, floats)
        layer = Layer(index, layers.prefix(index), floats, stats)
        # Of the token in the middle: few have outputs so large that they would drown all others.
        energy = float(np.median(np.square(hidden.values).sum(-1)))
        for name in layer.modules:
            stats = layer.stats_of(name)
            if layer.prefix + name not in choices or stats is None:
                continue
            values = floats[f"{name}.weight"]
            rows = weights.get(name, jnp.ones(values.shape[:-1]))
            grids = tuple(choices[layer.prefix + name].values())
            lost = bits.losses(values, stats.moment, grids, rows)
            found[layer.prefix + name] = np.asarray(lost) / energy
    return found
