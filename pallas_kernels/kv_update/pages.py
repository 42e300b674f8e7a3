"""What a cache of keys or values holds: numbers as they are, or codes with scales.

float32, bfloat16: the numbers, rounded to that.

fp8_e4m3, fp8_e5m2: x / scale rounded to that, where scale is one number, or one a head, that came
with the model (1 where none did), and x / scale is cut to what the type holds.

int8: a scale for each token and head, absmax / 127, rounded up to bfloat16.

int4: a scale for each token and head, and a zero point in sixteenths. With middle = (min x + max x)
/ 2, scale = max((max x - min x) / 15, |middle| * 16 / 127) rounded up to bfloat16, start = round(16
middle / scale), code = clip(round(x / scale - start / 16 + 7.5), 0, 15), zero = round(16 mean(x /
scale - code + 7.5)); what is cached is (code - 7.5 + zero / 16) * scale, whose mean over the
channels is that of x within a 32nd of the scale.

Keys of int8 and int4, and of float8 where no scale came with the model, are turned by a Hadamard
matrix first, and queries with them: that spreads outliers over all channels and changes no score
(QuaRot, arXiv 2404.00456). A `Basis` made for the model takes the place of that matrix. Values of
int4 are turned as well, and what attention makes of them is turned back: the matrix is its own
inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hadamard import hadamard
from pallas_kernels.quantize.rounding import round_half_even

FP8 = {"fp8_e4m3": jnp.float8_e4m3fn, "fp8_e5m2": jnp.float8_e5m2}
CACHE_DTYPES = ("float32", "bfloat16", *FP8, "int8", "int4")
_PLAIN = {jnp.dtype(dtype): name for name, dtype in FP8.items()} | {
    jnp.dtype("float32"): "float32",
    jnp.dtype("bfloat16"): "bfloat16",
    jnp.dtype("int8"): "int8",
    jnp.dtype("uint8"): "int4",
}


class Pages(NamedTuple):
    """The pages of keys, or of values, of one layer; a pytree.

    How a page's values lie inside it is private to the implementation that wrote them.

    Attributes:
      values: [P, num_kv_heads, page_size, head_dim] of float32, bfloat16, a float8 or int8; uint8
        [P, num_kv_heads, page_size, head_dim / 2] of int4.
      scale: bfloat16 [P, num_kv_heads, page_size], of int8 and int4.
      zero: int8 [P, num_kv_heads, page_size], of int4, in sixteenths (see `zero_points`).
    """

    values: Any
    scale: Any = None
    zero: Any = None

    @property
    def dtype(self) -> str:
        """Which of `CACHE_DTYPES` this is."""
        return _PLAIN[jnp.dtype(self.values.dtype)]

    @property
    def page_size(self) -> int:
        return self.values.shape[2]


class Basis(NamedTuple):
    """What keys and queries of one layer are multiplied by, for pages that `turns_keys`; a pytree.

    Scores stay what they were if keys @ queries^T is the unit matrix; beyond that the choice is
    free. Channels are to be alike in this basis: a key has one scale for all of them.

    Attributes:
      keys, queries: float32 [num_kv_heads, head_dim, head_dim], which rows are multiplied by.
    """

    keys: Any
    queries: Any


def empty(
    shape: tuple[int, int, int, int],
    dtype: str,
    zeros: Callable[[tuple[int, ...], Any], Any] = jnp.zeros,
) -> Pages:
    """Pages of zeros.

    Args:
      shape: (P, num_kv_heads, page_size, head_dim).
      dtype: one of `CACHE_DTYPES`.
      zeros: makes the arrays from shape and dtype.

    Raises:
      ValueError: there is no such dtype, or head_dim is odd and codes of 4 bits go in pairs.
    """
    if dtype not in CACHE_DTYPES:
        raise ValueError(f"cache dtype {dtype!r} is none of {', '.join(CACHE_DTYPES)}")
    if dtype == "int4":
        *lead, head_dim = shape
        if head_dim % 2:
            raise ValueError(f"an int4 cache of heads of {head_dim} dimensions, which is odd")
        codes = zeros((*lead, head_dim // 2), jnp.uint8)
        return Pages(codes, zeros(tuple(lead), jnp.bfloat16), zeros(tuple(lead), jnp.int8))
    values = zeros(shape, FP8[dtype] if dtype in FP8 else jnp.dtype(dtype))
    return Pages(values, zeros(shape[:-1], jnp.bfloat16) if dtype == "int8" else None)


def encode(x: jax.Array, dtype: str, scale: jax.Array | None = None) -> Pages:
    """What is cached of x (keys rotated already).

    Args:
      x: float32 [..., H, D].
      scale: float32 [1] or [H], of float8 only.

    Returns:
      values [..., H, D] (uint8 [..., H, D / 2] of int4: element i in the low nibble of byte i, i +
      D / 2 in the high one), and scale and zero [..., H].
    """
    return encode_parts(jnp.split(x, 2, axis=-1) if dtype == "int4" else [x], dtype, scale)


def encode_parts(
    parts: Sequence[jax.Array],
    dtype: str,
    scale: jax.Array | None = None,
    width: int | None = None,
) -> Pages:
    """What `encode` makes of x, given whole, or in two halves [..., H, D / 2] for int4. Nothing in
    here moves an element, so that kernels can use it.

    Args:
      width: how many channels of each part count; those beyond repeat one that does.
    """
    x = parts[0]
    if dtype in FP8:
        top = float(jnp.finfo(FP8[dtype]).max)
        x = x if scale is None else x / scale[:, None]
        return Pages(jnp.clip(x, -top, top).astype(FP8[dtype]))
    if dtype == "int8":
        step = _round_up(jnp.abs(x).max(-1) / 127)
        codes = round_half_even(x / _nonzero(step)[..., None])
        return Pages(jnp.clip(codes, -127, 127).astype(jnp.int8), step.astype(jnp.bfloat16))
    if dtype == "int4":
        low = jnp.minimum(*(part.min(-1) for part in parts))
        high = jnp.maximum(*(part.max(-1) for part in parts))
        middle = (low + high) * 0.5
        step = _round_up(jnp.maximum((high - low) / 15, jnp.abs(middle) * (16 / 127)))
        divisor = _nonzero(step)
        start = round_half_even(middle / divisor * 16) * (1 / 16)
        steps = [part / divisor[..., None] + 7.5 for part in parts]
        codes = [jnp.clip(round_half_even(x - start[..., None]), 0, 15) for x in steps]
        off = (steps[0] - codes[0]) + (steps[1] - codes[1])
        if width is not None and width < off.shape[-1]:
            off = jnp.where(jnp.arange(off.shape[-1]) < width, off, 0.0)
        mean = off.sum(-1) / (2 * (width or off.shape[-1]))
        zero = jnp.clip(round_half_even(mean * 16), -128, 127).astype(jnp.int8)
        first, second = (code.astype(jnp.uint8) for code in codes)
        return Pages(first | second << 4, step.astype(jnp.bfloat16), zero)
    return Pages(x.astype(dtype))


def decode(pages: Pages, scale: jax.Array | None = None) -> jax.Array:
    """What `encode` cached: float32 [..., H, D]."""
    dtype, values = pages.dtype, pages.values
    if dtype == "int4":
        codes = jnp.concatenate([values & 15, values >> 4], axis=-1).astype(jnp.float32)
        codes = codes + zero_points(pages.zero)[..., None]
        return codes * pages.scale[..., None].astype(jnp.float32)
    x = values.astype(jnp.float32)
    if dtype == "int8":
        return x * pages.scale[..., None].astype(jnp.float32)
    return x * scale[:, None] if dtype in FP8 and scale is not None else x


def zero_points(zero: jax.Array) -> jax.Array:
    """What is added to codes of int4, float32, from what `Pages.zero` holds of it."""
    return zero.astype(jnp.float32) * (1 / 16) - 7.5


def turns_keys(dtype: str, k_scale: jax.Array | None) -> bool:
    """Whether keys, and queries, are `turned` for pages of `dtype`; k_scale came with the model."""
    return dtype in ("int8", "int4") or (dtype in FP8 and k_scale is None)


def turns_values(dtype: str) -> bool:
    """Whether values are `turned` for pages of `dtype`, and sums of them turned back."""
    return dtype == "int4"


def turned(heads: jax.Array) -> jax.Array:
    """Heads [..., D]: runs of channels, as many as the largest power of two that divides D, times
    the normalized Hadamard matrix. Its own inverse."""
    head_dim = heads.shape[-1]
    return hadamard(heads, head_dim & -head_dim)


def in_basis(heads: jax.Array, matrices: jax.Array) -> jax.Array:
    """Heads [T, H, D], H a multiple of N, times `matrices` [N, D, D], each for a run of heads."""
    runs = heads.reshape(len(heads), len(matrices), -1, heads.shape[-1])
    out = jnp.einsum("thgd,hde->thge", runs, matrices, precision=lax.Precision.HIGHEST)
    return out.reshape(heads.shape)


def _round_up(x: jax.Array) -> jax.Array:
    """The next bfloat16 at or above x >= 0, as float32."""
    bits = lax.bitcast_convert_type(x, jnp.uint32) + jnp.uint32(0xFFFF)
    return lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)


def _nonzero(step: jax.Array) -> jax.Array:
    return jnp.where(step == 0, 1, step)
