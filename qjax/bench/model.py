"""How fast a model runs here: prompts of some lengths, decoding at some batch sizes.

Decoding is held against the memory bandwidth measured in the same run, since what limits it is
reading the weights, once a step, and the cache of each sequence.
"""

import csv
import io
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial

import jax
import numpy as np

from qjax.api import engine_for
from qjax.bench.bandwidth import memory_bandwidth
from qjax.engine.engine import Engine
from qjax.engine.request import Request
from qjax.engine.sampling_params import SamplingParams
from qjax.kv_cache import bytes_per_token
from qjax.params import Params

# Long enough that a decode step is what a conversation would see, short enough to cost nothing.
DECODE_PROMPT = 8


@dataclass(frozen=True)
class BenchRow:
    """One measurement.

    Attributes:
      test: "pp512" is a prompt of 512 tokens, "tg128" decoding of 128 tokens.
      batch: sequences at a time.
      tokens_per_second, sd: over all sequences; mean and standard deviation over the repeats.
      compile_seconds: spent compiling, before the repeats and not part of them.
      cache: what keys and values are held in, see `qjax.kv_cache.CACHE_DTYPES`.
      cache_bytes: that all sequences take in it at their end.
      bandwidth: bytes/s that memory gives, measured beside it; 0 where it is not the limit.
      bandwidth_share: bytes/s of weights and cache that decoding reads, as a fraction of it.
    """

    test: str
    batch: int
    tokens_per_second: float
    sd: float
    compile_seconds: float
    cache: str
    cache_bytes: int
    bandwidth: float = 0.0
    bandwidth_share: float = 0.0


def run(
    params: Params,
    *,
    prompt_lengths: Sequence[int] = (512, 2048),
    generate: int = 128,
    batches: Sequence[int] = (1, 8, 32),
    repeats: int = 5,
    numerics: str = "fast",
    kv_cache_dtype: str = "auto",
) -> list[BenchRow]:
    """Measures a model; token ids are random, and end-of-sequence tokens do not end anything.

    Args:
      numerics, kv_cache_dtype: see `qjax.generate`.
    """
    measure = partial(
        _measure, params, repeats=repeats, numerics=numerics, kv_cache_dtype=kv_cache_dtype
    )
    rows = [measure(f"pp{length}", length, 1, 1) for length in prompt_lengths]
    for batch in batches if generate else ():
        row = measure(f"tg{generate}", DECODE_PROMPT, generate + 1, batch)
        found = memory_bandwidth()
        ended = DECODE_PROMPT + generate + 1
        cached = row.cache_bytes * (DECODE_PROMPT + generate / 2) / ended
        share = (weight_bytes(params) + cached) * row.tokens_per_second / batch / found
        rows.append(replace(row, bandwidth=found, bandwidth_share=share))
    return rows


def table(rows: Sequence[BenchRow], output: str) -> str:
    """The measurements as "md", "csv" or "json"."""
    if output == "json":
        return json.dumps([asdict(row) for row in rows], indent=2)
    if output == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([field.name for field in fields(BenchRow)])
        writer.writerows(asdict(row).values() for row in rows)
        return text.getvalue().rstrip("\n")
    lines = [
        "| test | batch | tokens/s | compile s | cache | cache MB | share of memory bandwidth |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for row in rows:
        share = (
            f"{row.bandwidth_share:.0%} of {row.bandwidth / 1e9:.1f} GB/s" if row.bandwidth else ""
        )
        speed = f"{row.tokens_per_second:.1f} ± {row.sd:.1f}"
        lines.append(
            f"| {row.test} | {row.batch} | {speed} | {row.compile_seconds:.2f} | {row.cache} | "
            f"{row.cache_bytes / 1e6:.1f} | {share} |"
        )
    return "\n".join(lines)


def weight_bytes(params: Params) -> int:
    """Bytes of weights that a decode step reads: all but an embedding that is not the head too."""
    embedding = params.tree["model"]["embed_tokens"]
    unread = sum(x.nbytes for x in jax.tree.leaves(embedding)) if "lm_head" in params.tree else 0
    return params.nbytes - unread


def _measure(
    params: Params,
    test: str,
    length: int,
    max_tokens: int,
    batch: int,
    *,
    repeats: int,
    numerics: str,
    kv_cache_dtype: str,
) -> BenchRow:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    random = np.random.default_rng(0)

    def prompts() -> list[tuple[int, ...]]:
        """New ones each time: the cache remembers those that it has read."""
        ids = random.integers(0, params.config.vocab_size, (batch, length))
        return [tuple(row) for row in ids.tolist()]

    engine = engine_for(
        params,
        prompts(),
        sampling,
        numerics=numerics,
        kv_cache_dtype=kv_cache_dtype,
        together=True,  # else the last would decode alone
    )
    assert isinstance(engine, Engine)  # one copy of the model
    time_of = _prompt_seconds if max_tokens == 1 else _decode_seconds
    time_of(engine, prompts(), sampling)
    compiling = engine.runner.compile_seconds
    tokens = batch * (length if max_tokens == 1 else max_tokens - 1)
    rates = [tokens / time_of(engine, prompts(), sampling) for _ in range(repeats)]
    sd = statistics.stdev(rates) if len(rates) > 1 else 0.0
    dtypes = engine.runner.cache_dtypes
    size = batch * (length + max_tokens) * bytes_per_token(params.config, dtypes)
    cache = ", ".join(dict.fromkeys(dtypes))
    return BenchRow(test, batch, statistics.fmean(rates), sd, compiling, cache, size)


def _prompt_seconds(engine: Engine, prompts: list, sampling: SamplingParams) -> float:
    start = time.perf_counter()
    for prompt in prompts:
        engine.add(prompt, sampling)
    while engine.busy:
        engine.step()
    return time.perf_counter() - start


def _decode_seconds(engine: Engine, prompts: list, sampling: SamplingParams) -> float:
    requests: list[Request] = [engine.add(prompt, sampling) for prompt in prompts]
    while not all(request.output_ids for request in requests):
        engine.step()
    start = time.perf_counter()
    while engine.busy:
        engine.step()
    return time.perf_counter() - start
