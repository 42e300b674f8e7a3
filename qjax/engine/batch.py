"""The arrays of one step, built on the host and padded to a few sizes so that little is compiled.

Rows and tokens past the real ones are padding: native kernels skip them, and they write nothing.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike

from qjax.engine.request import Request
from qjax.engine.scheduler import Plan
from qjax.engine.step import StepSpec
from qjax.kv_cache import Batch
from qjax.sampler import SamplingRows

DECODE_ROWS = (1, 8, 32, 128, 512)
PREFILL_TOKENS = (64, 512, 2048, 8192)
PREFILL_ROWS = (1, 32, 128, 512)
CHECK_TOKENS = (8, 32, 128)
BLOCK_TABLE_WIDTHS = tuple(4**i for i in range(2, 13))
BIAS_IDS = (16, 512)
STOP_IDS = (8, 128)


def bucket(sizes: Sequence[int], need: int) -> int:
    """The smallest of the rising `sizes` that holds `need`; `need` itself if none does."""
    return next((size for size in sizes if size >= need), need)


def padded_shape(plan: Plan) -> tuple[int, int]:
    """(tokens T, rows S) of the arrays for a plan."""
    rows = len(plan.requests)
    if not plan.prefill:
        size = bucket(DECODE_ROWS, rows)
        return size, size
    tokens = CHECK_TOKENS if plan.checks else PREFILL_TOKENS
    return bucket(tokens, sum(plan.counts)), bucket(PREFILL_ROWS, rows)


def step_spec(plan: Plan) -> StepSpec:
    """What the step must do for these requests: one of few kinds, which can all be compiled before
    they are wanted."""
    params = [request.params for request in plan.requests]
    full = any(map(_is_full, plan.requests))
    return StepSpec(
        prefill=plan.prefill,
        checks=plan.checks,
        greedy=not full and all(p.greedy for p in params),
        full=full,
        prompt_logprobs=plan.prefill and any(p.prompt_logprobs is not None for p in params),
    )


def _is_full(request: Request) -> bool:
    """Whether its tokens take more than logits and a temperature, or more of them is asked for."""
    params = request.params
    biased = params.logit_bias or params.allowed_token_ids or params.min_tokens
    logprobs = params.logprobs is not None or params.prompt_logprobs is not None
    return bool(params.penalized or biased or logprobs or request.matcher is not None)


def make_batch(plan: Plan, width: int, numerics: str, head_numerics: str) -> Batch:
    """Where each token of the step stands, and in which pages its sequence lives.

    The plan's tokens are already counted in `num_computed`. `width` is that of the block table.
    """
    tokens, rows = padded_shape(plan)
    positions = np.zeros(tokens, np.int32)
    query_start_loc = np.full(rows + 1, sum(plan.counts), np.int32)
    seq_lens = np.zeros(rows, np.int32)
    block_table = np.zeros((rows, width), np.int32)
    start = 0
    for i, (request, count) in enumerate(zip(plan.requests, plan.counts, strict=True)):
        end = request.num_computed - (plan.steps - 1)
        positions[start : start + count] = np.arange(end - count, end)
        query_start_loc[i] = start
        seq_lens[i] = end
        block_table[i, : len(request.blocks)] = request.blocks
        start += count
    arrays = positions, query_start_loc, seq_lens, block_table
    return Batch(*arrays, numerics=numerics, head_numerics=head_numerics)


def make_tokens(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a prefill step and, for logprobs of the prompt, the tokens that follow them.

    Returns:
      tokens, targets: int32 [T]. The token of a sequence that decodes is -1: the device has it. The
        target of a sequence's last known token is 0.
    """
    tokens, targets = np.zeros((2, padded_shape(plan)[0]), np.int32)
    start = 0
    for request, count in zip(plan.requests, plan.counts, strict=True):
        end = request.num_computed
        if end > request.prefill_target and not plan.checks:
            tokens[start] = -1
            start += 1
            continue
        ids = request.known_ids + request.draft
        tokens[start : start + count] = ids[end - count : end]
        following = ids[end - count + 1 : end + 1]
        targets[start : start + len(following)] = following
        start += count
    return tokens, targets


def make_slots(plan: Plan, num_slots: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which rows of the engine's state the sequences own.

    Returns:
      slot: int32 [S], `num_slots` for padding. emits: bool [S], whether the sequence gets a token
      from this step (not so within a chunked prompt). prompt_len: int32 [S].
    """
    rows = padded_shape(plan)[1]
    slot = np.full(rows, num_slots, np.int32)
    emits = np.zeros(rows, bool)
    prompt_len = np.zeros(rows, np.int32)
    for i, request in enumerate(plan.requests):
        slot[i] = num_slots if request.slot is None else request.slot
        emits[i] = not request.wants_prefill
        prompt_len[i] = len(request.prompt_ids)
    return slot, emits, prompt_len


def make_rows(plan: Plan, spec: StepSpec, vocab_size: int) -> SamplingRows:
    """The sampling parameters of the plan's requests; greedy and neutral for padding."""
    count = padded_shape(plan)[1]
    params = [request.params for request in plan.requests]

    def column(name: str, neutral: float, dtype: DTypeLike = np.float32) -> np.ndarray:
        values = np.full(count, neutral, dtype)
        values[: len(params)] = [getattr(p, name) for p in params]
        return values

    key = np.zeros((count, 2), np.uint32)
    key[: len(params)] = [request.key for request in plan.requests]
    return SamplingRows(
        key=key,
        temperature=column("temperature", 0),
        top_k=column("top_k", 0, np.int32),
        top_p=column("top_p", 1),
        min_p=column("min_p", 0),
        presence=column("presence_penalty", 0),
        frequency=column("frequency_penalty", 0),
        repetition=column("repetition_penalty", 1),
        **(_biases(plan.requests, count, vocab_size) if spec.full else {}),
        mask=make_mask(plan, vocab_size) if spec.full else None,
    )


def make_mask(plan: Plan, vocab_size: int) -> np.ndarray:
    """Which tokens may come next, int32 [S, V / 32]: for most requests, all."""
    mask = np.full((padded_shape(plan)[1], -(-vocab_size // 32)), -1, np.int32)
    for row, request in enumerate(plan.requests):
        allowed = request.params.allowed_token_ids
        if allowed is not None:
            bits = np.zeros(32 * mask.shape[1], bool)
            bits[list(allowed)] = True
            mask[row] = np.packbits(bits, bitorder="little").view("<i4")
        if request.matcher is not None:
            mask[row] &= request.token_mask()[: mask.shape[1]]
    return mask


def _biases(requests: Sequence[Request], count: int, vocab_size: int) -> dict[str, np.ndarray]:
    biases = [request.params.logit_bias or {} for request in requests]
    stops = [
        sorted({*(() if r.params.ignore_eos else r.eos_ids), *r.params.stop_token_ids})
        for r in requests
    ]
    several = bucket(BIAS_IDS, max(map(len, biases))), bucket(STOP_IDS, max(map(len, stops)))
    bias_ids, stop_ids = (np.full((count, each), vocab_size, np.int32) for each in several)
    bias = np.zeros(bias_ids.shape, np.float32)
    min_length = np.zeros(count, np.int32)
    for i, request in enumerate(requests):
        bias_ids[i, : len(biases[i])] = list(biases[i])
        bias[i, : len(biases[i])] = list(biases[i].values())
        stop_ids[i, : len(stops[i])] = stops[i]
        if request.matcher is None:  # else it is seen to with the mask
            min_length[i] = len(request.prompt_ids) + request.params.min_tokens
    return {"bias_ids": bias_ids, "bias": bias, "stop_ids": stop_ids, "min_length": min_length}
