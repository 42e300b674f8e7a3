"""One step of the engine as a pure function: tokens through the model, one new token a sequence.

Prefill, chunked prefill and decode are the same function. Decode takes its tokens from the state
that the step before left on the device, and returns the next step's batch, so that decoding moves
nothing to the device and waits for nothing from it.
"""

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from qjax import sampler
from qjax.engine.sampling_params import MAX_LOGPROBS
from qjax.kv_cache import Batch
from qjax.models import functional
from qjax.models.config import ModelConfig
from qjax.models.parts import Parts
from qjax.ops.vocabulary import Vocabulary
from qjax.sampler import TokenLogprobs

# Most tokens of a sequence that one dispatch decodes. The host's work for a dispatch costs a third
# of a small model's step on a CPU; a sequence that ends is seen up to twice as many tokens late.
DECODE_STEPS = 8


@dataclass(frozen=True)
class StepSpec:
    """What a step must do; each combination is one compiled program for each shape."""

    prefill: bool
    checks: bool = False
    greedy: bool = True
    full: bool = False  # with penalties, biases, masks and logprobs
    prompt_logprobs: bool = False


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What stays on the device for each slot from step to step.

    Attributes:
      last: int32 [slots], the newest token.
      seen: bool [slots, V], tokens of the prompt; None in all but full steps.
      counts: int32 [slots, V], how often each token was generated; None likewise.
    """

    last: Any
    seen: Any = None
    counts: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """What a step knows of its sequences beside the batch, see `batch.make_slots`."""

    slot: Any
    emits: Any
    prompt_len: Any
    sampling: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepOutput:
    """What a step found; the leading axis N is 1 after prefill and DECODE_STEPS after decode.

    Attributes:
      tokens: int32 [N, S]; of decode only the first `count` rows. [1, T] where guesses are checked:
        what follows each token.
      logprobs: of the tokens [N, S, ...], or None.
      prompt_logprobs: of T targets, or None.
    """

    tokens: Any
    logprobs: Any
    prompt_logprobs: Any


def step(
    tree: Any,
    cache: Any,
    state: State,
    tokens: Any,
    targets: Any,
    batch: Batch,
    rows: Rows,
    count: jax.Array | None,
    *,
    config: ModelConfig,
    spec: StepSpec,
) -> tuple[StepOutput, Any, State, Batch | None]:
    """Runs the model on a batch and picks the next token, or tokens, of each sequence.

    Args:
      tree: the model's weights. cache: its paged cache; donated. state: donated.
      tokens: int32 [T], -1 for a sequence's newest token; None for decode, which takes those alone.
      targets: int32 [T], the tokens that follow; only for logprobs of the prompt.
      count: int32 [], how many tokens to decode one after the other, at most DECODE_STEPS; None for
        prefill.

    Returns:
      (output, cache, state, batch of the next decode step, or None after prefill).
    """
    if not spec.prefill:
        assert count is not None
        return _decode(tree, cache, state, batch, rows, count, config, spec)
    given = tokens >= 0
    newest = state.last.at[rows.slot].get(mode="clip")
    tokens = jnp.where(given, tokens, newest[_row_of_token(batch)])
    hidden, cache = functional.run(config, tree, tokens, batch, cache)
    prompt_logprobs = None
    if spec.prompt_logprobs:
        logits = functional.logits(config, tree, hidden, batch)
        vocabulary = Vocabulary.of(batch.parallel)
        prompt_logprobs = sampler.token_logprobs(logits, targets, MAX_LOGPROBS, vocabulary)
    if spec.checks:
        picked, state = _check(config, tree, hidden, state, tokens, batch, rows, spec)
        return StepOutput(picked[None], None, None), cache, state, None
    hidden = hidden[jnp.maximum(batch.query_start_loc[1:] - 1, 0)]
    logits = functional.logits(config, tree, hidden, batch)
    if spec.full:
        state = _count_prompt(state, tokens, given, batch, rows)
    picked, logprobs, state = _emit(logits, state, batch, rows, spec)
    picked, logprobs = jax.tree.map(lambda x: x[None], (picked, logprobs))
    return StepOutput(picked, logprobs, prompt_logprobs), cache, state, None


@lru_cache
def step_program(
    cache_formats: Any = None, mesh: Mesh | None = None, all_reduce: str = "float32"
) -> Any:
    """`step` under `jax.jit`, its cache and state donated, `config` and `spec` static.

    Args:
      cache_formats: see `qjax.engine.device_cache`; the cache that comes in has them already.
      mesh: over which the weights are split; each device then takes the step for its part, inside
        of a `jax.shard_map`, and sums are sent as `all_reduce` says (see `Parallel`).
    """
    return jax.jit(
        step if mesh is None else partial(_step_of_parts, mesh=mesh, all_reduce=all_reduce),
        static_argnames=("config", "spec"),
        donate_argnames=("cache", "state"),
        out_shardings=None if cache_formats is None else (None, cache_formats, None, None),
    )


def _step_of_parts(
    tree: Any,
    cache: Any,
    state: State,
    *arguments: Any,
    config: ModelConfig,
    spec: StepSpec,
    mesh: Mesh,
    all_reduce: str,
) -> tuple[StepOutput, Any, State, Batch | None]:
    """`step`, with the same arguments, of split weights."""
    parts = Parts(mesh, config, all_reduce)

    def own(leaves: Any, cache: Any, state: State, *arguments: Any) -> Any:
        tokens, targets, batch, rows, count = arguments
        *found, following = step(
            parts.tree(tree, leaves),
            *(cache, state, tokens, targets, parts.batch(batch), rows, count),
            config=parts.config,
            spec=spec,
        )
        return *found, None if following is None else replace(following, parallel=None)

    cached, kept = parts.cache_specs(cache), state_specs(state, parts)
    return jax.shard_map(
        own,
        mesh=mesh,
        in_specs=(
            parts.specs(tree),
            *(cached, kept, P(), P(), P(), P(), P()),
        ),
        out_specs=(P(), cached, kept, P()),
        check_vma=False,
    )(jax.tree.leaves(tree), cache, state, *arguments)


def state_specs(state: State, parts: Parts) -> State:
    """Which axes of the mesh a state is split over: it has a column for each token."""
    of_vocabulary = P(None, parts.vocabulary)
    return jax.tree.map(lambda x: of_vocabulary if len(x.shape) == 2 else P(), state)


def _decode(
    tree: Any,
    cache: Any,
    state: State,
    batch: Batch,
    rows: Rows,
    count: jax.Array,
    config: ModelConfig,
    spec: StepSpec,
) -> tuple[StepOutput, Any, State, Batch]:
    """`count` tokens for each sequence, each fed back: the host has a rest meanwhile."""

    def once(i: jax.Array, carry: Any) -> Any:
        output, cache, state, batch = carry
        tokens = state.last.at[rows.slot].get(mode="clip")
        hidden, cache = functional.run(config, tree, tokens, batch, cache)
        logits = functional.logits(config, tree, hidden, batch)
        *found, state = _emit(logits, state, batch, rows, spec)
        output = jax.tree.map(lambda all_, one: all_.at[i].set(one), output, tuple(found))
        batch = replace(
            batch,
            positions=batch.positions + 1,
            seq_lens=batch.seq_lens + (batch.seq_lens > 0),
        )
        return output, cache, state, batch

    size = len(batch.seq_lens)
    output = jnp.zeros((DECODE_STEPS, size), jnp.int32), None
    if spec.full:
        shape = DECODE_STEPS, size
        numbers, ids = jnp.zeros(shape), jnp.zeros(shape, jnp.int32)
        several = (*shape, MAX_LOGPROBS)
        top, top_ids = jnp.zeros(several), jnp.zeros(several, jnp.int32)
        output = output[0], TokenLogprobs(numbers, ids, top_ids, top)
    carry = lax.fori_loop(0, count, once, (output, cache, state, batch))
    (picked, logprobs), cache, state, batch = carry
    return StepOutput(picked, logprobs, None), cache, state, batch


def _emit(
    logits: jax.Array, state: State, batch: Batch, rows: Rows, spec: StepSpec
) -> tuple[jax.Array, TokenLogprobs | None, State]:
    """(new tokens int32 [S], their logprobs if asked, the state with them entered)."""
    vocabulary = Vocabulary.of(batch.parallel)
    picked = _pick(logits, state, batch, rows, spec, vocabulary)
    logprobs = None
    if spec.full:
        logprobs = sampler.token_logprobs(logits, picked, MAX_LOGPROBS, vocabulary)
    emitting = jnp.where(rows.emits, rows.slot, state.last.shape[0])
    state = replace(state, last=state.last.at[emitting].set(picked, mode="drop"))
    if spec.full:
        own = vocabulary.own(picked, logits.shape[1])
        counts = state.counts.at[emitting, own].add(1, mode="drop")
        state = replace(state, counts=counts)
    return picked, logprobs, state


def _check(
    config: ModelConfig,
    tree: Any,
    hidden: jax.Array,
    state: State,
    tokens: jax.Array,
    batch: Batch,
    rows: Rows,
    spec: StepSpec,
) -> tuple[jax.Array, State]:
    """What follows each token, int32 [T], and the state with the newest tokens: those that follow
    the last guess of each sequence that was right, and all guesses before which were."""
    vocabulary = Vocabulary.of(batch.parallel)
    logits = functional.logits(config, tree, hidden, batch)
    row = _row_of_token(batch)
    if spec.greedy:
        picked = sampler.greedy(logits, vocabulary)
    else:
        sampling = jax.tree.map(lambda x: x[row], rows.sampling)
        picked = sampler.sample(logits, sampling, batch.positions + 1, vocabulary)
    index = jnp.arange(tokens.shape[0])
    right = (picked == jnp.roll(tokens, -1)) & (index < batch.query_start_loc[1:][row] - 1)
    wrong = jnp.where(right, tokens.shape[0] - 1, index)
    last = jax.ops.segment_min(wrong, row, rows.slot.shape[0], indices_are_sorted=True)
    last = jnp.minimum(last, tokens.shape[0] - 1)  # of a row without tokens
    emitting = jnp.where(rows.emits, rows.slot, state.last.shape[0])
    newest = state.last.at[emitting].set(picked[last], mode="drop")
    return picked, replace(state, last=newest)


def step_results(spec: StepSpec, cache: Any, state: State, batch: Batch) -> Any:
    """A pytree with the structure of what `step` returns; its leaves mean nothing."""
    logprobs = TokenLogprobs(0, 0, 0, 0)
    output = StepOutput(
        tokens=0,
        logprobs=logprobs if spec.full else None,
        prompt_logprobs=logprobs if spec.prompt_logprobs else None,
    )
    return output, cache, state, None if spec.prefill else batch


def _pick(
    logits: jax.Array,
    state: State,
    batch: Batch,
    rows: Rows,
    spec: StepSpec,
    vocabulary: Vocabulary,
) -> jax.Array:
    if spec.greedy:
        return sampler.greedy(logits, vocabulary)
    # The new token stands right after the tokens so far.
    positions = batch.seq_lens
    if spec.full:
        logits = sampler.add_bias(logits, rows.sampling, positions, vocabulary)
        seen = state.seen.at[rows.slot].get(mode="clip")
        counts = state.counts.at[rows.slot].get(mode="clip")
        logits = sampler.penalize(logits, rows.sampling, seen, counts)
        logits = sampler.allow(logits, rows.sampling.mask, vocabulary)
    return sampler.sample(logits, rows.sampling, positions, vocabulary)


def _row_of_token(batch: Batch) -> jax.Array:
    """int32 [T]: the row of each token's sequence; for padding, some other row."""
    ends = batch.query_start_loc[1:]
    index = jnp.arange(batch.positions.shape[0])
    return jnp.minimum(jnp.searchsorted(ends, index, side="right"), ends.shape[0] - 1)


def _count_prompt(
    state: State, tokens: jax.Array, given: jax.Array, batch: Batch, rows: Rows
) -> State:
    """Enters a chunk's tokens: those of the prompt as seen, those generated before as counted.

    `given` [T] tells them from tokens that a step before sampled, and counted.
    """
    nowhere = state.last.shape[0]
    starts, ends = batch.query_start_loc[:-1], batch.query_start_loc[1:]
    fresh = jnp.where(batch.seq_lens == ends - starts, rows.slot, nowhere)
    seen = state.seen.at[fresh].set(False, mode="drop")
    counts = state.counts.at[fresh].set(0, mode="drop")

    index = jnp.arange(tokens.shape[0])
    row = _row_of_token(batch)
    slot = jnp.where(given & (index < ends[-1]), rows.slot[row], nowhere)
    generated = batch.positions >= rows.prompt_len[row]
    tokens = Vocabulary.of(batch.parallel).own(tokens, seen.shape[1])
    seen = seen.at[jnp.where(generated, nowhere, slot), tokens].set(True, mode="drop")
    counts = counts.at[jnp.where(generated, slot, nowhere), tokens].add(1, mode="drop")
    return replace(state, seen=seen, counts=counts)


@partial(jax.jit, donate_argnums=0)
def enter_known(state: State, slot: jax.Array, seen: jax.Array, counts: jax.Array) -> State:
    """The state with the tokens of pages that a sequence found in the cache; `seen` bool [V] of its
    prompt, `counts` int32 [V] of what it generated before."""
    return replace(
        state, seen=state.seen.at[slot].set(seen), counts=state.counts.at[slot].set(counts)
    )
