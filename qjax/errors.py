"""The errors that qjax raises on purpose, all under one root.

Each message names the thing (file, tensor, field, value) and what would work instead. Each type
also derives from the built-in error that a caller who has never heard of qjax would expect.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable


class QjaxError(Exception):
    """Root of all errors that qjax raises on purpose."""


class CheckpointError(QjaxError, ValueError):
    """A checkpoint is damaged, incomplete or contradicts itself.

    Attributes:
      file: path of the file at fault, or None.
      field: name of the metadata key, header field or tensor at fault, or None.
      offset: byte position in the file where it was found, or None.
    """

    def __init__(
        self,
        reason: str,
        *,
        file: str | os.PathLike[str] | None = None,
        field: str | None = None,
        offset: int | None = None,
    ):
        where = [] if file is None else [os.fspath(file)]
        if field is not None:
            # A hostile file chooses the names: keep them short and on one line.
            shown = field if len(field) <= 120 else field[:117] + "..."
            where.append(shown if shown.isprintable() else repr(shown))
        if offset is not None:
            where.append(f"at byte {offset}")
        super().__init__(": ".join([", ".join(where), reason] if where else [reason]))
        self.file: str | None = None if file is None else os.fspath(file)
        self.field = field
        self.offset = offset


class UnsupportedError(QjaxError, NotImplementedError):
    """A valid input asks for something that qjax does not do (yet)."""


class RequestError(QjaxError, ValueError):
    """A prompt or a sampling parameter is out of range, or cannot fit."""


class RecipeError(QjaxError, ValueError):
    """A recipe for quantizing a model contradicts itself or does not fit the model."""


class CalibrationError(QjaxError, ValueError):
    """What samples do in a model is not what a method can work with: nothing reaches a layer, or
    numbers are not finite."""


class ShardingError(QjaxError, ValueError):
    """A model, or one of its weights, cannot be split over so many devices."""


class DownloadError(QjaxError, OSError):
    """A model could not be found or fetched; the message says what to do."""


class DistributedError(QjaxError, RuntimeError):
    """The processes of a distributed program cannot meet, or one of them does not do its part."""


class EngineError(QjaxError, RuntimeError):
    """The engine failed, or was closed, and takes no more requests."""


class ServingError(QjaxError, ConnectionError):
    """A server cannot be reached, or does not answer as it should."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A question, " (did you mean 'x'?)", where a known name is near to this one, else ""."""
    found = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {found[0]!r}?)" if found else ""
