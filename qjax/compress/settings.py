"""What the settings of modifiers may be, and schemes from the ways in which recipes tell them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qjax.compress.presets import is_preset, preset
from qjax.errors import CheckpointError, RecipeError, UnsupportedError, nearest
from qjax.formats.base import Keys
from qjax.formats.compressed_tensors import read_args, read_scheme
from qjax.scheme import OBSERVERS, QuantizationArgs, QuantizationScheme

_SCHEME_KEYS = {"weights", "input_activations", "output_activations", "format"}
_TRANSFORMS = ("hadamard", "random-hadamard", "random-matrix")


@dataclass(frozen=True)
class AWQMapping:
    """A layer whose output is the input of others, and can take a scale from them.

    Attributes:
      smooth_layer: its name or pattern.
      balance_layers: those of the others.
      activation_hook_target: changes nothing here.
    """

    smooth_layer: str
    balance_layers: tuple[str, ...]
    activation_hook_target: str | None = None


def number(modifier: Any, name: str) -> float:
    value = getattr(modifier, name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecipeError(f"{name} {value!r:.80} is no number")
    return value


def names(modifier: Any, name: str) -> tuple[str, ...]:
    """One name or several; none for null."""
    value = getattr(modifier, name)
    found = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(found, Sequence) or not all(isinstance(each, str) for each in found):
        raise RecipeError(f"{name} {value!r:.80} is no list of names")
    return tuple(found)


def layer_mappings(value: Any) -> tuple[AWQMapping, ...] | None:
    """From objects, from dicts, or from pairs of layers and the layer before them."""
    if value is None:
        return None
    return tuple(map(_mapping, value))


def _mapping(value: Any) -> AWQMapping:
    if isinstance(value, AWQMapping):
        first, others = value.smooth_layer, value.balance_layers
    elif isinstance(value, Mapping) and {"smooth_layer", "balance_layers"} <= value.keys():
        first, others = value["smooth_layer"], value["balance_layers"]
    elif isinstance(value, Sequence) and len(value) == 2:
        others, first = value
    else:
        first, others = None, ()
    others = (others,) if isinstance(others, str) else tuple(others)
    if not isinstance(first, str) or not others or not all(isinstance(o, str) for o in others):
        raise RecipeError(
            f"mappings: {value!r:.120} is neither {{smooth_layer, balance_layers}} nor "
            "[[layers], the layer before them]"
        )
    return AWQMapping(first, others)


def schemes_of(scheme: Any, groups: Any, targets: tuple[str, ...]) -> list[QuantizationScheme]:
    """The schemes of a modifier from its `scheme`, `config_groups` and `targets`."""
    if isinstance(scheme, str):
        return [preset(scheme, targets)]
    if isinstance(scheme, QuantizationScheme):
        return [replace(scheme, targets=scheme.targets or targets)]
    if scheme is not None and not isinstance(scheme, Mapping):
        raise RecipeError(f"scheme {scheme!r:.80} is neither a name nor a dict")
    if scheme and not any(map(_is_name, scheme)):
        fields = {"targets": list(targets), **scheme}
        return [_read(lambda: read_scheme(Keys(fields, "scheme")))]
    if scheme:
        return [
            preset(name, (names,) if isinstance(names, str) else tuple(names))
            for name, names in scheme.items()
        ]
    if groups is None:
        return []
    if not isinstance(groups, Mapping):
        raise RecipeError(f"config_groups {groups!r:.80} is no dict of groups")
    return [_group(name, group) for name, group in groups.items()]


def _is_name(key: Any) -> bool:
    """Whether a key of `scheme` names a preset, or rather a field."""
    return is_preset(str(key)) or key not in _SCHEME_KEYS


def _group(name: str, group: Any) -> QuantizationScheme:
    if isinstance(group, QuantizationScheme):
        return group
    where = f"config_groups.{name}"
    if not isinstance(group, Mapping):
        raise RecipeError(f"{where}: {group!r:.80} is neither a dict nor a QuantizationScheme")
    return _read(lambda: read_scheme(Keys(_plain(group), where)))


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group whose arguments may be objects, as a dict of dicts."""
    fields = {
        name: vars(value) | {"observer_kwargs": dict(value.observer_kwargs)}
        if isinstance(value, QuantizationArgs)
        else value
        for name, value in group.items()
    }
    if isinstance(fields.get("targets"), str | tuple):
        targets = fields["targets"]
        fields["targets"] = [targets] if isinstance(targets, str) else list(targets)
    return fields


def _read(read: Callable[[], Any]) -> Any:
    """What a reader of checkpoints' configs gives; its complaint as one of ours."""
    try:
        return read()
    except CheckpointError as error:
        raise RecipeError(str(error)) from error


def cache_scheme(value: Any) -> QuantizationArgs | None:
    if value is not None and not isinstance(value, QuantizationArgs):
        if not isinstance(value, Mapping):
            raise RecipeError(f"kv_cache_scheme {value!r:.80} is no dict of settings")
        keys = Keys({"kv_cache_scheme": value}, "recipe")
        value = _read(lambda: read_args(keys, "kv_cache_scheme"))
    if value is None:
        return None
    if not (value.type == "float" and value.num_bits == 8 and value.symmetric):
        raise UnsupportedError(
            f"kv_cache_scheme: {value.type} of {value.num_bits} bits: scales of a cache are found "
            "for symmetric floats of 8 bits"
        )
    if value.strategy != "tensor" or value.dynamic:
        raise UnsupportedError(
            f"kv_cache_scheme: strategy {value.strategy!r}, dynamic {value.dynamic}: a layer's "
            "keys have one scale, and so have its values"
        )
    return value


def observers_of(told: tuple[Any, Any, Any], several: Any) -> tuple[str | None, str | None]:
    """Those of weights and of inputs that all groups get.

    Args:
      told: of weights, inputs and outputs, each by a field of its own.
      several: the same as a dict.
    """
    if several is not None:
        if any(name is not None for name in told):
            raise RecipeError("observer and weight_observer, input_observer exclude each other")
        keys = {"weights", "input", "output"}
        if not isinstance(several, Mapping) or set(several) - keys:
            raise RecipeError(f"observer {several!r:.80} has other keys than {keys}")
        told = (several.get("weights"), several.get("input"), several.get("output"))
    for name in told:
        if name is not None and name not in OBSERVERS:
            raise RecipeError(
                f"observer {name!r:.80} is none of {', '.join(OBSERVERS)}"
                f"{nearest(str(name), OBSERVERS)}"
            )
    if told[2] is not None:
        raise UnsupportedError("output_observer: outputs of layers are not quantized")
    return told[0], told[1]


def with_observers(
    scheme: QuantizationScheme, weights: str | None, inputs: str | None
) -> QuantizationScheme:
    if weights is not None and scheme.weights is not None:
        scheme = replace(scheme, weights=replace(scheme.weights, observer=weights))
    if inputs is not None and scheme.input_activations is not None:
        args = replace(scheme.input_activations, observer=inputs)
        scheme = replace(scheme, input_activations=args)
    return scheme


def observes_inputs(scheme: QuantizationScheme) -> bool:
    """Whether settings of a scheme come from the inputs of its layers."""
    weights, inputs = scheme.weights, scheme.input_activations
    importance = weights is not None and "imatrix" in (weights.observer or "")
    return importance or (inputs is not None and inputs.dynamic is not True)


def check_scheme(scheme: QuantizationScheme) -> None:
    names = ", ".join(scheme.targets)
    if not scheme.targets:
        raise RecipeError("a group has no targets")
    if scheme.format is not None:
        raise UnsupportedError(
            f"format of {names}: how a group is stored follows from what it is; leave it out"
        )
    for name in ("weights", "input_activations"):
        args = getattr(scheme, name)
        wrong = args and args.contradiction(inputs=name != "weights")
        if wrong:
            raise RecipeError(f"{name} of {names}: {wrong}")
    if scheme.weights is None and scheme.input_activations is not None:
        raise UnsupportedError(
            f"input_activations of {names} without weights: attention's own inputs stay as they "
            "are; for keys and values there is kv_cache_scheme"
        )


def check_transform(modifier: Any) -> None:
    if modifier.transform_type not in _TRANSFORMS:
        raise RecipeError(
            f"transform_type {modifier.transform_type!r:.80} is none of {', '.join(_TRANSFORMS)}"
        )
    if modifier.transform_type == "random-matrix":
        raise UnsupportedError("transform_type random-matrix: only Hadamard matrices are fast")
    size = modifier.transform_block_size
    if size is not None and (not isinstance(size, int) or size < 2 or size & (size - 1)):
        raise RecipeError(f"transform_block_size must be a power of two, got {size!r:.80}")
    for name in ("randomize", "learnable", "transform_config", "mappings", "norm_mappings"):
        if getattr(modifier, name, None):
            raise UnsupportedError(f"{name} is not supported: leave it out")
