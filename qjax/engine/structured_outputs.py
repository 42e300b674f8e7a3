"""The form that a caller may demand of generated text: vLLM's names, checked once.

What a form means for tokens is the business of `qjax.engine.grammar`.
"""

from __future__ import annotations

import json as json_text
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from qjax.errors import RequestError, nearest

# Of a schema, a regular expression, a grammar or all choices together. The longest schemas that
# tools come with have some 20,000.
MAX_CHARACTERS = 1 << 16
MAX_CHOICES = 1 << 10
# The parsers behind recurse, and have no limit of their own.
MAX_DEPTH = 64


@dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """What the text must be; exactly one of the fields is given.

    Attributes:
      json: a JSON schema, as a dict or as text; it is held as text.
      regex: a regular expression for the whole text, without look-around and back-references.
      choice: the text is one of these.
      grammar: a grammar in Lark's notation, as llguidance takes it; it begins at `start`.
      json_object: any JSON object.

    Raises:
      RequestError: none of the fields is given, or several; or one is malformed or too large.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        # None, and no JSON object, stand for a field that is not given, as in vLLM.
        names = [field.name for field in fields(self)]
        given = [name for name in names if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise RequestError(
                f"structured_outputs must have exactly one of {', '.join(names)}, "
                f"got {' and '.join(given) or 'none'}."
            )
        if self.json is not None:
            object.__setattr__(self, "json", _schema(self.json))
        for name in ("regex", "grammar"):
            text = getattr(self, name)
            if text is not None:
                _check_text(name, text)
                _check_brackets(name, text)
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        if self.json_object not in (None, False, True):
            raise RequestError(f"json_object must be a bool, got {self.json_object!r:.80}.")

    @classmethod
    def of(cls, value: StructuredOutputs | Mapping[str, Any]) -> StructuredOutputs:
        """StructuredOutputs from a dict of its fields; an unknown one is a RequestError."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise RequestError(f"structured_outputs must be a dict, got {value!r:.80}.")
        known = [field.name for field in fields(cls)]
        for name in value:
            if name not in known:
                hint = nearest(str(name), known) or f"; known are {', '.join(known)}"
                raise RequestError(f"structured_outputs has no field {name!r:.80}{hint}.")
        return cls(**value)


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str) or not text:
        raise RequestError(f"{name} must be a non-empty string, got {text!r:.80}.")
    if len(text) > MAX_CHARACTERS:
        raise RequestError(
            f"{name} must have at most {MAX_CHARACTERS} characters, got {len(text)}."
        )
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RequestError(f"{name} holds half a surrogate pair.") from None


def _check_brackets(name: str, text: str) -> None:
    """Counts brackets wherever they stand, also where they are literal."""
    depth = 0
    for character in text:
        depth = max(0, depth + (character in "([{") - (character in ")]}"))
        if depth > MAX_DEPTH:
            raise RequestError(f"{name} must nest at most {MAX_DEPTH} deep.")


def _schema(schema: Any) -> str:
    """The text of a schema."""
    try:
        if isinstance(schema, str):
            _check_text("json", schema)
            schema = json_text.loads(schema)
        if not isinstance(schema, Mapping):
            raise RequestError(f"json must be a schema, which is an object, got {schema!r:.80}.")
        text = json_text.dumps(schema, allow_nan=False, default=_plain)
        _check_depth(schema)
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"json must be a JSON schema: {error!s:.200}.") from None
    _check_text("json", text)
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        below = []
        for each in level:
            below += each.values() if isinstance(each, Mapping) else each
        level = [each for each in below if isinstance(each, Mapping | list | tuple)]
        if not level:
            return
    raise RequestError(f"json must nest at most {MAX_DEPTH} deep.")


def _choices(choices: Any) -> tuple[str, ...]:
    if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
        raise RequestError(f"choice must be a list of strings, got {choices!r:.80}.")
    if len(choices) > MAX_CHOICES:
        raise RequestError(f"choice must have at most {MAX_CHOICES} entries, got {len(choices)}.")
    for each in choices:
        _check_text("an entry of choice", each)
    total = sum(map(len, choices))
    if total > MAX_CHARACTERS:
        raise RequestError(f"choice must have at most {MAX_CHARACTERS} characters, got {total}.")
    return tuple(choices)
