"""From floats to QArrays: the layers that share their inputs, by the method of a modifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qjax.compress import grid as grids
from qjax.compress.algorithms import hqq
from qjax.compress.algorithms.gptq import BLOCK, Rounded, gptq
from qjax.compress.grid import Grid, Scales
from qjax.compress.modifiers import (
    MODIFIERS,
    AutoRoundModifier,
    GPTQModifier,
    HQQModifier,
    QuantizationMixin,
)
from qjax.compress.scale_search import searched, within_groups
from qjax.compress.statistics import InputStats
from qjax.errors import CalibrationError
from qjax.formats.ct_config import act_spec
from qjax.qarray import QArray
from qjax.scheme import QuantizationArgs, QuantizationScheme

# What GPTQ takes where no modifier says otherwise. Passes over all columns behind it, the sweeps,
# gain little where there are more.
_GPTQ = {"actorder": "weight", "block_size": BLOCK, "dampening": 0.01, "sweeps": 2}
_SMALL_GROUP = 128  # columns; products with larger blocks of the moment take long
# Of the mean of the moment's diagonal, tried where the dampening that was asked for is too little.
_MORE_DAMPENING = (0.05, 0.2, 1.0)


@dataclass(frozen=True)
class Weight:
    """A matrix that is to be rounded.

    Attributes:
      name: of its module.
      values: float32 [N, K], or [E, N, K] of experts.
      scheme: what it becomes.
      stats: of its inputs, or None without samples.
    """

    name: str
    values: jax.Array
    scheme: QuantizationScheme
    stats: InputStats | None

    @property
    def args(self) -> QuantizationArgs:
        assert self.scheme.weights is not None
        return self.scheme.weights


def quantized(
    weights: Sequence[Weight], modifier: QuantizationMixin, scale_dtype: str
) -> dict[str, QArray]:
    """Weights that share their inputs, by name: canonical, on the host.

    Args:
      scale_dtype: of the scales of integers, where the scheme does not tell.

    Raises:
      CalibrationError: statistics are missing, or of no use.
    """
    found: dict[str, QArray] = {}
    for alike in _alike(weights, scale_dtype):
        if alike[0].values.ndim == 2:
            found |= _rounded(alike, modifier, scale_dtype)
            continue
        parts = [
            _rounded([_expert(w, e) for w in alike], modifier, scale_dtype)
            for e in range(len(alike[0].values))
        ]
        found |= {w.name: QArray.stack([part[w.name] for part in parts]) for w in alike}
    return found


def _alike(weights: Sequence[Weight], scale_dtype: str) -> Iterator[list[Weight]]:
    """Those whose rows can be rounded together."""
    left = list(weights)
    while left:
        first = left[0]
        grid = grid_of(first.scheme, first.values.shape, scale_dtype)
        same = [
            w
            for w in left
            if w is first
            or (
                w.args == first.args
                and w.scheme.input_activations == first.scheme.input_activations
                and w.values.ndim == first.values.ndim
                and grid.group[0] == 1
                and w.values.shape[:-2] == first.values.shape[:-2]
            )
        ]
        left = [w for w in left if w not in same]
        yield same


def _expert(weight: Weight, index: int) -> Weight:
    """One of several; one that no sample reached is rounded as if its inputs were all alike."""
    stats = weight.stats
    if stats is not None:
        stats = jax.tree.map(lambda a: a[index], stats)
        unseen = stats.rows == 0
        stats = stats._replace(moment=jnp.where(unseen, jnp.eye(len(stats.moment)), stats.moment))
    return replace(weight, values=weight.values[index], stats=stats)


def grid_of(scheme: QuantizationScheme, shape: tuple[int, ...], scale_dtype: str) -> Grid:
    """What a weight [..., N, K] may become.

    Args:
      scale_dtype: of the scales of integers whose inputs are not integers, too.
    """
    args, inputs = scheme.weights, scheme.input_activations
    assert args is not None
    whole = inputs is not None and inputs.type == "int" and args.strategy != "group"
    dtype = scale_dtype if args.type == "int" and not whole else "float32"
    return Grid.of(args, (shape[-2], shape[-1]), dtype, signed=whole)


def _rounded(
    weights: Sequence[Weight], modifier: QuantizationMixin, scale_dtype: str
) -> dict[str, QArray]:
    first = weights[0]
    grid = grid_of(first.scheme, first.values.shape, scale_dtype)
    values = jnp.concatenate([w.values for w in weights])
    names = ", ".join(w.name for w in weights)
    method = METHODS.get(type(modifier), _nearest)
    found = method(values, first, grid, modifier, names)
    act, aux = _inputs(first)
    if found.order is not None:
        aux["perm"] = np.asarray(found.order, np.int32)[None]
    sizes = np.cumsum([len(w.values) for w in weights])[:-1]
    codes = np.split(np.asarray(found.codes), sizes)
    scales = found.scales

    def scales_of(i: int) -> Scales:
        if len(weights) == 1:  # several have scales for each row, one may have fewer
            return scales
        scale, zero = (None if a is None else np.split(np.asarray(a), sizes)[i] for a in scales[:2])
        return Scales(scale, zero, scales.global_scale)

    each = zip(weights, codes, strict=True)
    return {
        w.name: grids.encoded(part, scales_of(i), grid, act=act, aux=aux)
        for i, (w, part) in enumerate(each)
    }


def _nearest(
    values: jax.Array, like: Weight, grid: Grid, modifier: QuantizationMixin, names: str
) -> Rounded:
    # Where nothing is said, and samples ran through the model, they say what counts.
    default = "memoryless_minmax" if like.stats is None else "imatrix_mse"
    observer = like.args.observer or default
    importance = None
    if "imatrix" in observer:
        importance = _importance(_stats(like, names).moment, grid)
    return _to_nearest(values, importance, grid, search="minmax" not in observer)


def _importance(moment: jax.Array, grid: Grid) -> jax.Array:
    """What errors within small groups do together; of larger ones, each for itself."""
    small = grid.group[0] == 1 and grid.group[1] <= _SMALL_GROUP
    return within_groups(moment, grid) if small else jnp.diag(moment)


@partial(jax.jit, static_argnames=("grid", "search"))
def _to_nearest(
    values: jax.Array, importance: jax.Array | None, grid: Grid, search: bool
) -> Rounded:
    scales = searched(values, grid, importance) if search else grids.minmax(values, grid)
    return with_codes(values, scales, grid)


@partial(jax.jit, static_argnames="grid")
def with_codes(values: jax.Array, scales: Scales, grid: Grid) -> Rounded:
    """Each number of a weight [N, K] as the nearest that these scales have."""
    n, k = values.shape
    each = grids.spread(scales, grid, (n, k))
    return Rounded(grids.nearest(values, each.scale, each.zero, grid), scales)


def _gptq(
    values: jax.Array, like: Weight, grid: Grid, modifier: QuantizationMixin, names: str
) -> Rounded:
    assert isinstance(modifier, GPTQModifier)
    order = like.args.actorder
    settings = {
        "actorder": "weight" if order == "aware" else order,
        "block_size": modifier.block_size,
        "dampening": modifier.dampening_frac,
    }
    return _by_gptq(values, _stats(like, names).moment, grid, names, settings)


def _by_gptq(
    values: jax.Array, moment: jax.Array, grid: Grid, names: str, settings: Mapping[str, Any]
) -> Rounded:
    values, moment = _over_devices(values, moment)
    settings = {**_GPTQ, **settings}  # all of them each time: whoever asks shares the program
    for dampening in (settings["dampening"], *_MORE_DAMPENING):
        found = gptq(values, moment, grid, **{**settings, "dampening": dampening})
        if np.isfinite(np.asarray(found.codes)).all():
            return found
    raise CalibrationError(
        f"{names}: the second moment of its inputs cannot be inverted; take more samples, or a "
        "larger dampening_frac"
    )


def _over_devices(values: jax.Array, moment: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A weight with its rows shared out among devices, which then round them side by side."""
    count = jax.local_device_count()
    if count == 1 or len(values) % count:
        return values, moment
    mesh = jax.make_mesh(
        (count,), ("rows",), axis_types=(AxisType.Auto,), devices=jax.local_devices()
    )
    return (
        jax.device_put(values, NamedSharding(mesh, PartitionSpec("rows"))),
        jax.device_put(moment, NamedSharding(mesh, PartitionSpec())),
    )


def _before_autoround(
    values: jax.Array, like: Weight, grid: Grid, modifier: QuantizationMixin, names: str
) -> Rounded:
    """What AutoRound starts from; without steps, all that it does."""
    assert isinstance(modifier, AutoRoundModifier)
    if modifier.iters:
        return _by_gptq(values, _stats(like, names).moment, grid, names, {})
    search = not modifier.disable_opt_rtn
    importance = _importance(_stats(like, names).moment, grid) if search else None
    return _to_nearest(values, importance, grid, search)


def _hqq(
    values: jax.Array, like: Weight, grid: Grid, modifier: QuantizationMixin, names: str
) -> Rounded:
    assert isinstance(modifier, HQQModifier)
    found = _by_hqq(values, grid, modifier.iters, modifier.lp_norm, modifier.beta, modifier.kappa)
    return with_codes(values, found, grid)


_by_hqq = jax.jit(hqq.optimized, static_argnums=(1, 2, 3, 4, 5))

Method = Callable[[jax.Array, Weight, Grid, Any, str], Rounded]
Kind = TypeVar("Kind", bound=type[QuantizationMixin])

# How the weights of a modifier are rounded, where that is not to the nearest.
METHODS: dict[type, Method] = {
    GPTQModifier: _gptq,
    AutoRoundModifier: _before_autoround,
    HQQModifier: _hqq,
}


def register_modifier(method: Method) -> Callable[[Kind], Kind]:
    """Class decorator: recipes may name this modifier, whose weights are rounded by a method.

    Args:
      method: gets weights that share their inputs and their scheme, float32 [N, K], one below the
        other; the first of them, for its scheme and `stats`; their grid; the modifier; and their
        names, for messages. It gives what they became.

    A class that is defined again (a cell of a notebook run twice) takes its own place.

    Raises:
      TypeError: the class is not derived from `QuantizationMixin`.
      ValueError: another modifier has its name.
    """

    def register(kind: Kind) -> Kind:
        name = kind.__name__
        if not issubclass(kind, QuantizationMixin):
            raise TypeError(f"{name} must derive from QuantizationMixin")
        if MODIFIERS.get(name, kind).__module__ != kind.__module__:
            raise ValueError(f"the modifier {name!r} is taken")
        MODIFIERS[name] = kind
        METHODS[kind] = method
        return kind

    return register


def _stats(weight: Weight, names: str) -> InputStats:
    if weight.stats is None:
        raise CalibrationError(f"{names}: no samples run through it, but its method needs them")
    return weight.stats


def _inputs(weight: Weight) -> tuple[Any, dict[str, np.ndarray]]:
    """What inputs are rounded to, and the scales of those whose scales are fixed.

    Formulas: `calculate_qparams` and `generate_gparam` of compressed-tensors.
    """
    args = weight.scheme.input_activations
    if args is None:
        return None, {}
    act = act_spec(args)
    if act.dynamic and act.scale != "fp8_e4m3":
        return act, {}
    stats = _stats(weight, weight.name)
    # (By numpy: so little is no work for a program of its own.)
    low, high = float(np.asarray(stats.low).min()), float(np.asarray(stats.high).max())
    return act, grids.input_scales(act, low, high)
