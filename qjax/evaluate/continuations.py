"""Log-likelihoods of continuations: many sequences of any lengths, packed into few compiled shapes.

Inputs are sorted, so that those with a common beginning follow each other. Within a batch a
sequence reads the pages of the cache that its beginning shares with the one before it, and only
the rest of it goes through the layers: attention sees what the whole batch has written. Inputs that
are equal, such as those of choices of one token each, go once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, NamedTuple

import jax
import numpy as np

from qjax.engine.batch import BLOCK_TABLE_WIDTHS, PREFILL_ROWS, PREFILL_TOKENS, bucket
from qjax.engine.exact_jit import exact_jit
from qjax.engine.runner import numerics_for
from qjax.errors import RequestError
from qjax.evaluate.logits import ROWS
from qjax.evaluate.perplexity import row_losses
from qjax.key_bases import key_bases
from qjax.kv_cache import PAGE_SIZE, Batch, cache_dtypes, init_cache, whole_sequences
from qjax.models import parts
from qjax.params import Params

# A sequence that is longer than a step of the engine is a batch of its own.
TOKENS = (*PREFILL_TOKENS, *(PREFILL_TOKENS[-1] << i for i in range(1, 12)))


class Continuation(NamedTuple):
    """Attributes:
    logprobs: float64 [n], log of the chance of each token of the continuation.
    greedy: whether each of them is the likeliest.
    """

    logprobs: np.ndarray
    greedy: bool


class _Asked(NamedTuple):
    """The chance of `token` after `position` of an input: that of token `place` of a pair."""

    position: int
    token: int
    pair: int
    place: int


@dataclass
class _Input:
    """Tokens of which the first `shared`, whole pages, are in the cache already."""

    ids: tuple[int, ...]
    asked: list[_Asked] = field(default_factory=list)
    shared: int = 0

    @property
    def new(self) -> int:
        return len(self.ids) - self.shared


def continuations(
    params: Params,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    max_length: int | None = None,
    numerics: str = "exact",
    kv_cache_dtype: str = "auto",
    kv_cache_dtype_skip_layers: Sequence[int | str] = (),
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[Continuation]:
    """How likely continuations are, given what stands before them.

    Args:
      pairs: (context, continuation), token ids, at least one each.
      max_length: most tokens that the model reads at a time, None for as many as it takes; of a
        longer pair, the beginning is left out.
      numerics, kv_cache_dtype, kv_cache_dtype_skip_layers: see `qjax.generate`.
      progress: goes over the batches, and may tell how far it is.

    Raises:
      RequestError: an argument is out of range, a context or continuation is empty, or a
        continuation is longer than `max_length`.
    """
    limit = params.config.max_position_embeddings
    length = limit if max_length is None else max_length
    if not 1 <= length <= limit:
        raise RequestError(f"max_length must be in [1, {limit}], got {length}.")
    chosen = numerics_for(numerics, 1)
    dtypes = cache_dtypes(
        params.config, kv_cache_dtype, chosen.cache_dtype, kv_cache_dtype_skip_layers
    )
    bases = key_bases(params, dtypes, chosen.prefill)
    logprobs = [np.empty(len(continuation)) for _, continuation in pairs]
    greedy = np.ones(len(pairs), bool)
    for batch in progress(list(_batches(_inputs(pairs, length)))):
        tokens, rows, start = _arrays(batch, chosen.prefill)
        hidden = _hidden(dtypes, params, tokens, rows, bases)
        asked = [
            (first + one.position - each.shared, one)
            for each, first in zip(batch, start, strict=True)
            for one in each.asked
        ]
        for block in (asked[at : at + ROWS] for at in range(0, len(asked), ROWS)):
            where, targets = np.zeros((2, ROWS), np.int32)
            where[: len(block)] = [row for row, _ in block]
            targets[: len(block)] = [one.token for _, one in block]
            found = jax.device_get(_score(chosen.prefill, params, hidden, where, targets))
            for (_, one), logprob, top in zip(block, *found, strict=False):
                logprobs[one.pair][one.place] = logprob
                greedy[one.pair] &= top
    return [Continuation(*each) for each in zip(logprobs, greedy.tolist(), strict=True)]


def _inputs(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], length: int) -> list[_Input]:
    """What goes through the model for `pairs`, sorted."""
    inputs: dict[tuple[int, ...], _Input] = {}
    for pair, (context, continuation) in enumerate(pairs):
        if not context or not 1 <= len(continuation) <= length:
            raise RequestError(
                f"a continuation must have 1 to {length} tokens, and at least one before it, got "
                f"{len(continuation)} after {len(context)}."
            )
        ids = (*context, *continuation)[-length - 1 : -1]
        first = len(ids) - len(continuation)
        inputs.setdefault(ids, _Input(ids)).asked += [
            _Asked(first + place, token, pair, place) for place, token in enumerate(continuation)
        ]
    return sorted(inputs.values(), key=lambda each: each.ids)


def _batches(inputs: Iterable[_Input]) -> Iterator[list[_Input]]:
    """Cuts sorted inputs into batches, and says what each has in common with the one before."""
    batch: list[_Input] = []
    for each in inputs:
        if batch:
            same = takewhile(
                lambda two: two[0] == two[1], zip(batch[-1].ids, each.ids, strict=False)
            )
            common = min(sum(1 for _ in same), *(one.position for one in each.asked))
            each.shared = common // PAGE_SIZE * PAGE_SIZE
        if (
            len(batch) == PREFILL_ROWS[-1]
            or sum(b.new for b in batch) + each.new > PREFILL_TOKENS[-1]
        ):
            if batch:
                yield batch
            batch, each.shared = [], 0
        batch.append(each)
    if batch:
        yield batch


def _arrays(batch: list[_Input], numerics: str) -> tuple[np.ndarray, Batch, list[int]]:
    """Tokens int32 [T] and where they stand, padded to a few sizes, and where each input starts."""
    size = bucket(TOKENS, sum(each.new for each in batch))
    rows = bucket(PREFILL_ROWS, len(batch))
    longest = max(len(each.ids) for each in batch)
    width = bucket(BLOCK_TABLE_WIDTHS, -(-longest // PAGE_SIZE))
    tokens, positions = np.zeros((2, size), np.int32)
    starts = np.full(rows + 1, sum(each.new for each in batch), np.int32)
    seq_lens = np.zeros(rows, np.int32)
    table = np.zeros((rows, width), np.int32)
    start = page = 0
    for i, each in enumerate(batch):
        kept, pages = each.shared // PAGE_SIZE, -(-len(each.ids) // PAGE_SIZE)
        table[i, :kept] = table[i - 1, :kept]
        table[i, kept:pages] = np.arange(page, page + pages - kept)
        tokens[start : start + each.new] = each.ids[each.shared :]
        positions[start : start + each.new] = np.arange(each.shared, len(each.ids))
        starts[i], seq_lens[i] = start, len(each.ids)
        start, page = start + each.new, page + pages - kept
    rows_of = Batch(positions, starts, seq_lens, table, numerics=numerics)
    return tokens, rows_of, starts[: len(batch)].tolist()


@exact_jit(static_argnums=0)
def _hidden(
    dtypes: tuple[str, ...], params: Params, tokens: jax.Array, batch: Batch, bases: Any
) -> jax.Array:
    # A sequence has new tokens in one page, or fewer, beside those that it fills.
    pages = len(tokens) // PAGE_SIZE + len(batch.seq_lens)
    cache = init_cache(parts.cache_config(params), pages, PAGE_SIZE, dtypes, bases=bases)
    return parts.run(params, tokens, batch, cache)[0]


@exact_jit(static_argnums=0)
def _score(
    numerics: str, params: Params, hidden: jax.Array, where: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """log p of each target, and whether it is the likeliest token, both [R]."""
    rows = hidden[where]
    one = whole_sequences(1, len(where), numerics)
    logits = parts.logits(params, rows, one)
    return -row_losses(logits, targets), logits.argmax(-1) == targets
