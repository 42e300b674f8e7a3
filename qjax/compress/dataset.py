"""Samples for calibration: sequences of tokens of equal length, from whatever the user has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qjax.compress.documents import documents_of
from qjax.compress.self_samples import begin, self_samples
from qjax.errors import RequestError
from qjax.params import Params

# Where nothing else is asked for, at most.
NUM_SAMPLES, LENGTH = 512, 512
# How many the model writes, of how many tokens; and where few will do.
SELF_SAMPLES, FEW_SELF_SAMPLES = (128, 512), (32, 32)
SPARE = 4  # times the tokens that are wanted are read, to draw samples from


def tokens(
    params: Params,
    dataset: Any = None,
    num_samples: int | None = None,
    length: int | None = None,
    *,
    shuffle: bool = True,
    seed: int = 0,
    text_column: str = "text",
    splits: str | Mapping[str, str] | None = None,
    dataset_config_name: str | None = None,
    few: bool = False,
    progress: bool = False,
) -> np.ndarray:
    """Samples int32 [S, T] of a data set.

    Texts are tokenized, laid end to end and cut; what is left over is dropped. Each sample begins
    with the model's beginning-of-sequence token, where it has one in front of a text.

    Args:
      params: the model that they are for.
      dataset: one of
        - None or "self": what the model itself writes, sampled at temperature 1 from its
          beginning-of-sequence token;
        - a text file, or a .jsonl file whose rows have a text, a prompt, messages (which go through
          the chat template) or input_ids;
        - token ids: a .npy file, an array or a list, [n] to be cut, or [S, T], one sample a row;
        - a list of strings, of lists of token ids, or of rows as in a .jsonl file;
        - the name of a data set on the Hugging Face hub, or its short name in LLM Compressor.
      num_samples: S; None for as many as there are, up to 512 (of the model's own 128, or 32 where
        few will do).
      length: T; None for 512 (of few of its own, 32), for that of [S, T] ids, or for what
        the model takes, if less.
      shuffle: draw the samples from all that there are, by `seed`; else take the first.
      seed: of what is drawn; the same seed gives the same samples.
      text_column: the field of a row that holds its text.
      splits, dataset_config_name: of a data set on the hub.
      few: whether few samples will do, where the model writes them.
      progress: show a bar while the model writes.

    Raises:
      RequestError: there are fewer tokens than asked for, an id is not in the vocabulary, or the
        data set is none of these.
      DownloadError: a data set on the hub cannot be reached.
    """
    limit = params.config.max_position_embeddings
    if length is not None and not 2 <= length <= limit:
        raise RequestError(f"max_seq_length must be from 2 to {limit}, got {length}.")
    if num_samples is not None and num_samples < 1:
        raise RequestError(f"num_calibration_samples must be at least 1, got {num_samples}.")
    if dataset is None or (isinstance(dataset, str) and dataset == "self"):
        count, longest = FEW_SELF_SAMPLES if few else SELF_SAMPLES
        return self_samples(
            params, num_samples or count, length or min(longest, limit), seed, progress
        )
    count = num_samples or NUM_SAMPLES
    size = length or min(LENGTH, limit)
    enough = count * size * (SPARE if shuffle else 1)
    found = documents_of(params, dataset, enough, text_column, splits, dataset_config_name)
    if isinstance(found, np.ndarray):
        size = length or min(found.shape[1], limit)
        rows, have = found[:, :size], found.size
        if rows.shape[1] < size:
            raise RequestError(
                f"the samples have {rows.shape[1]} tokens each, and max_seq_length is {size}."
            )
    else:
        flat = _until(found, enough)
        rows, have = _cut(params, flat, size), len(flat)
    if len(rows) < (num_samples or 1):
        raise RequestError(
            f"the data set is too short: it has {have} tokens, and num_calibration_samples "
            f"{num_samples or 1} of max_seq_length {size} take {(num_samples or 1) * size}."
        )
    _check(rows, params.config.vocab_size)
    if shuffle:
        drawn = np.random.default_rng(seed).permutation(len(rows))[:count]
        rows = rows[np.sort(drawn)]
    return np.ascontiguousarray(rows[:count], np.int32)


def _until(documents: Iterable[np.ndarray], enough: int) -> np.ndarray:
    """The first documents end to end, until there are enough tokens."""
    parts, have = [np.zeros(0, np.int64)], 0
    for document in documents:
        parts.append(document)
        have += len(document)
        if have >= enough:
            break
    return np.concatenate(parts)


def _cut(params: Params, flat: np.ndarray, length: int) -> np.ndarray:
    """[S, length], each row beginning as a text of the model does."""
    rows = flat[: len(flat) // length * length].reshape(-1, length).copy()
    first = begin(params)
    if first is not None:
        rows[:, 0] = first
    return rows


def _check(rows: np.ndarray, vocab_size: int) -> None:
    wrong = np.argwhere((rows < 0) | (rows >= vocab_size))
    if len(wrong):
        row, column = map(int, wrong[0])
        raise RequestError(
            f"sample {row} has token id {rows[row, column]} at {column}, but ids must be in "
            f"[0, {vocab_size}): it was made for another model."
        )
