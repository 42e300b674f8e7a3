"""Files of measurements: which implementation took how long for what, with which block sizes.

A file is JSON of one device:

    {"version": 1, "device": "NVIDIA H100 80GB HBM3", "entries": [
      {"op": "matmul", "kind": "uint4b8 g128 bfloat16", "n": 4096, "k": 14336, "rows": 16,
       "implementation": "triton", "blocks": {"block_n": 64}, "microseconds": 21.5, "jax": "0.10.2"}
    ]}

Whatever else is in it, or of another type, is an error that names the file and the entry.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

VERSION = 1
MAX_FILE_BYTES = 1 << 25
_MAX_SIZE = 1 << 40
_MAX_TEXT = 200


class TableError(ValueError):
    """A file of measurements is damaged. The message names the file and what is wrong in it."""


@dataclass(frozen=True)
class Measurement:
    """One of them. What `kind`, `rows`, `n` and `k` are for each op, `tuning` says.

    Attributes:
      rows: it speaks of calls with up to so many.
      blocks: block sizes of the implementation, by its own names; empty where it has none.
      microseconds: of one call.
      jax: version of jax it was measured with.
    """

    op: str
    kind: str
    n: int
    k: int
    rows: int
    implementation: str
    blocks: Mapping[str, int]
    microseconds: float
    jax: str

    @property
    def key(self) -> tuple[str, str, int, int, int, str]:
        """What it is a measurement of: of two with the same key, the later one holds."""
        return self.op, self.kind, self.n, self.k, self.rows, self.implementation


def file_name(device: str) -> str:
    """Name of the file of a device: "nvidia-h100-80gb-hbm3.json"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def read(path: Path, device: str) -> list[Measurement]:
    """The measurements in a file.

    Raises:
      TableError: it cannot be read, or is no such file of this device.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")
        content = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
        return _measurements(content, device)
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise TableError(
            f"table of measurements {path}: {reason} (`qjax tune` makes it anew once it is deleted)"
        ) from None


def write(path: Path, device: str, measurements: Iterable[Measurement]) -> None:
    """Writes a file that is there whole or not at all, in an order of its own, an entry a line.

    Raises:
      OSError: it cannot be written.
    """
    latest = {each.key: each for each in measurements}
    lines = ",\n".join("  " + json.dumps(asdict(latest[key])) for key in sorted(latest))
    head = f'{{"version": {VERSION}, "device": {json.dumps(device)}, "entries": [\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        try:
            file.write(f"{head}{lines}\n]}}\n")
            file.close()
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _measurements(content: Any, device: str) -> list[Measurement]:
    _keys(content, {"version", "device", "entries"}, "it")
    if content["version"] != VERSION:
        raise ValueError(f"version {_shown(content['version'])}, this program reads {VERSION}")
    if content["device"] != device:
        raise ValueError(f"of the device {_shown(content['device'])}, not {device!r}")
    if not isinstance(content["entries"], list):
        raise ValueError("entries are not a list")
    return [_measurement(entry, i) for i, entry in enumerate(content["entries"])]


def _measurement(entry: Any, index: int) -> Measurement:
    where = f"entry {index}"
    _keys(entry, {field.name for field in fields(Measurement)}, where)
    for name in ("op", "kind", "implementation", "jax"):
        if not isinstance(entry[name], str) or not 0 < len(entry[name]) <= _MAX_TEXT:
            raise ValueError(f"{where}: {name} is {_shown(entry[name])}, expected a text")
    for name in ("n", "k", "rows"):
        _size(entry[name], f"{where}: {name}")
    blocks, time = entry["blocks"], entry["microseconds"]
    if not isinstance(blocks, dict):
        raise ValueError(f"{where}: blocks is {_shown(blocks)}, expected names and sizes")
    for name, size in blocks.items():
        _size(size, f"{where}: block size {_shown(name)}")
    number = isinstance(time, (int, float)) and not isinstance(time, bool)
    if not number or not 0 < time < _MAX_SIZE or not math.isfinite(time):
        raise ValueError(f"{where}: microseconds is {_shown(time)}, expected a positive number")
    return Measurement(**{**entry, "microseconds": float(time)})


def _keys(found: Any, expected: set[str], where: str) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{where} is {_shown(found)}, expected an object")
    for key in expected - found.keys():
        raise ValueError(f"{where} lacks {key!r}")
    for key in found.keys() - expected:
        raise ValueError(f"{where} has an unknown key {_shown(key)}")


def _size(value: Any, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _MAX_SIZE:
        raise ValueError(f"{what} is {_shown(value)}, expected a positive integer")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
