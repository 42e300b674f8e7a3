"""What a cache of keys and values holds, by formulas of its own in float64."""

import os

import ml_dtypes
import numpy as np

EPS = 1e-6  # of norms
# How to compile a kernel that is interpreted: it takes longer to compile than to run.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
if os.environ.get("JAX_PLATFORMS") != "cpu":
    QUICKLY = {}  # it is compiled for a GPU, as it will be used


def turned(x, weight, cos, sin):
    """RMSNorm of [T, H, D], then half-split rope."""
    if weight is not None:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weight
    if cos is None:
        return x
    half = cos.shape[-1]
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], -1)


def spread(x):
    """Runs of the last axis, as long as the largest power of two that divides it, times the
    normalized Hadamard matrix of Sylvester's construction."""
    size, matrix = x.shape[-1] & -x.shape[-1], np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (x.reshape(*x.shape[:-1], -1, size) @ matrix / np.sqrt(size)).reshape(x.shape)


def spreads_keys(dtype, scale):
    """Whether keys and queries are spread: for codes, and for 8-bit floats without a scale."""
    return dtype in ("int8", "int4") or (dtype.startswith("fp8") and scale is None)


def basis_of(random, heads, size):
    """Matrices [heads, size, size] for keys, and for queries those that leave scores as they are;
    they make some channels of keys up to 16 times as long as others."""
    turn = np.linalg.qr(random.standard_normal((heads, size, size)))[0]
    lengths = 2 ** random.uniform(-2, 2, (heads, 1, size))
    return (turn * lengths).astype(np.float32), (turn / lengths).astype(np.float32)


def in_basis(x, matrices):
    """x [T, H, D], each run of heads by its own matrix [D, D] of float64."""
    matrices = np.repeat(matrices.astype(float), x.shape[1] // len(matrices), 0)
    return np.einsum("thd,hde->the", x, matrices)


def rounded_up(step):
    """The next bfloat16 at or above it, as float64."""
    near = step.astype(ml_dtypes.bfloat16)
    up = np.nextafter(near, ml_dtypes.bfloat16(np.inf))
    return np.where(near.astype(np.float64) < step, up, near).astype(np.float64)


def cached(x, dtype, scale):
    """What a cache holds of x [T, H, D], float64; scale [H] or [1] is of 8-bit floats."""
    if dtype.startswith("fp8"):
        kind = ml_dtypes.float8_e4m3fn if dtype == "fp8_e4m3" else ml_dtypes.float8_e5m2
        top = float(ml_dtypes.finfo(kind).max)
        return np.clip(x / scale[:, None], -top, top).astype(kind).astype(float) * scale[:, None]
    if dtype == "int8":
        step = rounded_up(np.abs(x).max(-1, keepdims=True) / 127)
        return np.clip(np.round(x / step), -127, 127) * step
    if dtype == "int4":
        low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
        middle = (low + high) / 2
        step = rounded_up(np.maximum((high - low) / 15, np.abs(middle) * 16 / 127))
        start = np.round(16 * middle / step) / 16
        code = np.clip(np.round(x / step - start + 7.5), 0, 15) - 7.5
        zero = np.clip(np.round(16 * (x / step - code).mean(-1, keepdims=True)), -128, 127)
        return (code + zero / 16) * step
    return x.astype(dtype).astype(float)
