"""Params: a loaded model as one value, the weights with what is needed to use them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from qjax.models.config import ModelConfig


PLAIN = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class Use:
    """All weights of one kind.

    Attributes:
      method: that they are quantized with, or "".
      qtype: key of QTYPES, or the dtype of what is no matrix.
      activation: type that their inputs are rounded to, or "".
      tensors, weights: how many.
      nbytes: in memory.
      stored: bytes in the checkpoint, or 0 where there is none.
    """

    method: str
    qtype: str
    activation: str
    tensors: int
    weights: int
    nbytes: int
    stored: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / max(1, self.weights)

    @property
    def ratio(self) -> float | None:
        """Bytes in memory for each that is stored."""
        return self.nbytes / self.stored if self.stored else None


@dataclass(frozen=True)
class Summary:
    """What a model's weights take, by kind, the largest first; its text is a table."""

    uses: tuple[Use, ...]

    @property
    def total(self) -> Use:
        sums = [
            sum(getattr(use, name) for use in self.uses)
            for name in ("tensors", "weights", "nbytes", "stored")
        ]
        return Use("total", "", "", *sums)

    def __str__(self) -> str:
        lines = [
            f"{'method':<20}{'type':<12}{'inputs':<10}{'tensors':>8}{'weights':>16}{'bits':>7}"
            f"{'MB':>10}{'stored MB':>11}{'ratio':>7}"
        ]
        for use in (*self.uses, self.total):
            ratio = "-" if use.ratio is None else f"{use.ratio:.2f}"
            lines.append(
                f"{use.method or '-':<20}{use.qtype:<12}{use.activation or '-':<10}"
                f"{use.tensors:>8}{use.weights:>16,}{use.bits_per_weight:>7.2f}"
                f"{use.nbytes / 1e6:>10.2f}{use.stored / 1e6:>11.2f}{ratio:>7}"
            )
        return "\n".join(lines)


def _weights(leaf: Any) -> int:
    """Elements of a QArray, experts included, or of an array."""
    if not hasattr(leaf, "qtype"):
        return leaf.size
    # Padding of a private layout hides in its rows, never in the leading axes (experts).
    leading = leaf.qvalue.shape[:-2] if leaf.qvalue.ndim > 2 else ()
    return math.prod(leading) * math.prod(leaf.shape)


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
      key_bases: what `qjax.key_bases` found for this model, by its config
        and numerics.
    """

    source: str = ""
    load_tokenizer: Callable[[], Any] | None = None
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    origin: Any = None
    key_bases: dict[Any, Any] = field(default_factory=dict)

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
      mesh: the devices over which the weights are split, see `qjax.sharding`; None for one device.
      all_reduce: what their sums are sent as, see `qjax.load`.
    """

    tree: Any
    config: ModelConfig
    host: Host = field(default_factory=Host)
    mesh: Mesh | None = None
    all_reduce: str = "float32"

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

    def summary(self) -> Summary:
        """What the weights take, by method and type; `print` shows it as a table."""
        origin = self.host.origin
        method = "" if origin is None else origin.quantization.name
        stored = {} if origin is None else origin.stored_bytes()
        uses: dict[tuple[str, str, str], list[int]] = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            self.tree, is_leaf=lambda node: hasattr(node, "qtype")
        ):
            name = ".".join(str(key.key) for key in path)
            if hasattr(leaf, "qtype"):
                plain = leaf.qtype in PLAIN and leaf.act is None
                key = ("" if plain else method, leaf.qtype, leaf.act.dtype if leaf.act else "")
            else:
                key = ("", str(leaf.dtype), "")
            use = uses.setdefault(key, [0, 0, 0, 0])
            amounts = (1, _weights(leaf), leaf.nbytes, stored.get(name, 0))
            uses[key] = [a + b for a, b in zip(use, amounts, strict=True)]
        rows = [Use(*key, *use) for key, use in uses.items()]
        return Summary(tuple(sorted(rows, key=lambda row: -row.nbytes)))

    @property
    def _static(self) -> tuple[ModelConfig, Host, Mesh | None, str]:
        return self.config, self.host, self.mesh, self.all_reduce

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, dict[str, Any]]], tuple[Any, ...]]:
        return ((jax.tree_util.GetAttrKey("tree"), self.tree),), self._static

    def tree_flatten(self) -> tuple[tuple[dict[str, Any]], tuple[Any, ...]]:
        return (self.tree,), self._static

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], children: tuple[Any]) -> Params:
        return cls(children[0], *static)
