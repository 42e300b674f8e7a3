"""Params: a loaded model as one value, the weights with what is needed to use them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from qjax.models.config import ModelConfig


@dataclass(eq=False)
class Host:
    """What a model has beside its weights; it never reaches a device.

    All instances are equal, so that a jitted function that takes `Params` is compiled once for a
    config, whichever file the weights came from.

    Attributes:
      source: where the model was loaded from.
      load_tokenizer: makes the tokenizer, called when it is first wanted.
      generation_config: the checkpoint's own defaults for generation, maybe empty.
      origin: how it was stored (a `qjax.checkpoint.plan.Origin`), or None for a model that was made
        in memory.
    """

    source: str = ""
    load_tokenizer: Callable[[], Any] | None = None
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    origin: Any = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Host)

    def __hash__(self) -> int:
        return hash(Host)

    @cached_property
    def tokenizer(self) -> Any:
        return None if self.load_tokenizer is None else self.load_tokenizer()


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class Params:
    """A pytree whose leaves are the arrays of `tree`.

    Attributes:
      tree: nested dict of QArrays and float32 arrays, with Hugging Face parameter names as keys.
      config: what the model is; static.
      host: tokenizer, generation config and source.
    """

    tree: Any
    config: ModelConfig
    host: Host = field(default_factory=Host)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, loaded when first asked for; None where there is none."""
        return self.host.tokenizer

    @property
    def generation_config(self) -> Mapping[str, Any]:
        return self.host.generation_config

    @property
    def source(self) -> str:
        return self.host.source

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they are held."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.tree))

    def tree_flatten_with_keys(self):
        return ((jax.tree_util.GetAttrKey("tree"), self.tree),), (self.config, self.host)

    def tree_flatten(self):
        return (self.tree,), (self.config, self.host)

    @classmethod
    def tree_unflatten(cls, static: tuple[ModelConfig, Host], children: tuple[Any]) -> Params:
        return cls(children[0], *static)
