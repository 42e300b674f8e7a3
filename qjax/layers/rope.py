"""Rotary position embeddings and their context extensions, as cos / sin tables.

Pair i of a head's dimensions is rotated by the angle position * inv_freq[i], where inv_freq[i] is
theta ** (-2i / d) (Su et al., RoFormer, arXiv:2104.09864). The extensions change inv_freq, some by
the length of the sequence, and scale the tables. Frequencies are worked out in float64 while
tracing; only tables are computed on the device.

Sources:
  linear   positions divided by a factor: Chen et al., arXiv:2306.15595.
  dynamic  theta grows with the length beyond training: "NTK-aware" scaling, described in
           arXiv:2309.00071, B.1 and B.2.
  yarn     Peng et al., arXiv:2309.00071, section 3.
  llama3   by wavelength bands: Grattafiori et al., arXiv:2407.21783; constants as in the released
           code of Llama 3.1.
  longrope searched factors for each pair, one set for short and one for long sequences:
           Ding et al., arXiv:2402.13753.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"]
ROPE_TYPES: tuple[RopeType, ...] = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@dataclass(frozen=True)
class RopeConfig:
    """Rope of one kind of layer.

    Attributes:
      rotary_dim: leading dimensions of a head that are rotated; the rest pass unchanged. Even.
      theta: the base.
      rope_type: which extension; it decides which of the fields below are read.
      factor: context extension, all types but default (longrope has its own factors).
      attention_factor: scale of the tables (yarn and longrope).
      original_length: positions of the training before the extension. For dynamic: the length
        beyond which theta grows.
      beta_fast, beta_slow, truncate: yarn's bands, in turns over the original length, rounded to
        whole pairs or not.
      low_freq_factor, high_freq_factor: llama3's bands, original length / wavelength.
      short_factor, long_factor: longrope's divisors of inv_freq, rotary_dim / 2 each.
    """

    rotary_dim: int
    theta: float
    rope_type: RopeType = "default"
    factor: float = 1.0
    attention_factor: float = 1.0
    original_length: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def depends_on_length(self) -> bool:
        """Whether the tables depend on the length of the sequence, not on the position alone."""
        return self.rope_type == "dynamic" or self.short_factor != self.long_factor


def rope_tables(
    config: RopeConfig, positions: jax.Array, seq_lens: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Tables of cos and sin for each token.

    Args:
      config: static.
      positions: [T] int32, each token's position in its own sequence.
      seq_lens: [T] int32, the present length of each token's sequence, read only where
        `config.depends_on_length`. Without it all tokens belong to one sequence, which ends at the
        highest position.

    Returns:
      (cos, sin), each [T, rotary_dim / 2] float32.
    """
    inv_freq = jnp.asarray(_inverse_frequencies(config), jnp.float32)
    if config.depends_on_length:
        if seq_lens is None:
            seq_lens = jnp.broadcast_to(jnp.max(positions) + 1, positions.shape)
        inv_freq = _at_length(config, inv_freq, seq_lens)
    angles = positions.astype(jnp.float32)[:, None] * inv_freq
    scale = jnp.float32(config.attention_factor)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def frequency_divisors(config: RopeConfig) -> np.ndarray:
    """[rotary_dim / 2] float64: what an extension divides the plain frequencies by, in sequences no
    longer than the original length."""
    return _plain_frequencies(config) / _inverse_frequencies(config)


def _plain_frequencies(config: RopeConfig) -> np.ndarray:
    exponents = np.arange(0, config.rotary_dim, 2, dtype=np.float64) / config.rotary_dim
    return config.theta**-exponents


def _inverse_frequencies(config: RopeConfig) -> np.ndarray:
    """[rotary_dim / 2] float64, of sequences no longer than the original length."""
    inv_freq = _plain_frequencies(config)
    if config.rope_type == "linear":
        return inv_freq / config.factor
    if config.rope_type == "yarn":
        return _yarn(config, inv_freq)
    if config.rope_type == "llama3":
        return _llama3(config, inv_freq)
    if config.rope_type == "longrope":
        return inv_freq / np.asarray(config.short_factor)
    return inv_freq


def _yarn(config: RopeConfig, inv_freq: np.ndarray) -> np.ndarray:
    """Pairs that turn often over the original length stay, the others are interpolated."""

    def pair_with(turns: float) -> float:
        ratio = config.original_length / (turns * 2 * math.pi)
        return config.rotary_dim * math.log(ratio) / (2 * math.log(config.theta))

    low, high = pair_with(config.beta_fast), pair_with(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.rotary_dim - 1)
    width = high - low or 0.001
    interpolated = np.clip((np.arange(len(inv_freq)) - low) / width, 0, 1)
    return inv_freq / config.factor * interpolated + inv_freq * (1 - interpolated)


def _llama3(config: RopeConfig, inv_freq: np.ndarray) -> np.ndarray:
    """Long waves are interpolated, short ones stay, and those between are mixed."""
    turns = config.original_length * inv_freq / (2 * math.pi)
    kept = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    kept = np.clip(kept, 0, 1)
    return inv_freq / config.factor * (1 - kept) + inv_freq * kept


def _at_length(config: RopeConfig, inv_freq: jax.Array, seq_lens: jax.Array) -> jax.Array:
    """[T, rotary_dim / 2] float32: the frequencies that each token has at its sequence's length."""
    if config.rope_type == "longrope":
        ratio = np.asarray(config.short_factor) / np.asarray(config.long_factor)
        long = inv_freq * jnp.asarray(ratio, jnp.float32)
        return jnp.where((seq_lens > config.original_length)[:, None], long, inv_freq)
    # dynamic: theta grows by growth ** (d / (d - 2)), hence inv_freq by growth ** (-2i / (d - 2)).
    length = jnp.maximum(seq_lens, config.original_length).astype(jnp.float32)
    growth = config.factor * length / config.original_length - (config.factor - 1)
    exponents = np.arange(0, config.rotary_dim, 2) / max(config.rotary_dim - 2, 1)
    return inv_freq * growth[:, None] ** jnp.asarray(-exponents, jnp.float32)
