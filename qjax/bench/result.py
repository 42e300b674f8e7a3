"""The file that a run of measurements fills as it goes, and that a later run goes on with."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qjax.errors import QjaxError

FORMAT = 1
_KEY = ("op", "kind", "n", "k", "rows", "asked")


class ResultError(QjaxError):
    """A file of results that is not one, or not of this device and these versions."""


@dataclass
class Result:
    """Rows are dicts: op, kind, n, k, rows, asked (the implementation that was named, or ""),
    implementation, microseconds and so on; or `failed` with a reason.

    Attributes:
      path: where it is kept, or None.
      head: device, versions, limits and whatever else holds for all rows.
    """

    path: Path | None
    head: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path | None, head: dict[str, Any]) -> Result:
        """A new one, or what is there already.

        Raises:
          ResultError: what is there is something else.
        """
        if path is None or not path.exists():
            return cls(path, head)
        found = read(path)
        for key in ("device", "versions", "quick"):
            if found.get(key) != head[key]:
                raise ResultError(
                    f"{path}: holds results with {key} {found.get(key)}, these are with "
                    f"{head[key]}: name another file"
                )
        return cls(path, {**found, **head, "rows": None}, found["rows"])

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The row of a case; one that failed is none."""
        wanted = tuple(key[name] for name in _KEY)
        for row in self.rows:
            if tuple(row[name] for name in _KEY) == wanted and "failed" not in row:
                return row
        return None

    def add(self, row: dict[str, Any]) -> None:
        """Enters a row, in place of an earlier one of the case, and writes the file."""
        key = [row[name] for name in _KEY]
        self.rows = [r for r in self.rows if [r[name] for name in _KEY] != key] + [row]
        self.save()

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        if self.path is None:
            return
        head = json.dumps({"format": FORMAT, **self.head, "rows": None}, indent=1)
        rows = ",\n".join("  " + json.dumps(row) for row in self.rows)
        text = head.replace('"rows": null', f'"rows": [\n{rows}\n ]')
        write_whole(self.path, text + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a file, whole or not at all, and the folder that it is for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def read(path: Path) -> dict[str, Any]:
    """The content of a file of results.

    Raises:
      ResultError: it is none.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ResultError(f"{path}: {error}") from None
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or found.get("format") != FORMAT:
        raise ResultError(f"{path}: no results of `python -m qjax.bench kernels`")
    for row in rows:
        if not isinstance(row, dict) or not row.keys() >= set(_KEY):
            raise ResultError(f"{path}: a row without {', '.join(_KEY)}")
    return found
