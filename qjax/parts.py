"""Pieces of a weight: what one of several devices holds of it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from pallas_kernels import codes
from pallas_kernels.matmul.spec import CANONICAL
from qjax.errors import ShardingError, UnsupportedError
from qjax.lazy import LazyArray
from qjax.qarray import QArray
from qjax.qtypes import QTYPES


def part(weight: QArray, parts: tuple[int, int], index: tuple[int, int]) -> QArray:
    """A piece of a weight, exactly.

    All pieces have the same static fields. Where a group of scales would be cut, smaller groups
    repeat its scale.

    Args:
      weight: canonical, on the host.
      parts: into how many equal pieces its outputs N and its inputs K are cut.
      index: which of them.

    Raises:
      ShardingError: it cannot be cut so; tells what it can be cut into.
    """
    assert weight.layout == CANONICAL
    (rows, columns), (row, column) = parts, index
    if columns > 1:
        weight = _columns(weight, columns, column)
    return weight if rows == 1 else _rows(weight, rows, row)


def _rows(weight: QArray, parts: int, index: int) -> QArray:
    n = weight.shape[0]
    size = _size("outputs", n, parts, max(1, weight.hadamard[1]))
    if "output_perm" in weight.aux:
        try:
            return weight.rows(slice(index * size, (index + 1) * size))
        except UnsupportedError as error:
            raise ShardingError(f"{error}: it cannot be split in {parts} by its outputs") from error
    group, scale, zero_point = _groups(weight, -2, size, index)
    lora_b = {}
    if "lora_b" in weight.aux:
        lora_b = {"lora_b": weight.aux["lora_b"][..., index * size : (index + 1) * size, :]}
    return replace(
        weight,
        qvalue=weight.qvalue[..., index * size : (index + 1) * size, :],
        shape=(size, weight.shape[1]),
        group=group,
        scale=scale,
        zero_point=zero_point,
        aux=weight.aux | lora_b,
    )


def _columns(weight: QArray, parts: int, index: int) -> QArray:
    k, qtype = weight.shape[1], QTYPES[weight.qtype]
    unit = max(qtype.block_elements, weight.hadamard[0])
    if weight.act is not None and weight.act.group_size is not None:
        unit = math.lcm(unit, weight.act.group_size)
    size = _size("inputs", k, parts, unit)
    here = slice(index * size, (index + 1) * size)
    group, scale, zero_point = _groups(weight, -1, size, index)
    # Scales of inputs that are reordered belong to the inputs as they come, which all have.
    keys = ("perm", "lora_a") if "perm" in weight.aux else ("act_pre_scale", "lora_a")
    cut = {key: weight.aux[key][..., here] for key in keys if key in weight.aux}
    return replace(
        weight,
        qvalue=weight.qvalue[..., _bytes(weight, size, index)],
        shape=(weight.shape[0], size),
        group=group,
        scale=scale,
        zero_point=zero_point,
        aux=weight.aux | cut,
    )


def _bytes(weight: QArray, size: int, index: int) -> slice | np.ndarray:
    """Where the bytes of columns lie in a row."""
    row = QTYPES[weight.qtype].row_bytes(size)
    code = codes.CODES.get(weight.qtype)
    if code is None or code.kind != "sparse":
        return slice(index * row, (index + 1) * row)
    # The codes that are kept of all columns lie before the places of all.
    kept = size // 2 * code.kept // 8
    whole = weight.shape[1] // size * kept
    places = np.arange(row - kept) + whole + index * (row - kept)
    return np.concatenate([np.arange(kept) + index * kept, places])


def _groups(
    weight: QArray, axis: int, size: int, index: int
) -> tuple[tuple[int, int] | None, Any, Any]:
    """Group, scale and zero point of piece `index` of `size` rows (axis -2) or columns (-1)."""
    if weight.group is None:
        return None, None, None
    whole, length = weight.group[axis], weight.shape[axis]
    if whole >= length:  # one scale for all
        own, scale, zero_point = min(whole, size), weight.scale, weight.zero_point
    else:
        own = math.gcd(whole, size)
        tiles = np.arange(index * size, (index + 1) * size, own) // whole
        scale, zero_point = (_taken(x, tiles, axis) for x in (weight.scale, weight.zero_point))
    group = (own, weight.group[1]) if axis == -2 else (weight.group[0], own)
    return group, scale, zero_point


def _taken(array: Any, tiles: np.ndarray, axis: int) -> Any:
    """The scales `tiles` of an axis; a view where they follow each other."""
    if array is None:
        return None
    follow = len(tiles) == tiles[-1] - tiles[0] + 1
    here = slice(int(tiles[0]), int(tiles[-1]) + 1) if follow else tiles
    return array[..., here, :] if axis == -2 else array[..., here]


def _size(what: str, length: int, parts: int, unit: int) -> int:
    """Of a piece.

    Raises ShardingError where it is no multiple of `unit`.
    """
    if length % (parts * unit):
        works = [str(n) for n in range(1, min(length // unit, 64) + 1) if length % (n * unit) == 0]
        blocks = f" in blocks of {unit}" if unit > 1 else ""
        raise ShardingError(
            f"{length} {what}{blocks} cannot be split in {parts}: in {', '.join(works) or 1} they "
            "can"
        )
    return length // parts


def lazily(weight: QArray) -> QArray:
    """A weight on the host whose large arrays are read (`read`) when all that is wanted of them
    has been said.
    """
    lazy = {
        name: LazyArray.of(array)
        for name in ("qvalue", "scale", "zero_point")
        if (array := getattr(weight, name)) is not None
    }
    return replace(weight, **lazy)


def read(weight: QArray) -> QArray:
    """The weight with arrays of numpy in place of lazy ones."""
    return jax.tree.map(
        lambda leaf: np.ascontiguousarray(leaf) if isinstance(leaf, LazyArray) else leaf, weight
    )
