"""Parts of joined layers, put together again: q, k and v, or gate and up, as one stored tensor.

The rows of a part follow those of the part before, or, in the experts of gpt-oss, the rows of all
parts lie in turn.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from qjax.errors import UnsupportedError
from qjax.qarray import QArray


def arrays(parts: list[np.ndarray], in_turn: bool, *, axis: int) -> np.ndarray:
    """Joins along an axis, -1 or -2; `in_turn`: the first of each part, then the second ..."""
    if not in_turn:
        return np.concatenate(parts, axis=axis)
    shape = list(parts[0].shape)
    shape[axis] *= len(parts)
    return np.stack(parts, axis=axis).reshape(shape)


def weights(module: str, parts: list[QArray], in_turn: bool) -> QArray:
    """Weights on the host that were rows of one.

    Raises:
      UnsupportedError: they no longer share what belongs to the whole.
    """
    first = parts[0]
    n = sum(weight.shape[0] for weight in parts)
    shared = all(w.scale is not None and w.scale.shape[-2] == 1 for w in parts)

    def same(values: list[Any]) -> Any:
        if any(a.tobytes() != values[0].tobytes() for a in values):
            raise UnsupportedError(f"{module}: its parts differ in what they have in common")
        return values[0]

    def rows(values: list[Any]) -> Any:
        if values[0] is None:
            return None
        return same(values) if shared else arrays(values, in_turn, axis=-2)

    alike = {(w.qtype, w.act, w.additive, w.hadamard, tuple(sorted(w.aux))) for w in parts}
    groups = {w.group for w in parts} if not shared else set()
    tall = not shared and first.group is not None and first.group[0] > 1
    if len(alike) > 1 or len(groups) > 1 or "output_perm" in first.aux or (in_turn and tall):
        raise UnsupportedError(f"{module}: its parts are stored in ways that cannot be joined")
    aux = {
        key: arrays([w.aux[key] for w in parts], in_turn, axis=-2)
        if key == "lora_b"
        else same([w.aux[key] for w in parts])
        for key in first.aux
    }
    return replace(
        first,
        qvalue=arrays([w.qvalue for w in parts], in_turn, axis=-2),
        scale=rows([w.scale for w in parts]),
        zero_point=rows([w.zero_point for w in parts]),
        shape=(n, first.shape[1]),
        group=(n, first.group[1]) if shared and first.group else first.group,
        aux=aux,
    )
