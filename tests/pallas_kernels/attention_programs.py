"""Attention of models' sizes over pages of each dtype, to compile for GPUs and TPUs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.paged_attention import CACHE_DTYPES, AttentionSpec, empty, paged_attention
from tests.pallas_kernels.crosscompile import Program

HEADS, KV_HEADS, PAGE = 32, 8, 16


class Size(NamedTuple):
    """Tokens of a step, the sequences that they belong to, and the context of each."""

    tokens: int
    sequences: int
    context: int
    head_dim: int = 128
    window: int | None = None


EVERY_DTYPE = [
    Size(1, 1, 8192),
    Size(32, 32, 2048),
    Size(512, 1, 2048),
    Size(512, 16, 2048, window=100),
]
OTHER_HEADS = [Size(96, 32, 2048, head_dim) for head_dim in (64, 80, 96, 256)]


def program(size: Size, dtype: str, *, exact: bool = False) -> Program:
    """The update of the cache, and attention, by the kernels for the device at hand."""

    def floats(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    tokens, sequences, context, head_dim, window = size
    blocks = context // PAGE
    pages = empty((sequences * blocks, KV_HEADS, PAGE, head_dim), dtype, jax.ShapeDtypeStruct)
    arguments: dict[str, Any] = {
        "q": floats(tokens, HEADS * head_dim),
        "k": floats(tokens, KV_HEADS * head_dim),
        "v": floats(tokens, KV_HEADS * head_dim),
        "k_pages": pages,
        "v_pages": pages,
        "block_table": integers(sequences, blocks),
        "query_start_loc": integers(sequences + 1),
        "seq_lens": integers(sequences),
        "rope": (floats(tokens, head_dim // 2),) * 2,
        "sinks": floats(HEADS),
    }
    if dtype.startswith("fp8"):
        arguments |= {"k_scale": floats(KV_HEADS), "v_scale": floats(1)}
    spec = AttentionSpec(HEADS, KV_HEADS, head_dim, head_dim, head_dim**-0.5, window, 30.0, exact)

    def function(arguments: dict[str, Any]) -> Any:
        own = {"gpu": "triton", "tpu": "tpu"}[platform.device_kind()]
        return partial(paged_attention, spec=spec, implementation=own)(**arguments)

    kind = f"exact {dtype}" if exact else dtype
    name = f"{kind}, {tokens} tokens of {sequences} in {context}, head_dim {head_dim}"
    return Program(name, function, (arguments,))


def programs() -> Iterator[Program]:
    for dtype in CACHE_DTYPES:
        others = OTHER_HEADS if dtype in ("bfloat16", "int8", "int4") else []
        for size in [*EVERY_DTYPE, *others]:
            yield program(size, dtype)
        yield program(Size(96, 32, 2048, 256), dtype, exact=True)
