"""`dynamic` of GPTQModel: settings of single layers, by regular expressions of their names.

A pattern that begins with "-:" leaves layers unquantized; any other, with or without "+:", changes
their settings. The first one that matches the beginning of a name counts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from pallas_kernels import codes
from qjax.errors import UnsupportedError
from qjax.formats import weights
from qjax.formats.base import Keys, is_embedding, is_plain
from qjax.formats.history import CALIBRATION
from qjax.qarray import QArray
from qjax.scheme import targets_of


class LayerSettings(NamedTuple):
    """What differs between layers; `sym`: without zero points; `desc_act`: columns are sorted."""

    bits: int
    group_size: int
    sym: bool
    desc_act: bool


Dynamic = tuple[tuple[re.Pattern[str], LayerSettings | None], ...]
"""Patterns with the settings of layers that they match, None for unquantized ones."""


def read(keys: Keys, default: LayerSettings) -> Dynamic:
    """The section `dynamic` of a config.

    Args:
      default: what an entry does not set.

    Raises:
      CheckpointError: a pattern or a value is wrong.
      UnsupportedError: an unknown key, or bits that are not supported.
    """
    section = keys.section("dynamic")
    return tuple(
        (_compiled(section, pattern), _override(section.section(pattern), pattern, default))
        for pattern in section.values
    )


def find(dynamic: Dynamic, module: str, default: LayerSettings) -> LayerSettings | None:
    """The settings of a layer, or None for one that is left unquantized."""
    return next((own for pattern, own in dynamic if pattern.match(module)), default)


def settings_for(
    name: str, weights: Mapping[str, QArray], kv_scales: int
) -> dict[str, LayerSettings]:
    """The settings of each quantized layer of a model, group_size in columns.

    Args:
      name: of the format, for messages.

    Raises:
      UnsupportedError: a weight is no integers in groups of columns, with nothing beside.
    """
    if kv_scales:
        raise UnsupportedError(
            f"{name} checkpoints say nothing of the key-value cache, but this model has scales of "
            "its own; compressed-tensors holds them"
        )
    found = {}
    for module, weight in weights.items():
        if is_plain(weight):
            continue
        code, group = codes.CODES.get(weight.qtype), weight.group or (0, 0)
        if code is None or code.kind != "uint" or group[0] != 1 or is_embedding(module):
            what = "embedding" if is_embedding(module) else "layer"
            raise UnsupportedError(
                f"{module}: {name} has no layout for the {what} of {weight.qtype} in groups of "
                f"{weight.group}"
            )
        odd = sorted(weight.aux.keys() - {"perm"})
        zero = weight.zero_point
        floats = weight.additive or (zero is not None and np.dtype(zero.dtype).kind not in "iu")
        if odd or weight.act or floats or any(weight.hadamard):
            what = "rounded inputs" if weight.act else odd[0] if odd else "float zero points"
            raise UnsupportedError(f"{module}: {name} has no layout for weights with {what}")
        sym, sorted_ = weight.zero_point is None, "perm" in weight.aux
        found[module] = LayerSettings(code.bits, group[1], sym, sorted_)
    if not found:
        raise UnsupportedError(f"{name}: no weight of this model is quantized")
    return found


def config_for(name: str, weights: Mapping[str, QArray], kv_scales: int) -> dict[str, Any]:
    """`bits`, `group_size`, `sym`, `desc_act` and `dynamic` that hold a model, see `settings_for`.

    Most layers have the general settings; a group of whole rows is -1.
    """
    found = settings_for(name, weights, kv_scales)
    named = {
        module: own._replace(group_size=-1) if own.group_size == weights[module].shape[1] else own
        for module, own in found.items()
    }
    (general, _), *_ = Counter(named.values()).most_common(1)
    special: dict[LayerSettings, list[str]] = {}
    for module, own in named.items():
        if own != general:
            special.setdefault(own, []).append(module)
    entries: dict[str, Any] = {}
    for own, modules in special.items():
        others = [module for module in weights if module not in set(modules)]
        entries |= {f"+:{pattern}": own._asdict() for pattern in _patterns(modules, others)}
    left = [m for m, w in weights.items() if is_plain(w) and m != "lm_head" and not is_embedding(m)]
    entries |= {f"-:{pattern}": {} for pattern in _patterns(left, found)}
    return general._asdict() | ({"dynamic": entries} if entries else {})


def _patterns(modules: Iterable[str], others: Iterable[str]) -> list[str]:
    """Regular expressions that match the beginning of these names, and of none of the others."""
    targets = targets_of(modules, others)
    return [t[3:] if t.startswith("re:") else "^" + re.escape(t) + "$" for t in targets]


def bits_of(keys: Keys, bits: int | None) -> int:
    """The width of a code; UnsupportedError for another than 2 to 8 bits."""
    if bits is None or bits not in range(2, 9):
        raise UnsupportedError(
            f"{keys.file}: {keys.prefix}bits {bits!r:.80} is not supported; 2 to 8 are"
        )
    return bits


def _compiled(section: Keys, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(re.sub(r"^[+-]:", "", pattern))
    except re.error as error:
        raise section.error(pattern, f"is not a regular expression: {error}") from error


def _override(keys: Keys, pattern: str, default: LayerSettings) -> LayerSettings | None:
    if pattern.startswith("-:"):
        return None
    keys.ignore(*CALIBRATION)
    size = default.group_size
    if "group_size" in keys.values:
        size = weights.require_group_size(keys, keys.get("group_size", int))
    own = LayerSettings(
        bits_of(keys, keys.get("bits", int, default.bits)),
        size,
        keys.get("sym", bool, default.sym),
        keys.get("desc_act", bool, default.desc_act),
    )
    keys.done()
    return own
