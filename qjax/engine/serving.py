"""An engine that stays: how large its cache is made, and its programs compiled beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from pallas_kernels import platform
from qjax import host_memory
from qjax.engine.batch import DECODE_ROWS, PREFILL_ROWS, PREFILL_TOKENS
from qjax.engine.engine import BLOCK_SIZE, Engine, model_len
from qjax.engine.replicas import Replicas, one_or_replicas
from qjax.engine.request import OutputText, Request
from qjax.engine.runner import numerics_for
from qjax.engine.sampling_params import SamplingParams
from qjax.engine.scheduler import Plan
from qjax.engine.speculation import SpeculativeConfig
from qjax.errors import RequestError
from qjax.kv_cache import bytes_per_token, cache_dtypes
from qjax.models.parts import cache_config
from qjax.params import Params

MAX_NUM_SEQS = 32  # by default; on accelerators, whose cache is larger, four times as many
MOST_SEQS = DECODE_ROWS[-1]

# A CPU's memory is shared with all that runs beside: vLLM, too, takes 4 GiB unless told otherwise.
CPU_CACHE_BYTES = 4 << 30


def serving_engine(
    params: Params,
    *,
    max_num_seqs: int | None = None,
    max_model_len: int | None = None,
    max_num_batched_tokens: int = 2048,
    gpu_memory_utilization: float = 0.9,
    kv_cache_memory_bytes: int | None = None,
    enable_prefix_caching: bool = True,
    numerics: str = "fast",
    kv_cache_dtype: str = "auto",
    kv_cache_dtype_skip_layers: Sequence[int | str] = (),
    speculative: SpeculativeConfig | None = None,
    seed: int | None = None,
) -> Engine | Replicas:
    """An engine for whatever may come; of a model with several copies, one on each.

    Args:
      max_num_seqs: most sequences that run at a time, of each copy; None for 32, or 128 on an
        accelerator.
      gpu_memory_utilization: the share of an accelerator's memory that weights, cache and what a
        step needs may take together; of a CPU, the share of what is free, at most 4 GiB.
      kv_cache_memory_bytes: or, instead, the size of the cache on each device. No larger one is
        made than sequences of full length can fill.
      max_model_len, max_num_batched_tokens, enable_prefix_caching, numerics, kv_cache_dtype,
        kv_cache_dtype_skip_layers, speculative, seed: see `Engine`.

    Raises:
      RequestError: an argument is out of range, or the cache cannot hold one sequence of full
        length; tells how long one could be.
    """
    if max_num_seqs is None:
        max_num_seqs = MAX_NUM_SEQS if platform.device_kind() == "cpu" else 4 * MAX_NUM_SEQS
    for name, value, low, high in (
        ("max_num_seqs", max_num_seqs, 1, MOST_SEQS),
        ("max_num_batched_tokens", max_num_batched_tokens, 1, PREFILL_TOKENS[-1]),
        ("kv_cache_memory_bytes", kv_cache_memory_bytes, 1, None),
    ):
        if value is not None and (value < low or (high is not None and value > high)):
            wanted = f"at least {low}" if high is None else f"in [{low}, {high}]"
            raise RequestError(f"{name} must be {wanted}, got {value}.")
    share = gpu_memory_utilization
    if not 0 < share <= 1:
        raise RequestError(f"gpu_memory_utilization must be in (0, 1], got {share:g}.")
    limit = model_len(params, max_model_len)
    unrounded = numerics_for(numerics, max_num_seqs).cache_dtype
    dtypes = cache_dtypes(params.config, kv_cache_dtype, unrounded, kv_cache_dtype_skip_layers)
    parts = 1 if params.mesh is None else params.mesh.devices[0].size
    page_bytes = BLOCK_SIZE * bytes_per_token(cache_config(params), dtypes) // parts
    room = kv_cache_memory_bytes
    if room is None:
        room = _free_bytes(params, share, max_num_batched_tokens, max_num_seqs)
    wanted = max_num_seqs * -(-limit // BLOCK_SIZE)
    num_blocks = min(wanted, _rounded(room // page_bytes))
    if num_blocks * BLOCK_SIZE < limit:
        held = num_blocks * BLOCK_SIZE
        shorter = f"max_model_len={held}, " if held else ""
        raise RequestError(
            f"the cache has room for {held:,} tokens ({room / 1e9:.2f} GB at "
            f"{page_bytes // BLOCK_SIZE:,} bytes each), less than one sequence of {limit:,}: pass "
            f"{shorter}a smaller kv_cache_dtype, or a larger kv_cache_memory_bytes."
        )
    make = partial(
        Engine,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_model_len=limit,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=enable_prefix_caching,
        numerics=numerics,
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_dtype_skip_layers=kv_cache_dtype_skip_layers,
        speculative=speculative,
    )
    return one_or_replicas(params, make, seed)


def _rounded(pages: int) -> int:
    """Down to four binary digits: programs are compiled for a size of the cache, and what is free
    is never the same twice."""
    step = 1 << max(0, int(pages).bit_length() - 4)
    return pages // step * step


def _free_bytes(params: Params, share: float, tokens: int, rows: int) -> int:
    """What a cache may take on each device."""
    if platform.device_kind() == "cpu":
        free = host_memory.available()
        return CPU_CACHE_BYTES if free is None else min(CPU_CACHE_BYTES, int(share * free))
    device = jax.devices()[0] if params.mesh is None else params.mesh.devices.flat[0]
    stats: dict[str, Any] = device.memory_stats() or {}
    config = params.config
    # Activations of a step, a few at a time, and the logits of its sequences.
    wide = 4 * max(config.hidden_size, config.intermediate_size)
    step = 4 * (tokens * wide + 4 * rows * config.vocab_size)
    limit = int(share * stats.get("bytes_limit", 0))
    return max(0, limit - stats.get("bytes_in_use", 0) - step)


KINDS = {
    "greedy": SamplingParams(),
    "sampled": SamplingParams(temperature=1.0),
    "full": SamplingParams(logprobs=0),
}


def warm_up(engine: Engine | Replicas, *, progress: bool = True) -> list[str]:
    """Compiles, or reads from disk, the programs of all sizes that steps come in: for greedy and
    for sampled tokens, and for all else that may be asked of these. Logprobs of prompts, guesses
    ahead, and more biases than fit a few still compile when they come.

    Returns:
      What each program is for.
    """
    from tqdm import tqdm  # slow to import

    engines = engine.engines if isinstance(engine, Replicas) else [engine]
    found = []
    for each in engines:
        prepared = [
            (f"{name}, {kind}", each.runner.prepare(plan).program)
            for kind, sampling in KINDS.items()
            for name, plan in _sizes(each, sampling)
        ]
        for name, program in tqdm(prepared, desc="warming up", disable=None if progress else True):
            program.result()
            found.append(name)
    return found


def _sizes(engine: Engine, params: SamplingParams) -> list[tuple[str, Plan]]:
    """A plan of each size, of sequences that do not exist."""
    scheduler = engine.scheduler

    def several(rows: int, tokens: int) -> tuple[Request, ...]:
        """Sequences of so many tokens together, which are all on their way."""
        lengths = [tokens // rows + (i < tokens % rows) for i in range(rows)]
        return tuple(_nobody(engine, params, length) for length in lengths)

    def up_to(sizes: Sequence[int], most: int) -> list[int]:
        return [size for size in sizes if size < most] + [most]

    plans = []
    for rows in up_to(DECODE_ROWS, scheduler.max_num_seqs):
        requests = several(rows, rows)
        plans.append((f"decode of {rows}", Plan(False, requests, (1,) * rows)))
    for tokens in up_to(PREFILL_TOKENS, scheduler.max_num_batched_tokens):
        for rows in up_to(PREFILL_ROWS, min(tokens, scheduler.max_num_seqs)):
            requests = several(rows, tokens)
            counts = tuple(len(each.prompt_ids) for each in requests)
            plans.append((f"prompts of {tokens} in {rows}", Plan(True, requests, counts)))
    return plans


def _nobody(engine: Engine, params: SamplingParams, length: int) -> Request:
    request = Request(
        prompt_ids=(0,) * length,
        params=params,
        text=OutputText(engine.params.tokenizer, params),
        eos_ids=frozenset(),
        max_tokens=1,
        key=np.zeros(2, np.uint32),
    )
    request.advance(length)
    return request
