"""Decode steps to compile for a TPU: none of them may copy the cache."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.paged_attention import CACHE_DTYPES, Basis
from qjax.bench.decode import TINY, random_tree
from qjax.engine.device_cache import cache_formats
from qjax.engine.step import Rows, State, StepSpec, step
from qjax.key_bases import gains_by_basis
from qjax.kv_cache import Batch, init_cache
from qjax.models.config import model_config
from tests.pallas_kernels.crosscompile import Program

# What a sequence may have, so that no layer's cache fits the memory inside of a TPU.
SEQUENCES, PAGES, PAGE_SIZE = 9, 2048, 32
FREE = "as XLA lays it out"
# Instructions of XLA that move what they are given, and how large one number is.
COPIES = re.compile(r"= (\w+?)\[([\d,]+)\]\S* (?:copy|transpose|fusion|reshape|convert)\(")
BYTES = {"f32": 4, "bf16": 2, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1}


def program(dtype: str, head_dim: int, *, free: bool = False) -> Program:
    """`free` leaves it to XLA how the cache lies."""
    config = model_config(TINY | {"head_dim": head_dim})
    with dispatch.use("xla"):
        tree = random_tree(config, "BF16")
    pages = SEQUENCES * PAGES
    matrices = jax.ShapeDtypeStruct((config.num_kv_heads, head_dim, head_dim), jnp.float32)
    basis = Basis(matrices, matrices) if gains_by_basis(dtype) else None
    bases = [basis] * config.num_layers
    cache = init_cache(config, pages, PAGE_SIZE, dtype, jax.ShapeDtypeStruct, bases)

    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    per_row = integers(SEQUENCES)
    batch = Batch(
        per_row, integers(SEQUENCES + 1), per_row, integers(SEQUENCES, PAGES), numerics="bfloat16"
    )
    emits = jax.ShapeDtypeStruct((SEQUENCES,), jnp.bool_)
    rows = Rows(per_row, emits, per_row, None)

    def formats(sharding: Any) -> tuple[Any, Any]:
        kept = cache_formats(cache, sharding)
        return (None, kept, *[None] * 6), (None, kept, None, None)

    def copied(compiled: Any) -> str | None:
        least = min(
            prod(x.values.shape) * x.values.dtype.itemsize for layer in cache for x in layer[:2]
        )
        found = []
        for match in COPIES.finditer(compiled.as_text()):
            size = BYTES.get(match[1], 0) * prod(map(int, match[2].split(",")))
            if size >= least:
                found.append(match[0])
        taken, given = (
            [str(each.layout) for each in jax.tree.leaves(formats)]
            for formats in (compiled.input_formats[0][1], compiled.output_formats[1])
        )
        if taken != given:
            return f"the next step takes {taken}, this one gives {given}"
        temporary = compiled.memory_analysis().temp_size_in_bytes
        if found or temporary >= least:
            return f"{temporary} temporary bytes, {least} of a layer's keys; copies: {found}"
        return None

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    return Program(
        FREE if free else f"{dtype}, head_dim {head_dim}",
        partial(step, config=config, spec=StepSpec(prefill=False)),
        (shapes, cache, State(last=per_row), None, None, batch, rows, integers()),
        formats=None if free else formats,
        donated=(1, 2),
        verdict=copied,
    )


def kept() -> Iterator[Program]:
    for dtype in CACHE_DTYPES:
        for head_dim in (64, 128):
            yield program(dtype, head_dim)


def programs() -> Iterator[Program]:
    yield from kept()
    yield program("bfloat16", 64, free=True)
