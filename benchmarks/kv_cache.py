"""What one step of attention takes with a cache of each dtype, and how much memory a token takes.

    python benchmarks/kv_cache.py [--shape smollm2] [--context 8192] [--sequences 1] [--tokens 1]

Every layer has a cache of its own, full of random numbers, as many as a model has layers, so that
pages come from memory. Machines drift, so dtypes run in turns, and only the ratios of one run mean
something: each is the median over turns of its time to that of bfloat16 in the same turn.
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

from pallas_kernels import dispatch
from pallas_kernels.paged_attention import (
    CACHE_DTYPES,
    AttentionSpec,
    Pages,
    empty,
    paged_attention,
)
from qjax.engine.engine import BLOCK_SIZE

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

    def attend(inputs, k_pages: Pages, v_pages: Pages, tokens: int, length: int):
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
        )

    @partial(jax.jit, static_argnums=(2, 3), donate_argnums=1)
    def step(inputs, cache: list[tuple[Pages, Pages]], tokens: int, length: int):
        """The layers one after the other, as those of a model are."""
        q, k, v = inputs
        for layer, pages in enumerate(cache):
            out, k_pages, v_pages = attend((q, k, v), *pages, tokens, length)
            cache[layer] = k_pages, v_pages
            q = q + 1e-3 * out
        return q, cache

    cache = [(load.empty(dtype), load.empty(dtype)) for _ in range(layers)]
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Attention over caches of each dtype")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--context", type=int, default=8192, help="positions, a multiple of 1024")
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1, help="new ones of each sequence")
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--dtypes", nargs="+", choices=CACHE_DTYPES, default=CACHE_DTYPES[1:])
    options = parser.parse_args()
    load = Load(SHAPES[options.shape], options.context, options.sequences, options.tokens)
    dtypes = list(dict.fromkeys(["bfloat16", *options.dtypes]))
    runs = {dtype: prepare(load, dtype) for dtype in dtypes}
    times: dict[str, list[float]] = {dtype: [] for dtype in dtypes}
    for turn in range(options.turns):
        for i in range(len(dtypes)):  # who is first changes with each turn
            dtype = dtypes[(turn + i) % len(dtypes)]
            times[dtype].append(runs[dtype]())

    print(
        f"{options.shape}, {load.shape[3]} layers, {load.sequences} x {load.tokens} tokens at "
        f"{load.context} positions, by {dispatch.chosen()['paged_attention'][0]}\n"
    )
    print("| cache | ms, median | ms, best | speed to bfloat16 | bytes a token | of bfloat16 |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for dtype, found in times.items():
        ratio = statistics.median(b / t for b, t in zip(times["bfloat16"], found, strict=True))
        size = load.bytes_per_token(dtype)
        print(
            f"| {dtype} | {statistics.median(found) * 1e3:.2f} | {min(found) * 1e3:.2f} | "
            f"{ratio:.2f} | {size:.0f} | {size / load.bytes_per_token('bfloat16'):.3f} |"
        )


if __name__ == "__main__":
    main()
