"""Checked reading of a config section: each value's type and range, before anything uses it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qjax.errors import CheckpointError

_REQUIRED: Any = object()


@dataclass(frozen=True)
class Fields:
    """A mapping whose getters raise `CheckpointError` with the file and the full name of the field.

    A missing key and a null are the same thing: the default, or an error where there is none.

    Attributes:
      values: the section.
      file: its file, for messages.
      prefix: what stands before the names of its fields in messages.
      defaults: values of fields that the section lacks.
      shown: names of fields in messages where the file has other names for them.
    """

    values: Mapping[str, Any]
    file: str | None = None
    prefix: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    shown: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping):
            where = self.prefix.rstrip(".") or None
            raise CheckpointError(
                "must be a mapping of names to values", file=self.file, field=where
            )

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def error(self, name: str, reason: str) -> CheckpointError:
        shown = self.shown.get(name, self.prefix + name)
        return CheckpointError(reason, file=self.file, field=shown)

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        value = self.values.get(name)
        if value is None:
            value = self.defaults.get(name, default)
        if value is _REQUIRED:
            raise self.error(name, "missing")
        return value

    def section(self, name: str) -> Fields:
        return Fields(self.get(name), self.file, f"{self.prefix}{name}.")

    def integer(self, name: str, low: int, high: int, default: Any = _REQUIRED) -> Any:
        value = self.get(name, default)
        if value is None:
            return None
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise self.error(name, f"{_shown(value)} is not an integer")
        if not low <= int(value) <= high:
            raise self.error(name, f"{_shown(value)} is out of range: from {low} to {high}")
        return int(value)

    def number(self, name: str, low: float, high: float, default: Any = _REQUIRED) -> Any:
        """A finite float with low < value <= high."""
        value = self.get(name, default)
        return None if value is None else self._real(name, value, low, high)

    def numbers(self, name: str, count: int, low: float, high: float) -> tuple[float, ...]:
        """A list of `count` finite floats, each with low < value <= high."""
        value = self.get(name)
        if not isinstance(value, list | tuple) or len(value) != count:
            raise self.error(name, f"must be a list of {count} numbers")
        return tuple(self._real(name, item, low, high) for item in value)

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"{_shown(value)} is not true or false")
        return value

    def text(self, name: str, default: Any = _REQUIRED) -> str:
        value = self.get(name, default)
        if not isinstance(value, str):
            raise self.error(name, f"{_shown(value)} is not a string")
        return value

    def _real(self, name: str, value: Any, low: float, high: float) -> float:
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise self.error(name, f"{_shown(value)} is not a number")
        try:
            number = float(value)
        except OverflowError:  # an int that no float can hold
            number = math.inf
        if not low < number <= high:
            raise self.error(name, f"{_shown(value)} is out of range: above {low:g} to {high:g}")
        return number


def _shown(value: Any) -> str:
    """The value as an error message shows it: a hostile file may hold a very long one."""
    try:
        shown = repr(value)
    except (ValueError, RecursionError):  # Python refuses to print integers of many digits
        return f"a {type(value).__name__} too long to show"
    return shown if len(shown) <= 80 else shown[:77] + "..."
