"""What one step takes with a cache of each dtype, and how much memory a token takes.

    python benchmarks/kv_cache.py [--shape smollm2] [--context 8192] [--sequences 1] [--tokens 1]
    python benchmarks/kv_cache.py --model smollm2-135m [--context 8184] [--sequences 1]

The first is attention alone. Every layer has a cache of its own, full of random numbers, as many as
a model has layers, so that pages come from memory. The second decodes with a whole model, in steps
as the engine's, at most at the longest context that the model takes. Machines drift, so dtypes run
in turns, and only the ratios of one run mean something: each is the median over turns of its time
to that of bfloat16 in the same turn.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from pallas_kernels import dispatch
from pallas_kernels.paged_attention import (
    CACHE_DTYPES,
    AttentionSpec,
    Basis,
    Pages,
    empty,
    paged_attention,
)
from qjax.bench import decode
from qjax.engine.engine import BLOCK_SIZE
from qjax.engine.step import DECODE_STEPS
from qjax.key_bases import gains_by_basis
from qjax.kv_cache import bytes_per_token

# Query heads, KV heads, head_dim, layers.
SHAPES = {"smollm2": (9, 3, 64, 30), "8b": (32, 8, 128, 8)}


@dataclass(frozen=True)
class Load:
    """`tokens` new tokens for each of `sequences` sequences that are `context` long with them."""

    shape: tuple[int, int, int, int]
    context: int
    sequences: int
    tokens: int

    @property
    def pages(self) -> int:
        return self.sequences * -(-self.context // BLOCK_SIZE)

    def empty(self, dtype: str) -> Pages:
        _, kv_heads, head_dim, _ = self.shape
        return empty((self.pages, kv_heads, BLOCK_SIZE, head_dim), dtype)

    def bytes_per_token(self, dtype: str) -> float:
        pages = jax.eval_shape(partial(self.empty, dtype))
        size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(pages))
        return 2 * self.shape[3] * size / (self.pages * BLOCK_SIZE)


def prepare(load: Load, dtype: str) -> Callable[[], float]:
    """A function that runs one step over all layers and returns its seconds."""
    heads, kv_heads, head_dim, layers = load.shape
    spec = AttentionSpec(heads, kv_heads, head_dim, head_dim, head_dim**-0.5)
    random = np.random.default_rng(0)
    table = jnp.arange(load.pages, dtype=jnp.int32).reshape(load.sequences, -1)

    def draw(tokens: int, heads: int) -> jax.Array:
        return jnp.asarray(random.standard_normal((tokens, heads * head_dim)), jnp.float32)

    def inputs(tokens: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        return draw(tokens, heads), draw(tokens, kv_heads), draw(tokens, kv_heads)

    def basis() -> Basis | None:
        """Of one layer, where the engine would have one (see `qjax.key_bases`)."""
        if not gains_by_basis(dtype):
            return None
        matrix = random.standard_normal((kv_heads, head_dim, head_dim))
        turn = jnp.asarray(np.linalg.qr(matrix)[0], jnp.float32)
        return Basis(turn, turn.copy())  # both are donated

    def attend(inputs, k_pages: Pages, v_pages: Pages, basis, tokens: int, length: int):
        q, k, v = inputs
        return paged_attention(
            q,
            k,
            v,
            k_pages,
            v_pages,
            spec=spec,
            block_table=table,
            query_start_loc=jnp.arange(load.sequences + 1, dtype=jnp.int32) * tokens,
            seq_lens=jnp.full(load.sequences, length, jnp.int32),
            basis=basis,
        )

    @partial(jax.jit, static_argnums=(2, 3), donate_argnums=1)
    def step(inputs, cache: list[tuple[Pages, Pages, Basis | None]], tokens: int, length: int):
        """The layers one after the other, as those of a model are."""
        q, k, v = inputs
        for layer, (k_pages, v_pages, own) in enumerate(cache):
            out, k_pages, v_pages = attend((q, k, v), k_pages, v_pages, own, tokens, length)
            cache[layer] = k_pages, v_pages, own
            q = q + 1e-3 * out
        return q, cache

    cache = [(load.empty(dtype), load.empty(dtype), basis()) for _ in range(layers)]
    chunk = min(1024, load.context)
    for end in range(chunk, load.context + 1, chunk):
        cache = step(inputs(load.sequences * chunk), cache, chunk, end)[1]
    new = inputs(load.sequences * load.tokens)

    def run() -> float:
        nonlocal cache
        start = time.perf_counter()
        out, cache = step(new, cache, load.tokens, load.context)
        out.block_until_ready()
        return time.perf_counter() - start

    run()
    return run


def whole_model(
    params: qjax.Params, context: int, sequences: int, dtype: str
) -> Callable[[], float]:
    """A function that decodes with a whole model and returns the seconds of one step."""
    steps = decode.prepare(params, sequences, context, dtype, BLOCK_SIZE)

    def run() -> float:
        start = time.perf_counter()
        steps()
        return (time.perf_counter() - start) / DECODE_STEPS

    run()
    return run


def in_turns(runs: dict[str, Callable[[], float]], turns: int) -> dict[str, list[float]]:
    """Seconds of each run; who is first changes with each turn."""
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            times[name].append(runs[name]())
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description="Attention, or models, with caches of each dtype")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--shape", choices=SHAPES, default="smollm2")
    what.add_argument("--model", help="decode with all of it: whatever `qjax.load` takes")
    parser.add_argument("--context", type=int, default=8192, help="positions, a multiple of 1024")
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1, help="new ones of each, not of a model")
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--dtypes", nargs="+", choices=CACHE_DTYPES, default=CACHE_DTYPES[1:])
    options = parser.parse_args()
    dtypes = list(dict.fromkeys(["bfloat16", *options.dtypes]))
    if options.model:
        params = qjax.load(options.model)
        config = params.config
        context = min(options.context, config.max_position_embeddings - DECODE_STEPS)
        title = f"{options.model}, decoding {options.sequences} at {context} positions"
        runs = {d: whole_model(params, context, options.sequences, d) for d in dtypes}
        sizes = {d: float(bytes_per_token(config, d)) for d in dtypes}
    else:
        load = Load(SHAPES[options.shape], options.context, options.sequences, options.tokens)
        title = f"{options.shape}, {load.shape[3]} layers, {load.sequences} x {load.tokens} tokens"
        title += f" at {load.context} positions"
        runs = {d: prepare(load, d) for d in dtypes}
        sizes = {d: load.bytes_per_token(d) for d in dtypes}
    times = in_turns(runs, options.turns)

    print(f"{title}, by {dispatch.chosen()['paged_attention'][0]}\n")
    print("| cache | ms, median | ms, best | speed to bfloat16 | bytes a token | of bfloat16 |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for dtype, found in times.items():
        ratio = statistics.median(b / t for b, t in zip(times["bfloat16"], found, strict=True))
        print(
            f"| {dtype} | {statistics.median(found) * 1e3:.2f} | {min(found) * 1e3:.2f} | "
            f"{ratio:.2f} | {sizes[dtype]:.0f} | {sizes[dtype] / sizes['bfloat16']:.3f} |"
        )


if __name__ == "__main__":
    main()
