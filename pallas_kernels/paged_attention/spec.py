"""What an attention kernel knows before it sees the arrays."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionSpec:
    """Static description of one layer's attention.

    Attributes:
      num_heads, num_kv_heads, head_dim: query head h reads kv head h // (num_heads / num_kv_heads).
      rotary_dim: leading dimensions of a head that rope rotates.
      scale: factor on the scores.
      sliding_window: a query sees the last `sliding_window` positions, itself included; None: all.
      soft_cap: scores become cap * tanh(score / cap) before masking; None: they stay.
      exact: queries and the weights of the softmax are not rounded, whatever the pages hold.
        Otherwise an implementation may round them to bfloat16, or finer, for pages that are not
        float32.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    scale: float
    sliding_window: int | None = None
    soft_cap: float | None = None
    exact: bool = False
