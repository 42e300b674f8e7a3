"""Random weights made of codes, and what they stand for in float64 by formulas of their own."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.codes import CODES
from pallas_kernels.matmul import WeightArrays, WeightSpec, planes

_FLOATS = {
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
}


@dataclass(frozen=True)
class Coded:
    """A kind of weight; the fields are those of `WeightSpec`."""

    qtype: str
    group: tuple[int, int]
    scale: str = "float32"
    zero_point: str | None = None
    additive: bool = False
    has_global_scale: bool = False
    shape: tuple[int, int] = (40, 320)

    @property
    def spec(self):
        return WeightSpec(
            self.qtype,
            self.shape,
            group=self.group,
            scale=self.scale,
            zero_point=self.zero_point,
            has_global_scale=self.has_global_scale,
            additive=self.additive,
        )


def draw(kind, seed=0):
    """(canonical arrays, float64 [N, K])."""
    rng = np.random.default_rng(seed)
    (n, k), bits = kind.shape, CODES[kind.qtype].bits
    codes = rng.integers(0, 1 << bits, (n, k), np.uint8)
    codebook, stream = None, None
    if kind.qtype.startswith("sparse24"):
        stream, values = _sparse(rng, kind)
    elif kind.qtype in _FLOATS:
        values = codes.view(_FLOATS[kind.qtype]).astype(np.float64)
        # The few that are no numbers become zeros; all others occur, subnormal ones too.
        codes = np.where(np.isfinite(values), codes, 0).astype(np.uint8)
        values = np.where(np.isfinite(values), values, 0.0)
    elif kind.qtype == "lookup4":
        codebook = rng.standard_normal((1, 16)).astype(np.float32)
        values = codebook[0].astype(np.float64)[codes]
    elif kind.qtype == "int8":
        values = codes.view(np.int8).astype(np.float64)
    else:
        values = codes.astype(np.float64) - int(kind.qtype.partition("b")[2] or 0)
    grid = -(-n // kind.group[0]), -(-k // kind.group[1])
    scale = _scales(rng, kind.scale, grid)
    zero = None if kind.zero_point is None else _zeros(rng, kind, bits, grid)
    whole = np.full((1, 1), 0.37, np.float32) if kind.has_global_scale else None
    stream = _stream(codes, bits) if stream is None else stream

    def spread(array):
        wide = np.repeat(np.repeat(array, kind.group[0], 0)[:n], kind.group[1], 1)[:, :k]
        return wide.astype(np.float64)

    s = spread(scale if whole is None else scale.astype(np.float32) * whole)
    if zero is None:
        decoded = values * s
    elif kind.additive:
        decoded = values * s + spread(zero)
    else:
        decoded = (values - spread(zero)) * s
    return WeightArrays(stream, scale, zero, whole, codebook), decoded


def laid_out(kind, layout, seed=0):
    """spec, arrays in one of `planes.LAYOUTS`, and float64 values of a random weight."""
    arrays, decoded = draw(kind, seed)
    spec, arrays = planes.prepare(kind.spec, arrays, layout)
    return spec, jax.tree.map(jnp.asarray, arrays), decoded


def coded_inputs(rows, k, dtype, groups):
    """Codes [rows, k], scales [rows, groups], and what they stand for in float64."""
    rng = np.random.default_rng(rows)
    if dtype == "int8":
        codes = rng.integers(-128, 128, (rows, k)).astype(np.int8)
    elif dtype == "bfloat16":
        codes = rng.integers(-255, 256, (rows, k)).astype(ml_dtypes.bfloat16)
    else:
        codes = (10 * rng.standard_normal((rows, k))).astype(dtype)
    scale = rng.uniform(0.5, 2, (rows, groups)).astype(np.float32)
    wide = codes.astype(np.float64) * np.repeat(scale.astype(np.float64), k // groups, axis=1)
    return jnp.asarray(codes), jnp.asarray(scale), wide


def _stream(codes, bits):
    bit = codes[..., None] >> np.arange(bits, dtype=np.uint8) & 1
    return np.packbits(bit.reshape(len(codes), -1), axis=1, bitorder="little")


def _sparse(rng, kind):
    """Two of every four columns, then 2 bits for the place of each."""
    (n, k), bits = kind.shape, CODES[kind.qtype].kept
    kept = rng.integers(0, 1 << bits, (n, k // 2), np.uint8)
    pairs = np.array([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], np.uint8)
    places = pairs[rng.integers(0, 6, (n, k // 4))].reshape(n, k // 2)
    values = np.zeros((n, k))
    at = 4 * (np.arange(k // 2) // 2) + places
    np.put_along_axis(values, at, kept - float(1 << (bits - 1)), axis=1)
    return np.concatenate([_stream(kept, bits), _stream(places, 2)], axis=1), values


def _scales(rng, dtype, grid):
    dtype = np.dtype(dtype)
    if dtype == ml_dtypes.float8_e8m0fnu:
        return np.exp2(rng.integers(-6, 3, grid)).astype(np.float32).astype(dtype)
    return (rng.uniform(0.1, 1, grid) * rng.choice([-1, 1], grid)).astype(dtype)


def _zeros(rng, kind, bits, grid):
    dtype = np.dtype(kind.zero_point)
    if kind.additive:
        return rng.standard_normal(grid).astype(dtype)
    # About the middle of the codes, as in real weights.
    middle = 0 if kind.qtype == "int8" or "b" in kind.qtype else 1 << (bits - 1)
    if dtype == np.uint8:
        return np.maximum(middle + rng.integers(-2, 3, grid), 0).astype(dtype)
    if dtype == np.int8:
        return np.minimum(middle + rng.integers(-2, 3, grid), 127).astype(dtype)
    return (middle + rng.normal(size=grid)).astype(dtype)
