"""Products of models' sizes with each kind of weight, to lower and to compile for TPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp

from pallas_kernels.matmul import planes, planes_gguf, tpu
from tests.pallas_kernels import triton_programs
from tests.pallas_kernels.coded import Coded
from tests.pallas_kernels.crosscompile import Program

SIZES = (1, 16, 256)
SHAPES = ((14336, 4096), (6144, 4096), (4096, 14336))
N, K = 1536, 4096
# With columns of all sizes, of models on which blocks do not come out even.
UNEVEN = [
    Coded("uint4b8", (1, 128), "bfloat16", shape=(4096, 11008)),
    Coded("fp4_e2m1", (1, 32), "float8_e8m0fnu", shape=(2880, 2880)),
    Coded("uint4", (1, 64), "float16", "float16", additive=True, shape=(1000, 896)),
    Coded("uint4b8", (1, 64), "float16", shape=(576, 576)),
    Coded("uint3b4", (1, 128), "float16", shape=(40, 384)),
    Coded("uint2", (1, 64), "float16", "uint8", shape=(40, 320)),
]
KINDS = [kind for kind in triton_programs.KINDS if kind.qtype != "lookup8"]
EXPERTS = 8


def transposed(spec, arrays):
    """A weight in "planes", as shapes and dtypes, in "planes_t"."""
    *lead, n, row = arrays.qvalue.shape
    qvalue = jax.ShapeDtypeStruct((*lead, row, n), arrays.qvalue.dtype)
    return replace(spec, layout=planes.TRANSPOSED), arrays._replace(qvalue=qvalue)


def weight(kind, shape, experts=()):
    return transposed(*triton_programs.weight(replace(kind, shape=shape).spec, experts))


def single(name, spec, arrays, rows, dtype, groups=0):
    def product(x, arrays, scale):
        return tpu.product(x, spec, arrays, x_scale=scale)

    k = spec.shape[1]
    x = jax.ShapeDtypeStruct((rows, k), jnp.dtype(dtype))
    scale = jax.ShapeDtypeStruct((rows, groups), jnp.float32) if groups else None
    title = f"{name} {'x'.join(map(str, spec.shape))}, {rows} rows of {dtype}"
    return Program(title, product, (x, arrays, scale))


def kinds() -> Iterator[Program]:
    """Each kind of weight with each kind of input, once."""
    for kind in KINDS:
        spec, arrays = weight(kind, (N, K))
        yield single(spec.kind, spec, arrays, 16, "bfloat16")
        yield single(spec.kind, spec, arrays, 3, "float32")
    for spec in triton_programs.ROUNDED:
        found = transposed(*triton_programs.weight(spec))
        yield single(f"{spec.kind} rounded to {spec.rounded}", *found, 3, "float32")
    for dtype, groups, kind in triton_programs.CODES_BY_CODES:
        spec, arrays = weight(kind, (N, K))
        yield single(spec.kind, spec, arrays, 40, dtype, groups)
    for qtype in planes_gguf.TYPES:
        yield single(qtype, *transposed(*triton_programs.blocks(qtype)), 16, "bfloat16")
    for kind in UNEVEN:
        spec, arrays = weight(kind, kind.shape)
        yield single(spec.kind, spec, arrays, 5, "bfloat16")
    for dtype, kind in triton_programs.GROUPED:
        spec, arrays = weight(kind, (N, K), (EXPERTS,))

        def product(x, sizes, arrays, scale, spec=spec):
            return tpu.product(x, spec, arrays, x_scale=scale, group_sizes=sizes)

        x = jax.ShapeDtypeStruct((40, K), jnp.dtype(dtype))
        sizes = jax.ShapeDtypeStruct((EXPERTS,), jnp.int32)
        coded = dtype.startswith("float8")
        scale = jax.ShapeDtypeStruct((40, K // 128), jnp.float32) if coded else None
        yield Program(f"{spec.kind} of experts, {dtype}", product, (x, sizes, arrays, scale))


def programs() -> Iterator[Program]:
    """Those, and the kinds of large models at their sizes, with few rows and many."""
    yield from kinds()
    for kind in (KINDS[0], KINDS[3], KINDS[14], KINDS[15], KINDS[20], KINDS[21]):
        for n, k in SHAPES:
            fitting = replace(kind, group=(kind.group[0], min(kind.group[1], k)))
            if kind.group[1] == triton_programs.K:
                fitting = replace(kind, group=(1, k))
            spec, arrays = weight(fitting, (n, k))
            for rows in SIZES:
                yield single(spec.kind, spec, arrays, rows, "bfloat16")
