"""Random weights of every kind and any size, as kernels here want them, made on the device.

A few rows are drawn on the host, laid out by `ops.prepare`, and repeated on the device: what a
kernel does, and how long it takes, does not depend on the values. No weight is ever held as floats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels import codes, unpack
from qjax import ops
from qjax.qarray import ActSpec, QArray

ROWS = 256  # that are drawn; a multiple of what any kind of group or any tiling takes

# The codebook of bitsandbytes' 4-bit normal floats (QLoRA, arXiv 2305.14314, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip

# Where the float16 numbers of GGUF's blocks lie: bytes of a block, and where each begins.
_HALVES = {"q4_0": (18, (0,)), "q8_0": (34, (0,)), "q4_k": (144, (0, 2)), "q6_k": (210, (208,))}


@dataclass(frozen=True)
class Kind:
    """A kind of weight.

    Attributes:
      qtype: as of a `QArray`.
      group: rows and columns that share a scale, 0 for all; None for what has its own.
      scale, zero_point: names of dtypes; None where there are none.
      has_global_scale: of nvfp4.
      act: how its inputs are rounded.
    """

    qtype: str
    group: tuple[int, int] | None = None
    scale: str | None = None
    zero_point: str | None = None
    has_global_scale: bool = False
    act: ActSpec | None = None


_INT8 = ActSpec("int8", "token", dynamic=True)
_FP8 = ActSpec("fp8_e4m3", "token", dynamic=True)
_FP8_GROUPS = ActSpec("fp8_e4m3", "group", dynamic=True, group_size=128)

KINDS = {
    "BF16": Kind("bf16"),
    "W4A16 g128": Kind("uint4b8", (1, 128), "bfloat16"),
    "W4A16 g128 asym": Kind("uint4", (1, 128), "bfloat16", "uint8"),
    "W4A16 g32": Kind("uint4b8", (1, 32), "bfloat16"),
    "W8A16": Kind("int8", (1, 0), "bfloat16"),
    "W8A8 INT8": Kind("int8", (1, 0), "float32", act=_INT8),
    "FP8 channel": Kind("fp8_e4m3", (1, 0), "float32", act=_FP8),
    "FP8 block": Kind("fp8_e4m3", (128, 128), "float32", act=_FP8_GROUPS),
    "NF4": Kind("lookup4", (1, 64), "float32"),
    "MXFP4": Kind("fp4_e2m1", (1, 32), "float8_e8m0fnu"),
    "NVFP4": Kind("fp4_e2m1", (1, 16), "float8_e4m3fn", has_global_scale=True),
    "Q4_0": Kind("q4_0"),
    "Q8_0": Kind("q8_0"),
    "Q4_K": Kind("q4_k"),
    "Q6_K": Kind("q6_k"),
}


def draw(kind: Kind, n: int, k: int, lead: tuple[int, ...] = (), seed: int = 0) -> QArray:
    """A canonical weight [*lead, n, k] on the host, of values around k ** -0.5.

    Raises:
      ValueError: K does not fit the kind.
    """
    rng = np.random.default_rng(seed)
    if kind.qtype == "bf16":
        dense = rng.standard_normal((*lead, n, k), np.float32) * k**-0.5
        return QArray.from_dense(dense.astype(ml_dtypes.bfloat16))
    if kind.group is None:
        raw = rng.integers(0, 256, (*lead, n, unpack.row_bytes(kind.qtype, k)), np.uint8)
        size, places = _HALVES[kind.qtype]
        grouped = raw.reshape(*lead, n, -1, size)
        # A code of so many bits, or a product of two codes, becomes a weight of the size we want.
        top = {"q4_0": 8, "q8_0": 128, "q4_k": 15 * 63, "q6_k": 32 * 128}[kind.qtype]
        for at in places:
            half = rng.uniform(0.5, 1, grouped.shape[:-1]).astype(np.float16)
            half = (half * np.float16(2 * k**-0.5 / top)).astype(np.float16)
            grouped[..., at : at + 2] = half[..., None].view(np.uint8)
        return QArray(raw, kind.qtype, (n, k))
    rows, columns = kind.group[0] or n, kind.group[1] or k
    raw = rng.integers(0, 256, (*lead, n, codes.row_bytes(kind.qtype, k)), np.uint8)
    if kind.qtype == "fp8_e4m3":
        raw = np.where(raw & 0x7F == 0x7F, 0, raw).astype(np.uint8)
    grid = (*lead, -(-n // rows), -(-k // columns))
    tops = {"uint4b8": 8, "uint4": 8, "int8": 128, "fp8_e4m3": 448, "lookup4": 1, "fp4_e2m1": 6}
    step = 2 * k**-0.5 / tops[kind.qtype]
    aux: dict[str, Any] = {}
    if kind.has_global_scale:
        aux["global_scale"] = np.full((*lead, 1, 1), step / 4, np.float32)
        step = 4.0
    if kind.qtype == "lookup4":
        aux["codebook"] = np.tile(np.array(NF4, np.float32), (*lead, 1, 1))
    scale = rng.uniform(0.5, 1, grid) * step
    assert kind.scale is not None
    zero = None if kind.zero_point is None else rng.integers(6, 10, grid).astype(kind.zero_point)
    # Far from what overflows, and powers of two round to powers of two.
    scale = np.clip(scale, 2.0**-100, 400).astype(np.float32).astype(jnp.dtype(kind.scale))
    size = (rows, columns)
    return QArray(raw, kind.qtype, (n, k), scale, zero, aux, size, act=kind.act)


def on_device(kind: Kind, n: int, k: int, experts: int = 0) -> QArray:
    """A weight [n, k], or [experts, n, k], as the implementation that will run wants it."""
    lead = (1,) if experts else ()
    if n % ROWS or (kind.group is not None and kind.group[0] == 0):
        small, repeats = ops.prepare(draw(kind, n, k, lead)), 1
        wider = small
    else:
        small = ops.prepare(draw(kind, ROWS, k, lead))
        wider, repeats = ops.prepare(draw(kind, 2 * ROWS, k, lead)), n // ROWS

    def repeat(leaf: Any, twice: Any) -> jax.Array:
        times = [repeats if a != b else 1 for a, b in zip(leaf.shape, twice.shape, strict=True)]
        if experts:
            times[0] = experts
        return _tile(jnp.asarray(leaf), tuple(times))

    leaves = map(repeat, jax.tree.leaves(small), jax.tree.leaves(wider))
    # Its structure comes first: a weight with arrays would have to have their shape.
    empty = replace(jax.tree.map(lambda _: 0, small), shape=(n, k))
    return jax.tree.unflatten(jax.tree.structure(empty), leaves)


def _tile(array: jax.Array, times: tuple[int, ...]) -> jax.Array:
    return jax.jit(jnp.tile, static_argnums=1)(array, times)
