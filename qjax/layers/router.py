"""Which experts a token goes to, and how much each one counts.

Sources: DeepSeek-V2 (arXiv:2405.04434, section 2.2) scores experts by a softmax and lets a token go
to a few groups of them; DeepSeek-V3 (arXiv:2412.19437, section 2.1.2) scores each by itself, and
adds a bias to the scores where it chooses, not where it weighs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax


@dataclass(frozen=True)
class RouterConfig:
    """How experts are chosen and weighed.

    Attributes:
      num_experts, top_k: how many there are, and how many a token goes to.
      scoring: "softmax" over all experts, or the "sigmoid" of each.
      normalize: the weights of the chosen experts are divided by their sum.
      weight_scale: factor on the weights.
      num_groups, top_groups: experts lie in equal groups, one after the other; a token goes to
        experts of its best `top_groups` groups alone.
      group_best: a group is worth the sum of so many of its best scores.
      correction_bias: the choice is made by scores with a bias on each.
    """

    num_experts: int
    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    weight_scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_best: int = 1
    correction_bias: bool = False


def route(
    logits: jax.Array, config: RouterConfig, correction_bias: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Chooses experts.

    Args:
      logits: float32 [T, num_experts].
      correction_bias: float32 [num_experts], where the config says so.

    Returns:
      Weights float32 [T, top_k] and experts int32 [T, top_k], the best first.
    """
    softmax = config.scoring == "softmax"
    scores = jax.nn.softmax(logits, axis=-1) if softmax else jax.nn.sigmoid(logits)
    choice = scores if correction_bias is None else scores + correction_bias
    if config.top_groups < config.num_groups:
        choice = jnp.where(_in_best_groups(choice, config), choice, -jnp.inf)
    experts = lax.top_k(choice, config.top_k)[1]
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if config.normalize:
        # Sigmoids may all be zero; the published models divide by no less than this.
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return weights * config.weight_scale, experts


def _in_best_groups(choice: jax.Array, config: RouterConfig) -> jax.Array:
    """bool [T, num_experts]."""
    groups = choice.reshape(len(choice), config.num_groups, -1)
    worth = lax.top_k(groups, config.group_best)[0].sum(-1)
    best = lax.top_k(worth, config.top_groups)[1]
    member = (best[:, :, None] == jnp.arange(config.num_groups)).any(1)
    return jnp.repeat(member, groups.shape[-1], axis=-1)
