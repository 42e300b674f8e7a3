"""A model's weights without their numbers: types, shapes and layouts, from a checkpoint's headers.

What a format makes of a layer is learnt by decoding one layer of each kind. Its largest tensor, the
weights, is not read for that: zeros stand in for it. What lies beside is, since it may say what a
weight is: the order of its columns, or zero points that are all the middle.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from qjax.checkpoint import native, plan
from qjax.checkpoint.opened import Opened
from qjax.qarray import QArray


def hollow_tree(opened: Opened) -> dict[str, Any]:
    """The tree that a model would be loaded as, canonical and whole, of arrays that take no memory.

    Every array is a view of one number; only the order of outputs is what it was.

    Raises:
      CheckpointError, UnsupportedError: as `qjax.load` does, where headers tell.
    """
    known: dict[Hashable, QArray] = {}
    tree: dict[str, Any] = {}
    for name, place in opened.places().items():
        leaf: Any
        if isinstance(place, plan.Vector):
            leaf = hollow(place.shape, np.float32)
        else:
            leaf = _weight(opened, place, known)
        native.put(tree, name.split("."), leaf)
    return tree


def _weight(opened: Opened, place: plan.Weight, known: dict[Hashable, QArray]) -> QArray:
    experts = [_piece(opened, piece, known) for piece in place.pieces]
    # Kinds are shared: an order of columns makes two of them, which are then stacked alike.
    first = next((weight for weight in experts if "perm" in weight.aux), experts[0])
    if len(experts) == 1:
        return first
    key = ("stacked", id(first), len(experts))
    if key not in known:
        known[key] = jax.tree.map(lambda x: hollow((len(experts), *x.shape), x.dtype), first)
    return known[key]


def _piece(opened: Opened, piece: plan.Piece, known: dict[Hashable, QArray]) -> QArray:
    stored = tuple((s, r.qtype, r.shape) for s, r in sorted(piece.stored.items()))
    rows = piece.rows and (piece.rows.start, piece.rows.stop)
    key = (piece.module.rpartition(".")[2], piece.shape, stored, rows)
    if key not in known:
        arrays = plan.read(opened.files, piece)
        largest = max(arrays, key=lambda suffix: arrays[suffix].nbytes)
        stand_in = np.zeros(arrays[largest].shape, arrays[largest].dtype)
        weight = piece.layer.decode(arrays | {largest: stand_in})
        weight = weight if piece.rows is None else weight.rows(piece.rows)
        whole: QArray = jax.tree.map(lambda x: hollow(x.shape, x.dtype), weight)
        kept = {key: weight.aux[key] for key in ("output_perm",) if key in weight.aux}
        known[key] = replace(whole, aux=whole.aux | kept)
    return known[key]


def hollow(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of zeros that takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)
