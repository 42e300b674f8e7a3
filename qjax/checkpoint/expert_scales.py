"""Scales of experts that are stored joined, while their weights are stored one by one.

transformers writes its FP8 mixtures so: "experts.3.gate_proj.weight" and all other weights alone,
but the scales as it holds them, `experts.gate_up_proj_scale_inv` [experts, rows of gate and then of
up, columns], `experts.down_proj_scale_inv`, and with static activations `..._activation_scale`
[experts]. What belongs to one expert is a run of bytes: it gets a record of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from qjax.checkpoint.mapped import TensorRecord

_JOINED = re.compile(
    r"(?P<experts>.+\.experts)\.(?P<projection>gate_up_proj|down_proj)_"
    r"(?P<suffix>scale_inv|activation_scale)"
)
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_SUFFIXES = {"scale_inv": "weight_scale_inv", "activation_scale": "activation_scale"}


def taken_apart(tensors: dict[str, TensorRecord]) -> dict[str, TensorRecord]:
    """The records of a checkpoint, with one for each expert in place of joined scales.

    Scales whose weights are joined, too, stay as they are.
    """
    alone = {name.partition(".experts.0.")[0] for name in tensors if ".experts.0." in name}
    result = {}
    for name, record in tensors.items():
        match = _JOINED.fullmatch(name)
        if match and match["experts"].removesuffix(".experts") in alone and record.shape:
            result.update({part.name: part for part in _parts(record, match)})
        else:
            result[name] = record
    return result


def _parts(record: TensorRecord, match: re.Match[str]) -> Iterator[TensorRecord]:
    count, *shape = record.shape
    parts, suffix = _PARTS[match["projection"]], _SUFFIXES[match["suffix"]]
    size = record.nbytes // count if count else 0
    # One scale serves gate and up together, or each has as many rows as the other.
    halves = len(parts) if len(shape) == 2 and shape[0] % len(parts) == 0 else 1
    if halves > 1:
        shape[0] //= halves
    for expert in range(count):
        for index, part in enumerate(parts):
            start = record.offset + expert * size + (index % halves) * (size // halves)
            yield replace(
                record,
                name=f"{match['experts']}.{expert}.{part}.{suffix}",
                shape=tuple(shape),
                offset=start,
                nbytes=size // halves,
            )
