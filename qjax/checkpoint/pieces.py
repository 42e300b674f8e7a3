"""A weight, or the piece of it that a device wants, from the files to the host.

What is stored is decoded, taken out of joined layers, put in order and cut: all of that only says
which bytes are wanted (`qjax.lazy`), and these alone are then read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter

import jax
import numpy as np

from qjax import parts
from qjax.checkpoint import plan
from qjax.checkpoint.opened import Opened
from qjax.checkpoint.targets import WHOLE, Wanted
from qjax.errors import CheckpointError, ShardingError, UnsupportedError
from qjax.models.config import ModelConfig
from qjax.qarray import QArray

_OF_ROUNDING = ("act_scale", "act_zero_point", "act_global_scale")


def decoded(opened: Opened, place: plan.Weight) -> QArray:
    """A canonical weight on the host, of which nothing large is read before `read` says what.

    Experts that others have are decoded as well: what all of them have in common, such as whether
    any has its columns in another order, must be the same on every machine.

    Raises:
      CheckpointError: what it is stored in is damaged.
      UnsupportedError: experts of one layer are stored in different ways.
    """
    experts = [_decode(opened, piece) for piece in place.pieces]
    weight = experts[0] if len(experts) == 1 else _stacked(place, experts)
    order = pair_order(place.name, opened.config) if opened.rotated_pairs else None
    if order is not None:
        weight = weight.take_rows(order)
    return weight if opened.quantize_activations else without_activation_quantization(weight)


def read(place: plan.Weight, weight: QArray, wanted: Wanted = WHOLE) -> QArray:
    """A piece of what `decoded` gave, in numpy's arrays: the bytes of no other are read.

    Raises:
      CheckpointError: it holds values that are not finite, or that its type has no room for.
      ShardingError: it cannot be split so.
    """
    file = next(iter(place.pieces[0].stored.values())).file
    piece = parts.read(cut(weight, wanted, f"{file}, {place.name}"))
    several = len(place.pieces) > 1
    stored = place.pieces[wanted.of_experts(len(place.pieces))] if several else place.pieces
    _require_finite(piece, stored)
    return piece


def cut(weight: QArray, wanted: Wanted, where: str) -> QArray:
    """A piece of a canonical weight on the host.

    Raises ShardingError, which begins with `where`, if it cannot be split so.
    """
    try:
        return parts.part(wanted.experts_of(weight), wanted.parts, wanted.index)
    except ShardingError as error:
        raise ShardingError(f"{where}: {error}") from None


def _stacked(place: plan.Weight, experts: list[QArray]) -> QArray:
    try:
        return QArray.stack(experts)
    except ValueError as error:
        kinds = " and ".join(sorted({f"{w.qtype} in groups of {w.group}" for w in experts}))
        raise UnsupportedError(
            f"{next(iter(place.pieces[0].stored.values())).file}, {place.name}: experts of one "
            f"layer must be stored alike, but these are {kinds}"
        ) from error


def _decode(opened: Opened, piece: plan.Piece) -> QArray:
    """What a stored layer holds; nothing large is read of it yet."""
    weight = parts.lazily(piece.layer.decode(plan.read(opened.files, piece)))
    return weight if piece.rows is None else weight.rows(piece.rows)


def _require_finite(weight: QArray, pieces: Sequence[plan.Piece]) -> None:
    """Raises CheckpointError, which names the first layer at fault, for NaN and infinity."""
    arrays = {"scale": weight.scale, "zero_point": weight.zero_point, **weight.aux}
    faults = [
        f"its {name} holds values"
        for name, array in arrays.items()
        if array is not None and not np.isfinite(np.asarray(array, np.float32)).all()
    ]
    if not weight.is_finite:
        faults.append("it holds codes")
    if not faults:
        return
    if len(pieces) > 1:
        for expert, piece in enumerate(pieces):
            _require_finite(jax.tree.map(itemgetter(expert), weight), [piece])
    raise CheckpointError(
        f"{faults[0]} that are not finite",
        file=next(iter(pieces[0].stored.values())).file,
        field=pieces[0].module,
    )


def without_activation_quantization(weight: QArray) -> QArray:
    """The weight with inputs that are not rounded."""
    if weight.act is None:
        return weight
    kept = {k: v for k, v in weight.aux.items() if k not in _OF_ROUNDING}
    return replace(weight, act=None, aux=kept)


def pair_order(name: str, config: ModelConfig) -> np.ndarray | None:
    """The order that puts the rows of q and k back into halves; None for other parameters.

    llama.cpp rotates neighbouring rows of a head, this model (as Hugging Face's) rows that are half
    a head apart. Only whole rows move, so this holds for packed blocks too.
    """
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return None
    rows = np.arange(heads * config.head_dim)
    return rows.reshape(heads, config.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)
