"""From logits to tokens: pure functions of arrays.

The order is vLLM's: biases and penalties on the raw logits, then temperature, min_p, top_k and
top_p. A token is drawn by one uniform number, keyed by the request and the position, so that a
result does not depend on what else is in the batch.

Nothing sorts the vocabulary, and reductions go block by block, which XLA does at the speed of
memory on a CPU: for 32 rows of 49,152 logits a plain argmax takes 7 ms, one in two levels 0.5 ms.

Where devices share the vocabulary, each has the logits of its part, which stay there: what is
gathered is a few numbers a row, and the tokens are the same.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.ops.vocabulary import Vocabulary

WHOLE = Vocabulary()

# vLLM takes temperatures below this as greedy: dividing by them overflows.
MIN_TEMPERATURE = 1e-5

# So many of the likeliest tokens are found fast; a filter that keeps more has to search.
CANDIDATES = 128


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingRows:
    """The sampling parameters of a batch, one row a sequence.

    Attributes:
      key: uint32 [S, 2], each request's own random key.
      temperature, top_p, min_p: float32 [S]; temperature 0 is greedy.
      top_k: int32 [S]; 0 or less keeps all.
      presence, frequency, repetition: float32 [S], penalties.
      bias_ids: int32 [S, B], tokens to whose logits something is added, and `bias`, float32 [S, B],
        what; padded with numbers past the vocabulary. None, like all that follows, where no row
        asks for any of it.
      stop_ids: int32 [S, E], tokens that may not come before position `min_length`; padded, too.
      min_length: int32 [S].
      mask: int32 [S, V / 32], a bit for each token that may come, lowest first.
    """

    key: Any
    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    presence: Any
    frequency: Any
    repetition: Any
    bias_ids: Any = None
    bias: Any = None
    stop_ids: Any = None
    min_length: Any = None
    mask: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities of one token a row, and of the likeliest ones.

    Attributes:
      chosen: float32 [R]. rank: int32 [R], 1 for the likeliest.
      top_ids: int32 [R, k]. top: float32 [R, k], falling.
    """

    chosen: Any
    rank: Any
    top_ids: Any
    top: Any


def greedy(logits: jax.Array, vocabulary: Vocabulary = WHOLE) -> jax.Array:
    """[S, V] float32 -> int32 [S], the first of the likeliest tokens."""
    blocks = _blocks(logits, 256, vocabulary)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    chosen = _row_of(blocks, block)
    found = block * blocks.shape[-1] + jnp.argmax(chosen, axis=-1)
    if vocabulary.parts > 1:
        best = vocabulary.gathered(jnp.max(chosen, axis=-1)[:, None])
        ids = vocabulary.gathered(found[:, None] + vocabulary.offset(logits.shape[1]))
        found = _entry_of(ids, jnp.argmax(best, axis=-1))
    return found.astype(jnp.int32)


def add_bias(
    logits: jax.Array,
    rows: SamplingRows,
    positions: jax.Array,
    vocabulary: Vocabulary = WHOLE,
) -> jax.Array:
    """Adds `rows.bias`, and forbids `rows.stop_ids` at `positions` [S] below `rows.min_length`."""
    early = jnp.where(positions < rows.min_length, -jnp.inf, 0.0)
    index = jnp.arange(logits.shape[0])[:, None]
    biased = vocabulary.own(rows.bias_ids, logits.shape[1])
    stops = vocabulary.own(rows.stop_ids, logits.shape[1])
    logits = logits.at[index, biased].add(rows.bias, mode="drop")
    return logits.at[index, stops].add(early[:, None], mode="drop")


def allow(logits: jax.Array, mask: jax.Array, vocabulary: Vocabulary = WHOLE) -> jax.Array:
    """-inf for tokens without a bit in `mask`, see `SamplingRows`."""
    bits = (mask[:, :, None] >> jnp.arange(32)) & 1
    size = logits.shape[1]
    own = lax.dynamic_slice_in_dim(
        bits.reshape(len(mask), -1), vocabulary.offset(size), size, axis=1
    )
    return jnp.where(own != 0, logits, -jnp.inf)


def penalize(
    logits: jax.Array, rows: SamplingRows, seen: jax.Array, counts: jax.Array
) -> jax.Array:
    """Repetition (HF's formula), frequency and presence penalties (OpenAI's).

    Args:
      logits: float32 [S, V].
      seen: bool [S, V], tokens of the prompt. counts: int32 [S, V], of the output.
    """
    generated = counts > 0
    repetition = jnp.where(seen | generated, rows.repetition[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    return logits - rows.frequency[:, None] * counts - rows.presence[:, None] * generated


def keep_top_k(logits: jax.Array, top_k: jax.Array, vocabulary: Vocabulary = WHOLE) -> jax.Array:
    """-inf for all below the k-th largest of each row; k [S], 0 or less keeps all. Ties stay."""
    count = logits.shape[-1] * vocabulary.parts
    k = jnp.where(top_k <= 0, count, jnp.minimum(top_k, count))
    best = _largest_values(logits, vocabulary)
    rank = jnp.minimum(k, best.shape[-1]) - 1
    threshold = lax.cond(
        jnp.all((k <= best.shape[-1]) | (top_k <= 0)),
        lambda: jnp.take_along_axis(best, rank[:, None], axis=-1)[:, 0],
        lambda: _search(logits, lambda above: vocabulary.total(jnp.sum(above, axis=-1)) >= k),
    )
    return jnp.where((logits >= threshold[:, None]) | (top_k <= 0)[:, None], logits, -jnp.inf)


def keep_top_p(logits: jax.Array, top_p: jax.Array, vocabulary: Vocabulary = WHOLE) -> jax.Array:
    """-inf outside the smallest set of likeliest tokens with probability top_p [S]. Ties stay."""
    peak = vocabulary.largest(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - peak)
    sums = vocabulary.gathered(jnp.sum(_blocks(weights, 256, vocabulary), axis=-1))
    wanted = top_p * jnp.sum(sums, axis=-1)
    best = _largest_values(logits, vocabulary)
    reached = jnp.cumsum(jnp.exp(best - peak), axis=-1)
    rank = jnp.sum(reached < wanted[:, None], axis=-1)
    keep_all = top_p >= 1
    threshold = lax.cond(
        jnp.all((rank < best.shape[-1]) | keep_all),
        lambda: jnp.take_along_axis(best, rank[:, None], axis=-1, mode="clip")[:, 0],
        # Where rounding leaves the sum of all short of p, every threshold fails and all stay.
        lambda: _search(
            logits, lambda above: vocabulary.total(jnp.sum(weights * above, axis=-1)) >= wanted
        ),
    )
    return jnp.where((logits >= threshold[:, None]) | keep_all[:, None], logits, -jnp.inf)


def keep_min_p(logits: jax.Array, min_p: jax.Array, vocabulary: Vocabulary = WHOLE) -> jax.Array:
    """-inf for tokens below the fraction min_p [S] of the likeliest one's probability."""
    best = vocabulary.largest(jnp.max(logits, axis=-1, keepdims=True))
    return jnp.where(logits >= best + jnp.log(min_p)[:, None], logits, -jnp.inf)


def sample(
    logits: jax.Array,
    rows: SamplingRows,
    positions: jax.Array,
    vocabulary: Vocabulary = WHOLE,
) -> jax.Array:
    """Draws one token a row.

    Args:
      logits: float32 [S, V], penalties already applied.
      positions: int32 [S], where in its sequence the drawn token will stand: keys the noise.
    Returns:
      int32 [S].
    """
    cold = rows.temperature < MIN_TEMPERATURE
    x = logits / jnp.where(cold, 1.0, rows.temperature)[:, None]
    # A filter that no row asks for costs nothing.
    for wanted, keep, by in (
        (rows.min_p > 0, keep_min_p, rows.min_p),
        (rows.top_k > 0, keep_top_k, rows.top_k),
        (rows.top_p < 1, keep_top_p, rows.top_p),
    ):
        kept = partial(keep, vocabulary=vocabulary)
        x = lax.cond(jnp.any(wanted), kept, lambda x, _: x, x, by)

    def uniform(key, position):
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position)
        return jax.random.uniform(key)

    drawn = _draw(x, jax.vmap(uniform)(rows.key, positions), vocabulary)
    return jnp.where(cold, greedy(logits, vocabulary), drawn)


def _draw(logits: jax.Array, uniform: jax.Array, vocabulary: Vocabulary) -> jax.Array:
    """The token at which the cumulated probabilities of a row pass its number in [0, 1)."""
    peak = vocabulary.largest(jnp.max(logits, axis=-1, keepdims=True))
    blocks = _blocks(jnp.exp(logits - peak), 256, vocabulary)
    sums = vocabulary.gathered(jnp.sum(blocks, axis=-1))
    reached = jnp.cumsum(sums, axis=-1)
    goal = uniform * reached[:, -1]
    block = _first_past(reached, goal, sums > 0)
    before = _entry_of(reached - sums, block)
    own = vocabulary.own(block, blocks.shape[1])
    chosen = _row_of(blocks, jnp.minimum(own, blocks.shape[1] - 1))
    if vocabulary.parts > 1:  # from the device that has it
        chosen = vocabulary.total(jnp.where((own < blocks.shape[1])[:, None], chosen, 0))
    inside = _first_past(jnp.cumsum(chosen, axis=-1), goal - before, chosen > 0)
    return (block * blocks.shape[-1] + inside).astype(jnp.int32)


def _first_past(reached: jax.Array, goal: jax.Array, possible: jax.Array) -> jax.Array:
    """Index of the first sum past the goal [S]; at most, as sums are rounded, the last possible."""
    last = reached.shape[-1] - 1 - jnp.argmax(possible[:, ::-1], axis=-1)
    return jnp.minimum(jnp.sum(reached <= goal[:, None], axis=-1), last)


def token_logprobs(
    logits: jax.Array, tokens: jax.Array, k: int, vocabulary: Vocabulary = WHOLE
) -> TokenLogprobs:
    """Log softmax of `logits` [R, V] at `tokens` int32 [R], and its k largest entries."""
    size = logits.shape[1]
    shifted = logits - vocabulary.largest(jnp.max(logits, axis=-1, keepdims=True))
    total = vocabulary.total(jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True))
    logprobs = shifted - jnp.log(total)
    own = vocabulary.own(tokens, size)
    chosen = _entry_of(logprobs, jnp.minimum(own, size - 1))
    chosen = vocabulary.total(jnp.where(own < size, chosen, 0))[:, None]
    top, top_ids = _largest_entries(logprobs, min(k, size))
    if vocabulary.parts > 1:
        ids = vocabulary.gathered(top_ids + vocabulary.offset(size))
        top, places = lax.top_k(vocabulary.gathered(top), k)
        top_ids = jnp.take_along_axis(ids, places, axis=-1)
    rank = 1 + vocabulary.total(jnp.sum(logprobs > chosen, axis=-1, dtype=jnp.int32))
    return TokenLogprobs(chosen[:, 0], rank, top_ids, top)


def _blocks(x: jax.Array, count: int, vocabulary: Vocabulary = WHOLE) -> jax.Array:
    """[S, V] as [S, up to `count`, block]; of a part, the same blocks where they can be."""
    return x.reshape(x.shape[0], math.gcd(x.shape[1], max(1, count // vocabulary.parts)), -1)


def _entry_of(x: jax.Array, index: jax.Array) -> jax.Array:
    """[S]: of each row of x [S, n] the entry that it names."""
    return jnp.take_along_axis(x, index[:, None], axis=1)[:, 0]


def _row_of(blocks: jax.Array, block: jax.Array) -> jax.Array:
    """[S, block]: of each row of [S, count, block] the block that it names."""
    return jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]


def _largest_entries(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of each row of x [R, V], falling, and where they stand; both [R, k].

    They lie in the k blocks with the largest maxima.
    """
    blocks = _blocks(x, x.shape[1] // 64)
    count, width = blocks.shape[1:]
    if count <= k:
        return lax.top_k(x, k)
    _, chosen = lax.top_k(jnp.max(blocks, axis=-1), k)
    # In the order of the vocabulary, so that of equal ones the first is taken, as in `lax.top_k`.
    chosen = jnp.sort(chosen, axis=-1)
    values = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(len(x), -1)
    places = (chosen[:, :, None] * width + jnp.arange(width)).reshape(len(x), -1)
    top, at = lax.top_k(values, k)
    return top, jnp.take_along_axis(places, at, axis=1)


def _largest_values(logits: jax.Array, vocabulary: Vocabulary) -> jax.Array:
    """The largest values of each row, falling; float32 [S, CANDIDATES or V].

    The c largest values lie in the c blocks with the largest maxima.
    """
    size = logits.shape[-1]
    blocks = _blocks(logits, size // 64)
    if blocks.shape[1] > CANDIDATES:
        _, index = lax.top_k(jnp.max(blocks, axis=-1), CANDIDATES)
        blocks = jnp.take_along_axis(blocks, index[:, :, None], axis=1)
    values = blocks.reshape(logits.shape[0], -1)
    found = lax.top_k(values, min(CANDIDATES, size))[0]
    if vocabulary.parts == 1:
        return found
    everywhere = vocabulary.gathered(found)
    return lax.top_k(everywhere, min(CANDIDATES, everywhere.shape[1]))[0]


def _search(logits: jax.Array, holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest threshold [S] for which `holds`, given the mask of logits from there on.

    Found bit by bit in 32 passes, among the uint32 that sort as the float32 do.
    """
    bits = lax.bitcast_convert_type(logits, jnp.uint32)
    top = jnp.uint32(1 << 31)
    order = jnp.where(bits & top != 0, ~bits, bits | top)

    def body(i, found):
        higher = found | (top >> i.astype(jnp.uint32))
        return jnp.where(holds(order >= higher[:, None]), higher, found)

    found = lax.fori_loop(0, 32, body, jnp.zeros(logits.shape[0], jnp.uint32))
    bits = jnp.where(found & top != 0, found & ~top, ~found)
    # What sorts below -inf stands for a negative NaN, which nothing compares with.
    value = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.isnan(value), -jnp.inf, value)
