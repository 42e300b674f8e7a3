"""Products of models' sizes with each kind of weight, to lower and to compile for GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.matmul import WeightArrays, WeightSpec, planes, planes_gguf, triton
from pallas_kernels.matmul_grouped import triton as grouped
from tests.pallas_kernels.coded import Coded
from tests.pallas_kernels.crosscompile import Program

N, K = 1536, 4096
SIZES = (1, 40, 1024)
KINDS = [
    Coded("uint4b8", (1, 128), "bfloat16"),
    Coded("uint4b8", (1, 16), "float16"),
    Coded("uint4b8", (1, K), "float32"),
    Coded("uint4", (1, 32), "float16", "uint8"),
    Coded("uint4", (1, 64), "float16", "float16"),
    Coded("uint4", (1, 64), "bfloat16", "bfloat16", additive=True),
    Coded("uint4b8", (16, 24), "float16"),
    Coded("uint1", (1, 128), "float16", "uint8"),
    Coded("uint2", (1, 64), "float16", "uint8"),
    Coded("uint3b4", (1, 128), "float16"),
    Coded("uint5", (1, 64), "float16", "uint8"),
    Coded("uint6b32", (1, 64), "float16"),
    Coded("uint7b64", (1, 128), "float16"),
    Coded("uint8b128", (1, 128), "bfloat16"),
    Coded("int8", (1, K), "float32"),
    Coded("fp8_e4m3", (1, K), "float32"),
    Coded("fp8_e4m3", (128, 128), "float32"),
    Coded("fp8_e4m3", (1, 32), "float8_e8m0fnu"),
    Coded("fp8_e5m2", (N, K), "float32"),
    Coded("fp6_e2m3", (1, 32), "float8_e8m0fnu"),
    Coded("fp4_e2m1", (1, 16), "float8_e4m3fn", has_global_scale=True),
    Coded("fp4_e2m1", (1, 32), "float8_e8m0fnu"),
    Coded("lookup4", (1, 64), "float32"),
    Coded("lookup8", (1, 256), "float32"),
]
ROUNDED = [
    replace(Coded("uint4b8", (1, 128), "bfloat16", shape=(N, K)).spec, rounded=dtype)
    for dtype in ("bfloat16", "float16")
]
# dtype of codes, their groups in a row, kind of weight.
CODES_BY_CODES = [
    ("int8", 1, Coded("int8", (1, K))),
    ("int8", 1, Coded("uint4b8", (1, 128), "bfloat16")),
    ("int8", 1, Coded("uint4", (1, 128), "float16", "uint8")),
    ("int8", 1, Coded("uint8", (1, K), "float32", "uint8")),
    ("int8", 1, Coded("uint3b4", (1, 128), "float16")),
    ("int8", 1, Coded("lookup4", (1, 64))),
    ("float8_e4m3fn", 1, Coded("fp8_e4m3", (1, K))),
    ("float8_e4m3fn", K // 128, Coded("fp8_e4m3", (128, 128))),
    ("float8_e4m3fn", 1, Coded("uint4b8", (1, 128), "bfloat16")),
    ("float8_e4m3fn", K // 32, Coded("fp4_e2m1", (1, 32), "float8_e8m0fnu")),
    ("float8_e5m2", 1, Coded("fp8_e5m2", (1, K))),
]
EXPERTS = 8
GROUPED = [
    ("bfloat16", Coded("uint4b8", (1, 128), "bfloat16")),
    ("bfloat16", Coded("fp4_e2m1", (1, 32), "float8_e8m0fnu")),
    ("bfloat16", Coded("fp4_e2m1", (1, 16), "float8_e4m3fn", has_global_scale=True)),
    ("float8_e4m3fn", Coded("fp8_e4m3", (128, 128))),
    ("float32", Coded("uint4", (1, 64), "float16", "uint8")),
]


def weight(spec: WeightSpec, experts: tuple[int, ...] = ()) -> tuple[WeightSpec, WeightArrays]:
    """A weight in planes, as shapes and dtypes."""
    layout = planes.describe(spec)
    (n, k), (rows, columns) = spec.shape, layout.group

    def struct(shape, dtype):
        return jax.ShapeDtypeStruct((*experts, *shape), jnp.dtype(dtype))

    def beside(dtype):
        return None if dtype is None else struct((-(-k // columns), -(-n // rows)), dtype)

    entries = 1 << layout.bits if layout.value == "lookup" else 0
    arrays = WeightArrays(
        struct((n, layout.row_bytes), "uint8"),
        beside(spec.scale),
        beside(spec.zero_point),
        struct((1, 1), "float32") if spec.has_global_scale else None,
        struct((1, entries), "float32") if entries else None,
    )
    return replace(spec, layout=planes.PLANES), arrays


def blocks(qtype: str) -> tuple[WeightSpec, WeightArrays]:
    """A weight of GGUF blocks in planes."""
    spec = WeightSpec(qtype, (N, K))
    one = jnp.zeros(spec.canonical_shape, jnp.uint8)[:1]
    small, arrays = planes.prepare(replace(spec, shape=(1, K)), WeightArrays(one), planes.PLANES)

    def widened(array):
        axis = -2 if array is arrays.qvalue else -1
        shape = list(array.shape)
        if array is not arrays.codebook:
            shape[axis] = N
        return jax.ShapeDtypeStruct(tuple(shape), array.dtype)

    return replace(small, shape=(N, K)), jax.tree.map(widened, arrays)


def programs(sizes: tuple[int, ...] = SIZES) -> Iterator[Program]:
    """All of them, with so many rows."""

    def single(name, spec, arrays, rows, dtype, groups=0):
        def product(x, arrays, scale):
            return triton.product(x, spec, arrays, x_scale=scale)

        x = jax.ShapeDtypeStruct((rows, K), jnp.dtype(dtype))
        scale = jax.ShapeDtypeStruct((rows, groups), jnp.float32) if groups else None
        return Program(f"{name}, {rows} rows of {dtype}", product, (x, arrays, scale))

    for kind in KINDS:
        spec, arrays = weight(replace(kind, shape=(N, K)).spec)
        for rows in sizes:
            yield single(spec.kind, spec, arrays, rows, "bfloat16")
        yield single(spec.kind, spec, arrays, 3, "float32")
    for spec in ROUNDED:
        yield single(f"{spec.kind} rounded to {spec.rounded}", *weight(spec), 3, "float32")
    for dtype, groups, kind in CODES_BY_CODES:
        spec, arrays = weight(replace(kind, shape=(N, K)).spec)
        for rows in sizes:
            yield single(spec.kind, spec, arrays, rows, dtype, groups)
    for qtype in planes_gguf.TYPES:
        for rows in sizes:
            yield single(qtype, *blocks(qtype), rows, "bfloat16")
    # Neither outputs nor columns are a multiple of anything.
    spec, arrays = weight(Coded("uint4b8", (1, 32), "float16", shape=(N + 3, K)).spec)
    yield single("cut off", spec, arrays, 100, "bfloat16")
    yield from of_experts(grouped.product, GROUPED, sizes)


def of_experts(product, kinds, sizes) -> Iterator[Program]:
    """Grouped products with each of `kinds`, and as many rows as `sizes` say."""
    groups = jax.ShapeDtypeStruct((EXPERTS,), jnp.int32)
    for dtype, kind in kinds:
        spec, arrays = weight(replace(kind, shape=(N, K)).spec, (EXPERTS,))
        for rows in sizes:
            x = jax.ShapeDtypeStruct((rows, K), jnp.dtype(dtype))
            scale = None
            if dtype.startswith("float8"):
                scale = jax.ShapeDtypeStruct((rows, K // 128), jnp.float32)
            yield Program(
                f"{spec.kind} of experts, {rows} rows of {dtype}",
                partial(_experts, product, spec),
                (x, groups, arrays, scale),
            )


def _experts(product, spec, x, sizes, arrays, scale):
    return product(x, sizes, spec, arrays, x_scale=scale)
