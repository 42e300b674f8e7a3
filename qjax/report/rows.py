"""What a report measures of a model, and the file that keeps it row by row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qjax.bench import BenchRow
from qjax.bench.result import write_whole
from qjax.errors import RequestError
from qjax.evaluate import Divergence, Perplexity

FORMAT = 2
# Rows that differ in one of these say nothing of each other.
_SAME = ("device", "processors", "versions", "settings")


@dataclass(frozen=True)
class ModelRow:
    """A model of the report.

    Attributes:
      name: of the method that it was made by, or as the model was asked for.
      method, qtype, activation, bits: of most of its weights, see `qjax.params.Use`.
      weights: how many numbers.
      nbytes, stored: bytes in memory, and in the checkpoint.
      quantize_seconds: to make it of the base; None where it was not made here in one go.
      load_seconds: for `qjax.load`.
      prefill: a prompt, of one sequence, in fast numerics.
      decode: by batch, in fast numerics.
      perplexity: of the text, by the numerics in which it was read: "exact", "fast".
      divergence: from the base in exact numerics, by the numerics of the model; of the base itself
        only in others.
    """

    name: str
    method: str
    qtype: str
    activation: str
    bits: float
    weights: int
    nbytes: int
    stored: int
    quantize_seconds: float | None
    load_seconds: float
    prefill: BenchRow
    decode: tuple[BenchRow, ...]
    perplexity: dict[str, Perplexity]
    divergence: dict[str, Divergence]

    @property
    def bits_per_weight(self) -> float:
        """In memory, embeddings and norms included."""
        return 8 * self.nbytes / self.weights

    @property
    def four_bit(self) -> bool:
        """Whether most of its weights take fewer than six bits, scales included."""
        return self.bits < 6

    def speed(self, batch: int) -> float:
        """Tokens per second of all sequences of a batch that was measured."""
        return next(row.tokens_per_second for row in self.decode if row.batch == batch)


@dataclass(frozen=True)
class Report:
    """Attributes:
    base: in exact numerics, what the others are held against.
    rows: the others.
    head: device, versions and date, as of `python -m qjax.bench kernels`, and bytes/s of memory.
    settings: what was read and how it was measured.
    """

    base: ModelRow
    rows: tuple[ModelRow, ...]
    head: dict[str, Any]
    settings: dict[str, Any]

    @property
    def batches(self) -> list[int]:
        return self.settings["batches"]

    @property
    def all_rows(self) -> tuple[ModelRow, ...]:
        return (self.base, *self.rows)


@dataclass
class Store:
    """The rows of a report, in a file that is written after each of them."""

    path: Path
    head: dict[str, Any]
    settings: dict[str, Any]
    base: ModelRow | None = None
    rows: dict[str, ModelRow] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, head: dict[str, Any], settings: dict[str, Any]) -> Store:
        """A new one, or what is there already.

        Raises:
          RequestError: what is there is no report, or was measured elsewhere or otherwise.
        """
        if not path.exists():
            return cls(path, head, settings)
        try:
            found = json.loads(path.read_text("utf-8"))
            if found["format"] != FORMAT:
                raise ValueError(f"has format {found['format']}, not {FORMAT}")
            base = None if found["base"] is None else _row(found["base"])
            rows = {row["name"]: _row(row) for row in found["rows"]}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise RequestError(
                f"{path} is no report that could go on ({error!r:.80}): name another folder"
            ) from None
        wanted = json.loads(json.dumps({**head, "settings": settings}))
        for key in _SAME:
            if found[key] != wanted[key]:
                raise RequestError(
                    f"{path} was measured with {_difference(found[key], wanted[key], key)}: name "
                    "another folder, or remove this one"
                )
        return cls(path, head, settings, base, rows)

    def add(self, row: ModelRow, base: bool = False) -> None:
        """Enters a row, and writes the file, whole or not at all."""
        if base:
            self.base = row
        else:
            self.rows[row.name] = row
        content = {
            "format": FORMAT,
            **self.head,
            "settings": self.settings,
            "base": None if self.base is None else _content(self.base),
            "rows": [_content(row) for row in self.rows.values()],
        }
        write_whole(self.path, json.dumps(content, indent=1) + "\n")


def _difference(found: Any, wanted: Any, key: str) -> str:
    """What two values differ in, in words."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for name in {**wanted, **found}:
            if found.get(name) != wanted.get(name):
                return _difference(found.get(name), wanted.get(name), f"{key}: {name}")
    return f"{key} {found!r:.80}, this would be with {wanted!r:.80}"


def _content(row: ModelRow) -> dict[str, Any]:
    return {**asdict(row), "bits_per_weight": row.bits_per_weight}


def _row(content: dict[str, Any]) -> ModelRow:
    """A row of the file."""
    values = {key: value for key, value in content.items() if key != "bits_per_weight"}
    values["prefill"] = BenchRow(**content["prefill"])
    values["decode"] = tuple(BenchRow(**row) for row in content["decode"])
    values["perplexity"] = {k: Perplexity(**v) for k, v in content["perplexity"].items()}
    values["divergence"] = {k: _divergence(v) for k, v in content["divergence"].items()}
    return ModelRow(**values)


def _divergence(content: dict[str, Any]) -> Divergence:
    values = dict(content)
    values["quantiles"] = {float(share): value for share, value in content["quantiles"].items()}
    for name in ("base", "other"):
        values[name] = Perplexity(**content[name])
    return Divergence(**values)
