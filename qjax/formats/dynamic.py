"""`dynamic` of GPTQModel: settings of single layers, by regular expressions of their names.

A pattern that begins with "-:" leaves layers unquantized; any other, with or without "+:", changes
their settings. The first one that matches the beginning of a name counts.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from qjax.errors import UnsupportedError
from qjax.formats import weights
from qjax.formats.base import Keys
from qjax.formats.history import CALIBRATION


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
