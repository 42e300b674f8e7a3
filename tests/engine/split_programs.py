"""Steps of a split model to compile for several devices that are not here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.bench.decode import TINY, random_tree
from qjax.engine.device_cache import cache_formats, cache_shapes
from qjax.engine.step import Rows, State, StepSpec, state_specs, step_program
from qjax.kv_cache import Batch, init_cache
from qjax.models.config import model_config
from qjax.models.parts import Parts, mapped
from qjax.sharding import described, make_mesh, split_of
from tests.pallas_kernels.crosscompile import Program
from tests.parallel.hlo import collectives

KINDS = ("W4A16 g128", "FP8 channel", "W8A8 INT8", "NVFP4", "Q4_K")
SEQUENCES, PAGES, PAGE_SIZE = 8, 16, 32
WIDE = {"hidden_size": 2048, "intermediate_size": 4096, "num_attention_heads": 16}


def decode(
    kind: str, dtype: str, devices: list[Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    config = model_config(TINY | WIDE | {"head_dim": 128})
    mesh = make_mesh(len(devices), devices=devices)
    parts = Parts(mesh, config)
    tree = mapped(
        lambda name, piece: described(
            piece, split_of(name, config, parts.parallel), parts.parallel, mesh
        ),
        random_tree(parts.config, kind),
    )

    def struct(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    shapes = init_cache(
        parts.cache_config(), SEQUENCES * PAGES, PAGE_SIZE, dtype, jax.ShapeDtypeStruct
    )
    shardings = parts.placed(parts.cache_specs(shapes))
    formats = cache_formats(shapes, shardings)
    cache = jax.tree.map(struct, shapes, shardings)
    if formats is not None:
        cache = cache_shapes(shapes, formats)
    state = State(last=jax.ShapeDtypeStruct((SEQUENCES,), jnp.int32))
    state = jax.tree.map(struct, state, parts.placed(state_specs(state, parts)))
    integers = partial(np.zeros, dtype=np.int32)
    batch = Batch(
        integers(SEQUENCES),
        integers(SEQUENCES + 1),
        integers(SEQUENCES),
        integers((SEQUENCES, PAGES)),
        numerics="bfloat16",
    )
    rows = Rows(integers(SEQUENCES), np.ones(SEQUENCES, bool), integers(SEQUENCES), None)
    arguments = (tree, cache, state, None, None, batch, rows, np.int32(1))
    return step_program(formats, mesh), arguments, {"config": config, "spec": StepSpec(False)}


def verdict(compiled: Any) -> str | None:
    """One sum behind the embedding, each attention and each feed-forward network; what is gathered
    is two numbers a device and row; and kernels run inside."""
    text = compiled.as_text()
    found, largest = collectives(text)
    kernels = len(
        re.findall(r'custom_call_target="(?:tpu_custom_call|__gpu\$xla.gpu.triton)', text)
    )
    layers = TINY["num_hidden_layers"]
    if found["all-reduce"] != 2 * layers + 1 or found["all-gather"] > 2:
        return f"it has {dict(found)}"
    if found.keys() - {"all-reduce", "all-gather"} or largest > 16 * SEQUENCES:
        return f"it has {dict(found)}, and gathers {largest} numbers"
    # Of a layer: q k v, o, gate and up, down; the cache's update, and attention.
    return None if kernels >= 6 * layers else f"it has {kernels} kernels"


def programs() -> Iterator[Program]:
    for kind in KINDS:
        yield Program(
            kind, lambda: None, (), verdict=verdict, devices=8, on=partial(decode, kind, "bfloat16")
        )
