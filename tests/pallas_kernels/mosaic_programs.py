"""Products of models' sizes with each kind of weight, to lower and to compile for Hopper GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.matmul import mosaic_gpu, planes_gguf
from pallas_kernels.matmul_grouped import mosaic_gpu as grouped
from tests.pallas_kernels.coded import Coded
from tests.pallas_kernels.crosscompile import Program
from tests.pallas_kernels.triton_programs import (
    CODES_BY_CODES,
    GROUPED,
    KINDS,
    SIZES,
    K,
    N,
    blocks,
    of_experts,
    weight,
)

# Groups that do not divide a block, and codebooks of 256 entries.
REFUSED = [Coded("uint4b8", (16, 24), "float16"), Coded("lookup8", (1, 256), "float32")]
TAKEN = [kind for kind in KINDS if kind not in REFUSED]
CODES = [each for each in CODES_BY_CODES if not each[2].qtype.startswith("lookup")]
# Groups longer than a block, and of blocks shorter than 256 columns.
SHAPED = [
    Coded("uint4b8", (1, 1024), "bfloat16", shape=(64, K)),
    Coded("uint4", (1, 64), "float16", "uint8", shape=(64, 192)),
    Coded("int8", (1, 128), "float32", shape=(64, 320)),
]


def programs(sizes: tuple[int, ...] = SIZES) -> Iterator[Program]:
    """All of them, with so many rows."""

    def single(name, spec, arrays, rows, dtype="bfloat16", groups=0, block_sizes=None):
        def product(x, arrays, scale):
            if block_sizes is None:
                return mosaic_gpu.product(x, spec, arrays, x_scale=scale)
            with tuning.trying(block_sizes):
                return mosaic_gpu.product(x, spec, arrays, x_scale=scale)

        x = jax.ShapeDtypeStruct((rows, spec.shape[1]), jnp.dtype(dtype))
        scale = jax.ShapeDtypeStruct((rows, groups), jnp.float32) if groups else None
        return Program(f"{name}, {rows} rows of {dtype}", product, (x, arrays, scale))

    for kind in TAKEN:
        spec, arrays = weight(replace(kind, shape=(N, K)).spec)
        for rows in sizes:
            yield single(spec.kind, spec, arrays, rows)
    for kind in SHAPED:
        spec, arrays = weight(kind.spec)
        for rows in sizes:
            yield single(f"{spec.kind} of {kind.shape}", spec, arrays, rows)
    for dtype, groups, kind in CODES:
        spec, arrays = weight(replace(kind, shape=(N, K)).spec)
        for rows in sizes:
            yield single(spec.kind, spec, arrays, rows, dtype, groups)
    for qtype in planes_gguf.TYPES:
        for rows in sizes:
            yield single(qtype, *blocks(qtype), rows)
    taken = [(dtype, kind) for dtype, kind in GROUPED if dtype != "float32"]
    yield from of_experts(grouped.product, taken, sizes)
    if sizes != SIZES:
        return
    spec, arrays = weight(replace(KINDS[0], shape=(N, K)).spec)
    for rows in (16, 1024):
        for tried in mosaic_gpu.candidates(spec.kind, rows, N, K):
            yield single(f"{spec.kind}, {tried}", spec, arrays, rows, block_sizes=tried)
