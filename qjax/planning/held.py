"""What one device holds of each parameter of a split model, and in how many bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from pallas_kernels import platform
from qjax import ops
from qjax.checkpoint import native
from qjax.checkpoint.targets import Wanted
from qjax.errors import ShardingError
from qjax.models.config import ModelConfig
from qjax.parts import part
from qjax.qarray import QArray
from qjax.sharding import Parallel, sizes, split_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROWS = 64  # a layout's bytes grow by equal steps with so many rows more
_IN_LAYOUT = frozenset(("global_scale", "codebook", "super_scale", "super_zero"))


@dataclass(frozen=True)
class Held:
    """One parameter's part.

    Attributes:
      nbytes: as the device's kernels like it.
      elements: weights that meet inputs in a product; none in a vector.
      experts: how many of them are in it; 0 where it is of none.
      cut: (group, smaller group) where groups of inputs are cut, and their scales repeated.
      weight: as it is stored, whole; None for what is no weight.
    """

    name: str
    nbytes: int
    elements: int
    experts: int = 0
    cut: tuple[int, int] | None = None
    weight: QArray | None = field(default=None, compare=False, repr=False)


def held(tree: Mapping[str, Any], config: ModelConfig, parallel: Parallel) -> tuple[Held, ...]:
    """What each device holds: all hold as much.

    Args:
      tree: from `hollow_tree`.

    Raises:
      ShardingError: a weight cannot be split so.
    """
    known: dict[tuple, Held] = {}
    return tuple(
        _held(".".join(path), leaf, config, parallel, known)
        for path, leaf in native.leaves_of(tree)
    )


def _held(
    name: str,
    leaf: Any,
    config: ModelConfig,
    parallel: Parallel,
    known: dict[tuple, Held],
) -> Held:
    split = split_of(name, config, parallel)
    lead, rows, columns = sizes(split, parallel)
    rows //= split.copies
    if not isinstance(leaf, QArray):
        pieces = lead * rows
        return Held(name, leaf.nbytes // pieces, 0)
    # A table that is only looked up stays as it is stored, see the loader.
    laid_out = name != EMBEDDING or config.tie_word_embeddings
    key = id(leaf), lead, rows, columns, laid_out, platform.device()
    if key not in known:
        weight = Wanted((lead, 0)).experts_of(leaf)
        try:
            weight = part(weight, (rows, columns), (0, 0))
        except ShardingError as error:
            raise ShardingError(f"{name}: {error}") from None
        outer = weight.qvalue.shape[:-2]
        cut = None
        if leaf.group is not None and weight.group is not None:
            before, after = leaf.group[1], weight.group[1]
            cut = (before, after) if after < min(before, weight.shape[1]) else None
        known[key] = Held(
            "",
            (_laid_out(weight) if laid_out else weight.nbytes),
            math.prod((*outer, *weight.shape)),
            outer[0] if outer and ".experts." in name else 0,
            cut,
            leaf,
        )
    return replace(known[key], name=name)


def _laid_out(weight: QArray) -> int:
    """Bytes of a weight as `ops.prepare` lays it out; of its rows, only few are.

    Each expert, and each further run of rows, takes as much.
    """
    outer = weight.qvalue.shape[:-2]
    beside = sum(x.nbytes for key, x in weight.aux.items() if key not in _IN_LAYOUT)
    # What else there is, as the order of outputs, no layout changes.
    one = replace(weight, aux={k: x for k, x in weight.aux.items() if k in _IN_LAYOUT})
    if outer:
        one = jax.tree.map(lambda x: x[0], one)
    return beside + math.prod(outer) * _bytes_by_rows(one)


def _bytes_by_rows(weight: QArray) -> int:
    n = weight.shape[0]
    rows = 1 if weight.group is None or weight.group[0] >= n else weight.group[0]
    step = math.lcm(_ROWS, rows)
    if n < 3 * step:
        return ops.prepare(weight).nbytes
    least = step + n % step
    one, two = (ops.prepare(weight.rows(slice(0, least + i * step))).nbytes for i in (0, 1))
    return one + (n - least) // step * (two - one)
