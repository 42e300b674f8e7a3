"""Which norm or linear layer can take a scale away from the columns of which others.

x * s / s is x: where the output of one layer is the input of others and of nothing else, its
weight can be divided by s for each channel and the columns of theirs multiplied by it, and the
model computes the same. AWQ and SmoothQuant choose s so that rounding loses less.

A layer here is a flat dict of the weights of one decoder layer by their names in the tree, such as
{"self_attn.q_proj.weight": [N, K], "input_layernorm.weight": [K], ...}; experts are stacked.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from qjax.compress.settings import AWQMapping
from qjax.models.config import ModelConfig
from qjax.scheme import matches


@dataclass(frozen=True)
class Scaling:
    """Where a scale can go from and to.

    Attributes:
      smooth: the layer whose output is divided: a norm or a linear layer.
      balance: all layers that read this output, whose columns are multiplied.
      repeat: how many query heads read each channel of `smooth`, of `head_dim` channels a head;
        1 where outputs are inputs one by one.
      per_expert: whether each expert has a scale of its own.
    """

    smooth: str
    balance: tuple[str, ...]
    repeat: int = 1
    head_dim: int = 1
    per_expert: bool = False

    @property
    def is_norm(self) -> bool:
        return self.smooth.endswith("norm")

    def columns(self, s: jax.Array) -> jax.Array:
        """What the columns of `balance` are multiplied with: [..., K] from the scale s [..., C] of
        the channels of `smooth`."""
        if self.repeat == 1:
            return s
        heads = s.reshape(*s.shape[:-1], -1, 1, self.head_dim)
        spread = jnp.broadcast_to(heads, (*heads.shape[:-2], self.repeat, self.head_dim))
        return spread.reshape(*s.shape[:-1], -1)

    def channels(self, x: jax.Array) -> jax.Array:
        """The mean over the columns of `balance` that read each channel: [..., C] from [..., K]."""
        if self.repeat == 1:
            return x
        heads = x.reshape(*x.shape[:-1], -1, self.repeat, self.head_dim)
        return heads.mean(-2).reshape(*x.shape[:-1], -1)


def scalings(config: ModelConfig, names: Collection[str]) -> tuple[Scaling, ...]:
    """All that a decoder layer allows, each after those that change what it depends on.

    Args:
      names: of the layer's weights ("self_attn.q_proj.weight", ...).
    """
    modules = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    found = []

    def add(smooth: str, *balance: str, **more: Any) -> None:
        if smooth in modules and balance and modules.issuperset(balance):
            found.append(Scaling(smooth, balance, **more))

    def under(parent: str, *parts: str) -> list[str]:
        return [name for part in parts if (name := f"{parent}.{part}") in modules]

    attention = "self_attn"
    add(
        "input_layernorm",
        *under(attention, "q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa"),
    )
    if config.mla is None:
        rest = config.num_heads % config.num_kv_heads
        repeat = config.num_heads // config.num_kv_heads
        if not rest:
            add(
                f"{attention}.v_proj",
                f"{attention}.o_proj",
                repeat=repeat,
                head_dim=config.head_dim if repeat > 1 else 1,
            )
    else:
        add(f"{attention}.q_a_layernorm", *under(attention, "q_b_proj"))
        add(f"{attention}.kv_a_layernorm", *under(attention, "kv_b_proj"))
    before = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
    parents = {name.rpartition(".")[0] for name in modules if name.endswith(".down_proj")}
    readers = [name for parent in sorted(parents) for name in under(parent, *_GATED)]
    if config.moe is not None and any(parent.endswith("experts") for parent in parents):
        moe = config.moe
        readers += under(moe.module, moe.router_name, f"{moe.shared_name}_gate")
    add(before, *readers)
    if config.hidden_act != "clipped_swiglu":  # which adds to what up_proj gives
        for parent in sorted(parents):
            add(
                f"{parent}.up_proj",
                f"{parent}.down_proj",
                per_expert=parent.endswith(".experts"),
            )
    return tuple(found)


_GATED = ("gate_proj", "up_proj")


def chosen(
    found: Sequence[Scaling], wanted: Sequence[AWQMapping] | None, prefix: str
) -> tuple[Scaling, ...]:
    """Those of a layer's scalings that a recipe's `mappings` name; all of them for None.

    Which layers read an output is known, so that `balance_layers` only need to name one of them.

    Args:
      prefix: of the layer's names in the model, such as "model.layers.0.".
    """
    if wanted is None:
        return tuple(found)

    def is_named(scaling: Scaling, mapping: AWQMapping) -> bool:
        return bool(matches(prefix + scaling.smooth, mapping.smooth_layer)) and any(
            matches(prefix + name, pattern)
            for name in scaling.balance
            for pattern in mapping.balance_layers
        )

    return tuple(
        scaling for scaling in found if any(is_named(scaling, mapping) for mapping in wanted)
    )


def fold(layer: Mapping[str, Any], scaling: Scaling, s: jax.Array) -> dict[str, Any]:
    """The weights that change when the output of `scaling.smooth` is divided by s.

    Args:
      layer: float weights by name.
      s: float32 [C], or [experts, C]; above 0.

    Returns:
      name -> new weight, in float32.
    """
    s = jnp.asarray(s, jnp.float32)
    changed = {}
    for name in scaling.balance:
        weight = layer[f"{name}.weight"]
        changed[f"{name}.weight"] = weight * scaling.columns(s)[..., None, :]
    weight = layer[f"{scaling.smooth}.weight"]
    changed[f"{scaling.smooth}.weight"] = weight / (s if scaling.is_norm else s[..., :, None])
    if f"{scaling.smooth}.bias" in layer:
        changed[f"{scaling.smooth}.bias"] = layer[f"{scaling.smooth}.bias"] / s
    return changed
