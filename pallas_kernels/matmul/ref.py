"""The oracle: what a quantized matrix product means, in plain float32.

It shares no code with the other implementations, the decoder included: `decode` states for every
type where the bits of element e of a block lie, and gathers them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.matmul import ref_blocks
from pallas_kernels.matmul.spec import LARGEST_CODE, WeightArrays, WeightSpec, require_canonical

_E32 = np.arange(32)
_E256 = np.arange(256)
_IQ4 = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]


def matmul(
    x: jax.Array,
    weights: tuple[tuple[WeightSpec, WeightArrays], ...],
    *,
    norm: jax.Array | None,
    norm_eps: float,
    biases: tuple[jax.Array | None, ...],
    activation: str | None,
    residual: jax.Array | None,
    post_norm: jax.Array | None,
    activation_dtype: str,
    num_rows: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """See `pallas_kernels.matmul.api.matmul`."""

    def rms(v: jax.Array, weight: jax.Array) -> jax.Array:
        return v / jnp.sqrt(jnp.mean(jnp.square(v), -1, keepdims=True) + norm_eps) * weight

    if norm is not None:
        x = rms(x, norm)
    if activation_dtype == "bfloat16":
        x = jax.lax.reduce_precision(x, 8, 7)
    elif activation_dtype != "float32":
        x = _round(x, LARGEST_CODE[activation_dtype])
    ys = []
    for (spec, arrays), bias in zip(weights, biases, strict=True):
        require_canonical(spec)
        y = jnp.einsum("tk,nk->tn", x, decode(spec, arrays), precision="highest")
        ys.append(y if bias is None else y + bias)
    if activation == "silu":
        ys = [ys[0] / (1 + jnp.exp(-ys[0])) * ys[1]]
    elif activation == "gelu_tanh":
        inner = np.sqrt(2 / np.pi) * (ys[0] + 0.044715 * ys[0] ** 3)
        ys = [ys[0] / 2 * (1 + jnp.tanh(inner)) * ys[1]]
    if post_norm is not None:
        ys = [rms(ys[0], post_norm)]
    if residual is not None:
        ys = [residual + ys[0]]
    return tuple(ys)


def _round(x: jax.Array, top: int) -> jax.Array:
    """int16 (top 32639) and int8 (top 127) in blocks of 32; int8 with the two extra blocks."""

    def nearest(part: jax.Array) -> tuple[jax.Array, jax.Array]:
        scale = jnp.abs(part).max(1, keepdims=True) / top
        return jnp.where(scale > 0, jnp.round(part / scale) * scale, 0), scale

    starts = range(0, x.shape[1], 32)
    parts = [nearest(x[:, start : start + 32]) for start in starts]
    rounded = jnp.concatenate([part for part, _ in parts], 1)
    if top != 127:
        return rounded
    rank = jnp.argsort(-jnp.concatenate([scale for _, scale in parts], 1), axis=1)  # stable
    for block, start in enumerate(starts):
        part = x[:, start : start + 32] - rounded[:, start : start + 32]
        chosen = (rank[:, :2] == block).any(1, keepdims=True)
        rounded = rounded.at[:, start : start + 32].add(jnp.where(chosen, nearest(part)[0], 0))
    return rounded


def decode(spec: WeightSpec, arrays: WeightArrays) -> jax.Array:
    """A canonical weight as float32 [N, K]."""
    if spec.group is None:
        return decode_blocks(arrays.qvalue, spec.qtype)
    (n, k), (rows, columns) = spec.shape, spec.group
    value = _code_values(arrays.qvalue, spec.qtype, k, arrays.codebook)
    row, column = np.arange(n)[:, None] // rows, np.arange(k)[None] // columns
    scale = arrays.scale[row, column].astype(jnp.float32)
    if arrays.global_scale is not None:
        scale = scale * arrays.global_scale[0, 0]
    if arrays.zero_point is None:
        weight = value * scale
    else:
        zero = arrays.zero_point[row, column].astype(jnp.float32)
        weight = value * scale + zero if spec.additive else (value - zero) * scale
    if spec.rounded is not None:
        # (lax.reduce_precision takes subnormal numbers for zeros.)
        weight = jax.lax.optimization_barrier(weight.astype(spec.rounded)).astype(jnp.float32)
    return weight


def _code_values(raw: jax.Array, qtype: str, k: int, codebook: jax.Array | None) -> jax.Array:
    """Codes of a row follow each other in a stream of bits, lowest first: float32 [N, K]."""
    if qtype.startswith("sparse24_"):
        # Two of four columns, in a stream as dense ones are, and then their places.
        kind = qtype.removeprefix("sparse24_")
        places = _code_values(raw[:, -k // 8 :], "uint2", k // 2, None).astype(jnp.int32)
        kept = _code_values(raw[:, : -k // 8], kind, k // 2, None)
        row, column = np.arange(len(raw))[:, None], 4 * (np.arange(k // 2) // 2) + places
        return jnp.zeros((len(raw), k)).at[row, column].set(kept)
    name, _, offset = qtype.partition("b")
    digits = "".join(c for c in name.partition("_")[0] if c.isdigit())
    bits = int(digits)
    at = np.arange(k)[:, None] * bits + np.arange(bits)
    stream = (raw[:, at // 8] >> (at % 8).astype(np.uint8)) & 1
    code = (stream.astype(jnp.int32) << np.arange(bits)).sum(-1)
    if qtype.startswith("lookup"):
        assert codebook is not None
        return codebook[0][code]
    if qtype == "int8":
        code = jnp.where(code > 127, code - 256, code)
    if qtype.startswith(("int", "uint")):
        return (code - int(offset or 0)).astype(jnp.float32)
    exponent_bits, mantissa_bits = (int(c) for c in qtype.partition("_")[2][1::2])
    table = []
    for pattern in range(1 << bits):
        mantissa, rest = pattern % (1 << mantissa_bits), pattern >> mantissa_bits
        exponent, sign = rest % (1 << exponent_bits), rest >> exponent_bits
        bias = 2 ** (exponent_bits - 1) - 1
        fraction = mantissa / 2**mantissa_bits
        size = (
            2.0 ** (1 - bias) * fraction
            if exponent == 0
            else 2.0 ** (exponent - bias) * (1 + fraction)
        )
        if qtype == "fp8_e4m3" and pattern & 127 == 127:
            size = float("nan")
        if qtype == "fp8_e5m2" and exponent == 31:
            size = float("nan") if mantissa else float("inf")
        table.append(-size if sign else size)
    return jnp.asarray(np.array(table, np.float32))[code]


def decode_blocks(raw: jax.Array, qtype: str) -> jax.Array:
    """uint8 [N, row_bytes] -> float32 [N, K]."""
    size, decode_block = _DECODE[qtype]
    values = decode_block(raw.reshape(len(raw), -1, size).astype(jnp.int32))
    return values.reshape(len(raw), -1)


# Below, b holds the bytes of blocks as int32 [N, blocks, bytes].


def _bits(b: jax.Array, byte: np.ndarray, shift: np.ndarray | int, count: int) -> jax.Array:
    """`count` bits from bit `shift` of byte `byte`, for every element."""
    return (b[..., byte] >> shift) & ((1 << count) - 1)


def _word(b: jax.Array, at: int) -> jax.Array:
    return b[..., at : at + 1] + 256 * b[..., at + 1 : at + 2]


def _half(b: jax.Array, at: int = 0) -> jax.Array:
    """The float16 at byte `at`, [N, blocks, 1] float32."""
    word = _word(b, at).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(word, jnp.float16).astype(jnp.float32)


def _float(b: jax.Array) -> jax.Array:
    word = (_word(b, 2) << 16) | _word(b, 0)
    return jax.lax.bitcast_convert_type(word, jnp.float32)


def _bfloat(b: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(_word(b, 0) << 16, jnp.float32)


def _byte_signed(b: jax.Array, byte: np.ndarray) -> jax.Array:
    return (b[..., byte] + 128) % 256 - 128


def _nibble32(b: jax.Array, at: int) -> jax.Array:
    """Elements 0 to 15 are the low nibbles of 16 bytes, 16 to 31 the high ones."""
    return _bits(b, at + _E32 % 16, 4 * (_E32 // 16), 4)


def _fifth32(b: jax.Array, at: int) -> jax.Array:
    return 16 * _bits(b, at + _E32 // 8, _E32 % 8, 1)


def _two_bits256(b: jax.Array, at: int) -> jax.Array:
    """128 elements a 32 bytes: runs of 32 at bits 0, 2, 4, 6."""
    return _bits(b, at + 32 * (_E256 // 128) + _E256 % 32, 2 * (_E256 // 32 % 4), 2)


def _nibble256(b: jax.Array, at: int) -> jax.Array:
    """64 elements a 32 bytes: the low nibbles, then the high ones."""
    return _bits(b, at + 32 * (_E256 // 64) + _E256 % 32, 4 * (_E256 // 32 % 2), 4)


def _q2_k(b: jax.Array) -> jax.Array:
    group = _E256 // 16
    scale, minimum = _bits(b, group, 0, 4), _bits(b, group, 4, 4)
    return _half(b, 80) * scale * _two_bits256(b, 16) - _half(b, 82) * minimum


def _q3_k(b: jax.Array) -> jax.Array:
    group = _E256 // 16
    low = _bits(b, 96 + group % 8, 4 * (group // 8), 4)
    scale = low + 16 * _bits(b, 104 + group % 4, 2 * (group // 4), 2) - 32
    mask = _bits(b, _E256 % 32, _E256 // 32, 1)
    return _half(b, 108) * scale * (_two_bits256(b, 32) - jnp.where(mask == 1, 0, 4))


def _scale_and_minimum(b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The 6-bit scales and minima of q4_k and q5_k, bytes 4 to 15, for each of 256 elements."""
    scales, minima = [], []
    for j in range(8):
        at = 4 + j
        if j < 4:
            scales.append(b[..., at] & 63)
            minima.append(b[..., at + 4] & 63)
        else:
            scales.append((b[..., at + 4] & 15) | (b[..., at - 4] >> 6) << 4)
            minima.append((b[..., at + 4] >> 4) | (b[..., at] >> 6) << 4)
    group = _E256 // 32
    return jnp.stack(scales, -1)[..., group], jnp.stack(minima, -1)[..., group]


def _q4_k(b: jax.Array) -> jax.Array:
    scale, minimum = _scale_and_minimum(b)
    return _half(b) * scale * _nibble256(b, 16) - _half(b, 2) * minimum


def _q5_k(b: jax.Array) -> jax.Array:
    scale, minimum = _scale_and_minimum(b)
    codes = _nibble256(b, 48) + 16 * _bits(b, 16 + _E256 % 32, _E256 // 32, 1)
    return _half(b) * scale * codes - _half(b, 2) * minimum


def _q6_k(b: jax.Array) -> jax.Array:
    half, within = _E256 // 128, _E256 % 128
    low = _bits(b, 64 * half + within % 64, 4 * (within // 64), 4)
    scale = _byte_signed(b, 192 + _E256 // 16)
    return _half(b, 208) * scale * (low + 16 * _two_bits256(b, 128) - 32)


def _iq4_xs(b: jax.Array) -> jax.Array:
    group = _E256 // 32
    low = _bits(b, 4 + group // 2, 4 * (group % 2), 4)
    scale = low + 16 * _bits(b, 2 + group // 4, 2 * (group % 4), 2) - 32
    codes = _bits(b, 8 + 16 * group + _E256 % 16, 4 * (_E256 // 16 % 2), 4)
    return _half(b) * scale * jnp.array(_IQ4)[codes]


_DECODE = {
    "f32": (4, _float),
    "f16": (2, _half),
    "bf16": (2, _bfloat),
    "q4_0": (18, lambda b: _half(b) * (_nibble32(b, 2) - 8)),
    "q4_1": (20, lambda b: _half(b) * _nibble32(b, 4) + _half(b, 2)),
    "q5_0": (22, lambda b: _half(b) * (_nibble32(b, 6) + _fifth32(b, 2) - 16)),
    "q5_1": (24, lambda b: _half(b) * (_nibble32(b, 8) + _fifth32(b, 4)) + _half(b, 2)),
    "q8_0": (34, lambda b: _half(b) * _byte_signed(b, 2 + _E32)),
    "q2_k": (84, _q2_k),
    "q3_k": (110, _q3_k),
    "q4_k": (144, _q4_k),
    "q5_k": (176, _q5_k),
    "q6_k": (210, _q6_k),
    "iq4_nl": (18, lambda b: _half(b) * jnp.array(_IQ4)[_nibble32(b, 2)]),
    "iq4_xs": (136, _iq4_xs),
} | ref_blocks.DECODERS
