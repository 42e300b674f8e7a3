"""Whole decode steps of a model with random weights, as the engine runs them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from qjax.bench.clock import Timing
from qjax.bench.weights import KINDS, on_device
from qjax.engine.device_cache import device_cache
from qjax.engine.runner import numerics_for
from qjax.engine.step import DECODE_STEPS, Rows, State, StepSpec, step_program
from qjax.key_bases import key_bases
from qjax.kv_cache import Batch, bytes_per_token
from qjax.models.config import ModelConfig
from qjax.models.functional import parameter_shapes
from qjax.params import Params

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
}
TINY = LLAMA_8B | {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PAGE_SIZE = 16


def random_tree(config: ModelConfig, kind: str) -> dict[str, Any]:
    """Weights of a dense model: projections of a kind in `KINDS`, embedding and head in bfloat16,
    norms of ones. No float copy of anything quantized is ever made."""
    tree: dict[str, Any] = {}
    for name, shape in parameter_shapes(config).items():
        node, (*path, last) = tree, name.split(".")
        for key in path:
            node = node.setdefault(key, {})
        if len(shape) == 1:
            node[last] = jnp.ones(shape, jnp.float32)
        elif "embed_tokens" in name:
            # Looked up a row at a time, best where it lies.
            node[last] = _canonical(*shape)
        else:
            node[last] = on_device(KINDS["BF16" if "lm_head" in name else kind], *shape)
    return tree


def _canonical(n: int, k: int) -> Any:
    with dispatch.use("xla"):
        return on_device(KINDS["BF16"], n, k)


def prepare(
    params: Params,
    batch_size: int,
    context: int,
    cache_dtype: str,
    page_size: int = PAGE_SIZE,
) -> Callable[[], None]:
    """A function that decodes DECODE_STEPS tokens of each sequence, and waits for them.

    Args:
      context: tokens that each sequence has when the first step ends, each time anew.
    """
    config, numerics = params.config, numerics_for("fast", batch_size)
    width = -(-(context + DECODE_STEPS) // page_size)
    bases = key_bases(params, cache_dtype, numerics.prefill)
    cache, formats = device_cache(params, batch_size * width, page_size, cache_dtype, bases)
    table = np.arange(batch_size * width, dtype=np.int32).reshape(batch_size, width)
    rows = np.arange(batch_size, dtype=np.int32)
    batch = Batch(
        np.full(batch_size, context - 1, np.int32),
        np.arange(batch_size + 1, dtype=np.int32),
        np.full(batch_size, context, np.int32),
        table,
        numerics=numerics.decode,
    )
    batch, slots = jax.device_put((batch, Rows(rows, np.ones(batch_size, bool), rows, None)))
    state = State(last=jnp.zeros(batch_size, jnp.int32))
    run = partial(step_program(formats), config=config, spec=StepSpec(prefill=False))
    count = np.int32(DECODE_STEPS)

    def decode() -> None:
        nonlocal cache, state
        _, cache, state, _ = jax.block_until_ready(
            run(params.tree, cache, state, None, None, batch, slots, count)
        )

    return decode


def seconds(
    params: Params, batch_size: int, context: int, cache_dtype: str, timing: Timing
) -> tuple[float, int]:
    """Median time of one decode step, and the bytes of weights and cache that it reads.

    Args:
      context: see `prepare`.
    """
    decode = prepare(params, batch_size, context, cache_dtype)
    samples: list[float] = []
    begin = timing.now()
    # The first time compiles.
    while len(samples) < 2 or (
        len(samples) <= timing.repeats and timing.now() - begin < 20 * timing.limit_seconds
    ):
        start = timing.now()
        decode()
        samples.append(timing.now() - start)
    tree = params.tree
    embedding = sum(x.nbytes for x in jax.tree.leaves(tree["model"]["embed_tokens"]))
    weights = sum(x.nbytes for x in jax.tree.leaves(tree)) - embedding
    cached = (
        batch_size * (context + DECODE_STEPS // 2) * bytes_per_token(params.config, cache_dtype)
    )
    return float(np.median(samples[1:])) / DECODE_STEPS, weights + cached
