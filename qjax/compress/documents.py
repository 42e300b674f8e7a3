"""Documents of a data set as token ids: from files, lists, arrays and rows of fields."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from qjax.compress.hub_datasets import hub_rows
from qjax.errors import RequestError
from qjax.params import Params

CHARACTERS = 8  # of a token, seldom more

# Fields of a row that make its text, where it has neither text nor messages: one after the other.
_FIELDS = (
    ("prompt", "completion"),
    ("instruction", "input", "output"),
    ("question", "answer"),
    ("article",),
)
_ROLES = {"human": "user", "gpt": "assistant"}


def documents_of(
    params: Params,
    dataset: Any,
    enough: int,
    text_column: str = "text",
    splits: str | Mapping[str, str] | None = None,
    dataset_config_name: str | None = None,
) -> np.ndarray | Iterator[np.ndarray]:
    """Integers [S, T], where the data set has rows of equal length; else documents one by one.

    Args:
      dataset: see `dataset.tokens`.
      enough: tokens that serve; of a long file, not all is read.

    Raises:
      RequestError, DownloadError: see `dataset.tokens`.
    """
    if isinstance(dataset, str | os.PathLike):
        name = os.fspath(dataset)
        if not os.path.exists(name):
            rows = hub_rows(name, splits, dataset_config_name)
            return (_encoded(params, row, text_column) for row in rows)
        dataset = _file(Path(name), enough)
    if hasattr(dataset, "ndim"):
        return _array(dataset)
    if not isinstance(dataset, Iterable):
        raise RequestError(f"a dataset is no {type(dataset).__name__}: give texts, ids or a file.")
    sequences = isinstance(dataset, Sequence) and all(map(_is_ids, dataset))
    if sequences and len({len(row) for row in dataset}) == 1:
        return _array(np.array(dataset))
    entries = iter(dataset)
    first = next(entries, None)
    if first is None:
        raise RequestError("the dataset is empty.")
    if isinstance(first, int | np.integer):
        return _array(np.array([first, *entries]))
    return (_encoded(params, entry, text_column) for entry in chain([first], entries))


def _is_ids(entry: Any) -> bool:
    return not isinstance(entry, str | Mapping) and hasattr(entry, "__len__")


def _array(ids: Any) -> np.ndarray | Iterator[np.ndarray]:
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        raise RequestError(
            f"token ids must be integers [n] or [S, T], got {ids.dtype} {list(ids.shape)}."
        )
    ids = ids.astype(np.int64)
    return ids if ids.ndim == 2 else iter([ids])


def _file(path: Path, enough: int) -> Any:
    """An array, the rows of a file of JSON, or a list of the one text that there is."""
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        if path.suffix in (".jsonl", ".json"):
            return _json_rows(path)
        with path.open(encoding="utf-8") as file:
            return [file.read(enough * CHARACTERS)]
    except (OSError, ValueError) as error:  # of which UnicodeDecodeError is one
        raise RequestError(f"cannot read the dataset {path}: {error}") from error


def _json_rows(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        if path.suffix == ".json":
            rows = _json(file.read(), str(path))
            yield from rows if isinstance(rows, list) else [rows]
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _json(line, f"{path}, line {number}")


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is no JSON: {error}") from error


def _encoded(params: Params, entry: Any, text_column: str) -> np.ndarray:
    """The ids int64 [n] of a text, of ids, or of a row of fields."""
    if _is_ids(entry):
        found = _array(entry)
        return np.concatenate([*found]) if isinstance(found, np.ndarray) else next(found)
    if params.tokenizer is None:
        raise RequestError("the model has no tokenizer: give the dataset as token ids.")
    if isinstance(entry, str):
        return np.array(params.tokenizer.encode(entry), np.int64)
    if not isinstance(entry, Mapping):
        raise RequestError(f"a dataset holds texts, ids or rows of fields, got {entry!r:.80}.")
    if entry.get("input_ids") is not None:
        return _encoded(params, entry["input_ids"], text_column)
    if isinstance(entry.get(text_column), str):
        return _encoded(params, entry[text_column], text_column)
    messages = entry.get("messages") or _messages(entry.get("conversations"))
    if messages:
        text = params.tokenizer.apply_chat_template(messages, add_generation_prompt=False)
        return np.array(params.tokenizer.encode(text, add_special_tokens=False), np.int64)
    for names in _FIELDS:
        if isinstance(entry.get(names[0]), str):
            parts = [entry[name] for name in names if isinstance(entry.get(name), str)]
            return _encoded(params, "\n".join(filter(None, parts)), text_column)
    raise RequestError(
        f"a row of the dataset has the fields {', '.join(map(str, entry))}: name the one with its "
        f"text by text_column (now {text_column!r})."
    )


def _messages(conversation: Any) -> list[dict[str, Any]]:
    """Of the fields "from" and "value", which some data sets have instead."""
    return [
        {"role": _ROLES.get(turn.get("from"), turn.get("from")), "content": turn.get("value")}
        for turn in conversation or ()
    ]
