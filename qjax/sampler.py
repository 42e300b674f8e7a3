"""From logits to tokens: pure functions of arrays.

The order is vLLM's: biases and penalties on the raw logits, then temperature, min_p, top_k and
top_p. A token is drawn with the Gumbel-max trick, with noise keyed by the request and the position,
so that a result does not depend on what else is in the batch.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

# vLLM takes temperatures below this as greedy: dividing by them overflows.
MIN_TEMPERATURE = 1e-5


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingRows:
    """The sampling parameters of a batch, one row a sequence.

    Attributes:
      key: uint32 [S, 2], each request's own random key.
      temperature, top_p, min_p: float32 [S]; temperature 0 is greedy.
      top_k: int32 [S]; 0 or less keeps all.
      presence, frequency, repetition: float32 [S], penalties.
      bias: float32 [S, V] added to the logits (-inf forbids a token), or None.
      stop_ids: int32 [S, E], tokens that may not come before position `min_length`, padded with
        numbers past the vocabulary; None with `bias`.
      min_length: int32 [S]; None with `bias`.
    """

    key: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    presence: jax.Array
    frequency: jax.Array
    repetition: jax.Array
    bias: jax.Array | None = None
    stop_ids: jax.Array | None = None
    min_length: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities of one token a row, and of the likeliest ones.

    Attributes:
      chosen: float32 [R]. rank: int32 [R], 1 for the likeliest.
      top_ids: int32 [R, k]. top: float32 [R, k], falling.
    """

    chosen: jax.Array
    rank: jax.Array
    top_ids: jax.Array
    top: jax.Array


def greedy(logits: jax.Array) -> jax.Array:
    """[S, V] float32 -> int32 [S], the first of the likeliest tokens."""
    # Two plain reductions: XLA vectorizes them on a CPU, unlike argmax.
    vocabulary = logits.shape[-1]
    best = jnp.max(logits, axis=-1, keepdims=True)
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    first = jnp.min(jnp.where(logits == best, ids, vocabulary), axis=-1)
    return jnp.minimum(first, vocabulary - 1)


def add_bias(logits: jax.Array, rows: SamplingRows, positions: jax.Array) -> jax.Array:
    """Adds `rows.bias` and forbids `rows.stop_ids` at `positions` [S] below `rows.min_length`."""
    early = jnp.where(positions < rows.min_length, -jnp.inf, 0.0)
    index = jnp.arange(logits.shape[0])[:, None]
    return (logits + rows.bias).at[index, rows.stop_ids].add(early[:, None], mode="drop")


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


def keep_top_k(logits: jax.Array, top_k: jax.Array) -> jax.Array:
    """-inf for all below the k-th largest of each row; k [S], 0 or less keeps all. Ties stay."""
    vocabulary = logits.shape[-1]
    k = jnp.where(top_k <= 0, vocabulary, jnp.minimum(top_k, vocabulary))
    order = _ordered(logits)
    threshold = _largest(lambda t: jnp.sum(order >= t[:, None], axis=-1) >= k, logits.shape[0])
    return jnp.where(order >= threshold[:, None], logits, -jnp.inf)


def keep_top_p(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """-inf outside the smallest set of likeliest tokens with probability top_p [S]. Ties stay."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    order = _ordered(logits)

    def reached(t):
        return jnp.sum(jnp.where(order >= t[:, None], probabilities, 0.0), axis=-1) >= top_p

    # The largest threshold whose set holds top_p. Sums that fall short of 1 by rounding give 0.
    threshold = _largest(reached, logits.shape[0])
    kept = (order >= threshold[:, None]) | (top_p >= 1.0)[:, None]
    return jnp.where(kept, logits, -jnp.inf)


def keep_min_p(logits: jax.Array, min_p: jax.Array) -> jax.Array:
    """-inf for tokens below the fraction min_p [S] of the likeliest one's probability."""
    best = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where(logits >= best + jnp.log(min_p)[:, None], logits, -jnp.inf)


def sample(logits: jax.Array, rows: SamplingRows, positions: jax.Array) -> jax.Array:
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
    x = lax.cond(jnp.any(rows.min_p > 0), keep_min_p, lambda x, _: x, x, rows.min_p)
    x = lax.cond(jnp.any(rows.top_k > 0), keep_top_k, lambda x, _: x, x, rows.top_k)
    x = lax.cond(jnp.any(rows.top_p < 1), keep_top_p, lambda x, _: x, x, rows.top_p)

    def noise(key, position):
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position)
        return jax.random.gumbel(key, logits.shape[-1:])

    return jnp.where(cold, greedy(logits), greedy(x + jax.vmap(noise)(rows.key, positions)))


def token_logprobs(logits: jax.Array, tokens: jax.Array, k: int) -> TokenLogprobs:
    """Log softmax of `logits` [R, V] at `tokens` int32 [R], and its k largest entries."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)
    top, top_ids = lax.top_k(logprobs, k)
    rank = 1 + jnp.sum(logprobs > chosen, axis=-1, dtype=jnp.int32)
    return TokenLogprobs(chosen[:, 0], rank, top_ids, top)


def _ordered(x: jax.Array) -> jax.Array:
    """uint32 that sorts as the float32 x does."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest(holds, num_rows: int) -> jax.Array:
    """The largest uint32 t [S] for which a predicate that fails from some t on still holds, bit by
    bit: 32 passes over the logits, which on a CPU cost far less than sorting them."""

    def body(i, t):
        higher = t | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(holds(higher), higher, t)

    return lax.fori_loop(0, 32, body, jnp.zeros(num_rows, jnp.uint32))
