"""Rows of a data set on the Hugging Face hub, through the optional `datasets` library."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from qjax.errors import DownloadError, RequestError

# Short names that LLM Compressor has: repository, configuration and split.
_SHORT = {
    "open_platypus": ("garage-bAInd/Open-Platypus", None, "train"),
    "ultrachat_200k": ("HuggingFaceH4/ultrachat_200k", None, "train_sft"),
    "ultrachat": ("HuggingFaceH4/ultrachat_200k", None, "train_sft"),
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
    "gsm8k": ("openai/gsm8k", "main", "train"),
    "cnn_dailymail": ("abisee/cnn_dailymail", "3.0.0", "train"),
    "c4": ("allenai/c4", "en", "train"),
    "evolcodealpaca": ("theblackcat102/evol-codealpaca-v1", None, "train"),
    "perfectblend": ("mlabonne/open-perfectblend", None, "train"),
}


def hub_rows(
    name: str, splits: str | Mapping[str, str] | None, config: str | None
) -> Iterator[Mapping[str, Any]]:
    """The rows of a data set, as they arrive.

    Args:
      name: "owner/name", or a short name of LLM Compressor.
      splits: "train", "train[:5%]" or the like; or, as in LLM Compressor, a dict with one entry.
      config: which of its configurations.

    Raises:
      RequestError: this can be no data set's name.
      DownloadError: `datasets` is not installed, or cannot reach or find it.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) and name not in _SHORT:
        raise RequestError(
            f"dataset {name!r:.200} is no file, no owner/name of the Hugging Face hub, and none of "
            f"self, {', '.join(_SHORT)}."
        )
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise DownloadError(
            f"dataset {name}: there is no such file, and data sets of the hub need the datasets "
            "library (pip install 'qjax[calibration]'); or give a text file, or \"self\""
        ) from error
    name, usual, split = _SHORT.get(name, (name, None, "train"))
    if isinstance(splits, Mapping):
        splits = next(iter(splits.values()), None)
    split = splits or split
    return _rows(datasets, name, config or usual, split)


def _rows(datasets: Any, name: str, config: str | None, split: str) -> Iterator[Mapping[str, Any]]:
    try:
        # A part of a split ("train[:5%]") cannot be streamed.
        yield from datasets.load_dataset(name, config, split=split, streaming="[" not in split)
    except (OSError, ValueError, RuntimeError) as error:
        raise DownloadError(
            f"dataset {name}, split {split} cannot be had: {type(error).__name__}: "
            f'{str(error)[:300]}; give a text file instead, or "self"'
        ) from error
