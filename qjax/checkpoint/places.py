"""Where each parameter of a model goes in a folder of safetensors, and what goes there.

A model that was loaded from such a folder goes back to the names that it had there; any other gets
those of its Hugging Face class. Layers that are stored joined are joined again, stacked experts are
taken apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from qjax.checkpoint import joined, names, plan
from qjax.checkpoint.wholes import on_host
from qjax.errors import UnsupportedError
from qjax.models import functional
from qjax.models.config import ModelConfig
from qjax.params import Params
from qjax.qarray import QArray


@dataclass(frozen=True)
class Module:
    """A stored layer.

    Attributes:
      name: its plain name, by which formats know it.
      tensors: names of its tensors by suffix, as far as they are known.
      unread: suffixes of those that the checkpoint had and nobody needs.
      transposed: whether a plain weight is stored with its columns before its rows.
    """

    name: str
    tensors: Mapping[str, str]
    unread: tuple[str, ...] = ()
    transposed: bool = False

    def tensor(self, suffix: str) -> str:
        """The name of a tensor, or the one that it has beside those that are known."""
        if suffix in self.tensors:
            return self.tensors[suffix]
        if self.transposed:  # parameters of one module, not modules of their own
            return f"{self.tensors['weight']}_{suffix}"
        for known, name in self.tensors.items():
            if name.endswith("." + known):
                return f"{name.removesuffix(known)}{suffix}"
        return f"{self.name}.{suffix}"


@dataclass(frozen=True)
class Matrix:
    """The place of a weight: a layer, or one for each expert.

    Attributes:
      rows: of the stored layer, where it has other parts too; None for all of it.
      total: rows of the stored layer.
    """

    modules: tuple[Module, ...]
    rows: slice | None
    total: int


@dataclass(frozen=True)
class Array:
    """The place of any other parameter: `rows` of the last axis of a tensor of this shape, and the
    dtype that it had, as safetensors names it in lower case."""

    tensor: str
    shape: tuple[int, ...]
    qtype: str
    rows: slice | None = None


Places = dict[str, Matrix | Array]


def stored_places(origin: plan.Origin, config: ModelConfig) -> Places:
    """The places that a checkpoint had, by the names of parameters."""
    found: Places = {}
    for name, place in origin.plan.items():
        if isinstance(place, plan.Vector):
            record = place.record
            found[name] = Array(record.name, record.shape, record.qtype, place.rows)
            continue
        modules = tuple(_module(piece, config) for piece in place.pieces)
        first = place.pieces[0]
        found[name] = Matrix(modules, first.rows, first.shape[-2])
    return found


def _module(piece: plan.Piece, config: ModelConfig) -> Module:
    tensors = {suffix: record.name for suffix, record in piece.stored.items()}
    transposed = names.are_gpt_oss_experts(piece.module, config)
    if transposed and "weight" not in tensors:
        tensors["weight"] = next(iter(tensors.values())).rpartition("_")[0]
    return Module(piece.module, tensors, piece.layer.ignores, transposed)


def usual_places(config: ModelConfig) -> Places:
    """The places that a model's Hugging Face class gives its parameters.

    Raises:
      UnsupportedError: its layers are not split as that class has them.
    """
    if config.mla is not None:
        raise UnsupportedError(
            f"a {config.model_type} of a GGUF file holds its attention in other parts than "
            "safetensors do, and cannot be saved as such"
        )
    expected = functional.parameter_shapes(config)
    return {name: _usual(name, list(shape), config, expected) for name, shape in expected.items()}


def _usual(
    name: str, shape: list[int], config: ModelConfig, expected: Mapping[str, tuple[int, ...]]
) -> Matrix | Array:
    module, _, last = name.rpartition(".")
    is_matrix = last == "weight" and len(shape) > 1
    axis = -2 if is_matrix else -1
    rows, total = None, shape[axis]
    whole = names.joined_module(module, config)
    if whole is not None:
        rows, total = names.rows_of(module, whole, config, expected)
        module, shape[axis] = whole, total
    if not is_matrix:
        if last in ("k_scale", "v_scale") and shape != [1]:
            shape = [*shape, 1, 1]  # as LLM Compressor has those of heads
        return Array(names.stored_name(module, last, config), tuple(shape), "f32", rows)
    stacked = names.are_gpt_oss_experts(module, config)
    apart = len(shape) == 3 and not stacked
    stored = names.expert_modules(module, shape[0]) if apart else [module]
    tensors = [{last: names.stored_name(one, last, config)} for one in stored]
    modules = [Module(*each, transposed=stacked) for each in zip(stored, tensors, strict=True)]
    return Matrix(tuple(modules), rows, total)


def walk(params: Params, places: Places) -> Iterator[tuple[Matrix | Array, Any]]:
    """Everything that is stored, one at a time, with its place: canonical weights on the host
    (stacked where the place has several layers), and arrays as the tree holds them.

    Parts of a joined layer wait until all of them have come; the place is that of the last.

    Raises:
      UnsupportedError: parts of a joined layer can no longer be joined.
    """
    parts: dict[str, list[tuple[int, Any]]] = {}  # with their first rows
    for name, place in places.items():
        value = on_host(params, name, leaf_of(params, name))
        if isinstance(place, Array):
            stored, axis = place.tensor, -1
        else:
            stored, axis = place.modules[0].name, -2
        if place.rows is None:
            yield place, value
            continue
        total = place.shape[-1] if isinstance(place, Array) else place.total
        waiting = parts.setdefault(stored, [])
        waiting.append((place.rows.start, value))
        if sum(part.shape[axis] for _, part in waiting) < total:
            continue
        ordered = [part for _, part in sorted(parts.pop(stored), key=lambda part: part[0])]
        in_turn = place.rows.step is not None
        if isinstance(place, Array):
            yield place, joined.arrays(ordered, in_turn, axis=-1)
        else:
            yield place, joined.weights(stored, ordered, in_turn)


def each(place: Matrix, weight: QArray) -> Iterator[tuple[Module, QArray]]:
    """The layers of a weight: its experts, where it has several."""
    if len(place.modules) == 1:
        yield place.modules[0], weight
        return
    for index, module in enumerate(place.modules):
        yield module, jax.tree.map(lambda array, i=index: array[i], weight)


def leaf_of(params: Params, name: str) -> Any:
    """The weight or array of a parameter."""
    node = params.tree
    for key in name.split("."):
        node = node[key]
    return node
