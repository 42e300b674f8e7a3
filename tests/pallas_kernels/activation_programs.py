"""Quantization of activations, and products with what it gives, to compile for devices."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.inputs import ActSpec, Inputs
from pallas_kernels.matmul import WeightArrays, WeightSpec, matmul, planes
from pallas_kernels.quantize import quantize
from tests.pallas_kernels.crosscompile import Program

SIZES = ((1, 4096), (100, 14336), (1024, 28672))
ACTS = {
    "int8": ActSpec("int8", "token", True),
    "int8-asymmetric": ActSpec("int8", "token", True, symmetric=False),
    "int8-bfloat16": ActSpec("int8", "token", True, scale="bfloat16"),
    "fp8": ActSpec("fp8_e4m3", "token", True),
    "e5m2": ActSpec("fp8_e5m2", "token", True),
    "fp8-1x128": ActSpec("fp8_e4m3", "group", True, group_size=128),
    "int8-1x256": ActSpec("int8", "group", True, group_size=256),
    "int8-1x64-asymmetric": ActSpec("int8", "group", True, symmetric=False, group_size=64),
    "mxfp8": ActSpec("fp8_e4m3", "group", True, group_size=32, scale="e8m0"),
    "mxfp8-ceil": ActSpec("fp8_e4m3", "group", True, group_size=32, scale="e8m0_ceil"),
    "mxfp6": ActSpec("fp6_e2m3", "group", True, group_size=32, scale="e8m0"),
    "mxfp4": ActSpec("fp4_e2m1", "group", True, group_size=32, scale="e8m0_even"),
    "nvfp4": ActSpec("fp4_e2m1", "group", True, group_size=16, scale="fp8_e4m3"),
}
PAIRS = (
    ("int8", "int8"),
    ("int8-asymmetric", "uint8b128"),
    ("fp8", "fp8_e4m3"),
    ("e5m2", "fp8_e4m3"),
)


def programs() -> Iterator[Program]:
    for rows, k in SIZES:
        for name, act in ACTS.items():
            for dtype in (jnp.float32, jnp.bfloat16):
                x = jax.ShapeDtypeStruct((rows, k), dtype)
                whole = jax.ShapeDtypeStruct((1, 1), jnp.float32)
                inputs = Inputs(global_scale=whole) if act.scale == "fp8_e4m3" else Inputs()
                title = f"quantize {name} {rows}x{k} {x.dtype.name}"
                yield Program(title, partial(_quantize, act), (x, inputs))
    for layout in planes.LAYOUTS:
        for rows in (1, 16, 1024):
            for name, qtype in PAIRS:
                for dtype in ("float32", "bfloat16"):
                    title = f"product {name} {qtype} {rows} {layout} {dtype}"
                    yield _product(title, rows, ACTS[name], qtype, layout, dtype)


def _quantize(act: ActSpec, x: jax.Array, inputs: Inputs) -> tuple[jax.Array, ...]:
    return quantize(x, act, inputs)


def _product(title: str, rows: int, act: ActSpec, qtype: str, layout: str, dtype: str) -> Program:
    n, k = 1536, 4096
    spec = WeightSpec(qtype, (n, k), layout, (1, k), "float32")
    shape = (n, k) if layout == planes.PLANES else (k, n)

    def product(x: jax.Array, arrays: WeightArrays) -> jax.Array:
        (y,) = matmul(x, [(spec, arrays)], act=act, activation_dtype=dtype)
        return y

    arrays = WeightArrays(
        jax.ShapeDtypeStruct(shape, jnp.uint8), jax.ShapeDtypeStruct((1, n), jnp.float32)
    )
    return Program(title, product, (jax.ShapeDtypeStruct((rows, k), jnp.float32), arrays))
