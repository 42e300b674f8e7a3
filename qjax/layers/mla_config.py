"""The sizes of latent attention, apart from its layer: reading a config shall not import Flax."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MLAConfig:
    """Sizes of latent attention.

    Attributes:
      q_lora_rank: of the latent vector of queries; None: queries come straight from the input.
      kv_lora_rank: of the latent vector of keys and values.
      qk_nope_head_dim, qk_rope_head_dim: dimensions of a head's queries and keys, in this order,
        that know no positions and that are rotated.
      v_head_dim: of a head's values.
      rope_interleave: pairs to rotate are neighbours, not half of `qk_rope_head_dim` apart.
      split: each head has a matrix for its keys and one for its values, not all heads one together;
        the cache then holds the latent vector.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_interleave: bool
    split: bool = False

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_head_dim(self) -> int:
        """Width of keys and values in the cache."""
        if self.split:
            return self.kv_lora_rank + self.qk_rope_head_dim
        return max(self.qk_head_dim, self.v_head_dim)
