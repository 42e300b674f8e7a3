"""What was measured: how near to the roofline kernels come, and what rounding costs.

`speed.json` and `accuracy.json` are distilled from results of benchmarks by `distill.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qjax.bench.weights import KINDS
from qjax.qarray import QArray
from qjax.qtypes import QTYPES

FOLDER = Path(__file__).parent
Curve = Sequence[tuple[float, float]]
"""(size, share of the roofline), by size."""

# Kinds of GGUF's blocks that were not measured, and the nearest that was.
NEAREST = {
    **dict.fromkeys(("q4_1", "q5_0", "q5_1", "iq4_nl"), "Q4_0"),
    **dict.fromkeys(("q2_k", "q3_k", "q5_k", "iq4_xs", "iq3_s", "iq3_xxs"), "Q4_K"),
}


@dataclass(frozen=True)
class Speeds:
    """Shares of its roofline that a device reached.

    Attributes:
      name: of the device, kind: "cpu" or "gpu", architecture: as of `Hardware`.
      source: file of the results, date: of the run.
      processors: of the host.
      bandwidth, peak: bytes/s, and bfloat16 operations/s, that XLA reached in the same run.
      reach: what part these are of the figures that the maker publishes (bandwidth, peak).
      products: by kind of weight, over rows of inputs.
      attention: of decoding, by dtype of the cache, over bytes of it that a layer reads.
      prompt_attention: of prompts, over tokens of context.
    """

    name: str
    kind: str
    architecture: str
    source: str
    date: str
    processors: int
    bandwidth: float
    peak: float
    reach: tuple[float, float]
    products: Mapping[str, Curve]
    attention: Mapping[str, Curve]
    prompt_attention: Mapping[str, Curve]


@dataclass(frozen=True)
class Loss:
    """What rounding has cost a model.

    Attributes:
      divergence: mean KL divergence from the model itself, nats a token.
      same_top: share of tokens whose likeliest successor stays.
      source: file, or command.
    """

    scheme: str
    method: str
    group_size: int | None
    divergence: float
    same_top: float
    source: str


@dataclass(frozen=True)
class Losses:
    """Attributes:
    model, text: that they were measured on.
    weights: of schemes.
    cache: KL divergence by dtype of the cache.
    """

    model: str
    text: str
    weights: tuple[Loss, ...]
    cache: Mapping[str, float]

    def of(self, scheme: str, method: str, group_size: int | None) -> Loss | None:
        key = scheme, method, group_size
        return next(
            (each for each in self.weights if (each.scheme, each.method, each.group_size) == key),
            None,
        )


def share(curve: Curve, size: float) -> float:
    """The curve's value, straight between its points over log(size), and level beyond them."""
    points = sorted(curve)
    at = math.log(max(size, 1e-9))
    before = points[0]
    for point in points:
        if size <= point[0]:
            low, high = math.log(before[0]), math.log(point[0])
            part = 1.0 if high <= low else (at - low) / (high - low)
            return before[1] + min(max(part, 0.0), 1.0) * (point[1] - before[1])
        before = point
    return before[1]


def kind_of(weight: QArray | None) -> str | None:
    """The kind of `qjax.bench.weights` that runs as this weight does; None without one."""
    if weight is None:
        return None
    qtype = weight.qtype
    if qtype in ("bf16", "f16", "f32"):
        return "BF16"
    if qtype in NEAREST:
        return NEAREST[qtype]
    if weight.group is None:
        return next((name for name, kind in KINDS.items() if kind.qtype == qtype), None)
    rounds = None if weight.act is None else weight.act.dtype
    if qtype in ("uint4b8", "int4", "uint4"):
        if weight.zero_point is not None:
            return "W4A16 g128 asym"
        return "W4A16 g32" if weight.group[1] <= 32 else "W4A16 g128"
    if qtype == "int8":
        return "W8A8 INT8" if rounds == "int8" else "W8A16"
    if qtype == "fp8_e4m3":
        return "FP8 block" if weight.group[0] == 128 else "FP8 channel"
    if qtype == "fp4_e2m1":
        return "NVFP4" if "global_scale" in weight.aux else "MXFP4"
    return "NF4" if qtype == "lookup4" else None


def bytes_beside(weight: QArray | None) -> float:
    """Of a weight whose kind was not measured: its bytes to those of the nearest kind, at most one.
    Fewer bits take no less time as long as nobody has seen it."""
    nearest = None if weight is None else NEAREST.get(weight.qtype)
    if weight is None or nearest is None:
        return 1.0
    own, other = (QTYPES[name].row_bytes(256) for name in (weight.qtype, nearest.lower()))
    return min(1.0, own / other)


def speeds_from(found: Mapping) -> Speeds:
    """An entry of speed.json."""
    curves = {
        name: {key: tuple(map(tuple, curve)) for key, curve in found[name].items()}
        for name in ("products", "attention", "prompt_attention")
    }
    return Speeds(**{**found, **curves, "reach": tuple(found["reach"])})


@cache
def speeds() -> tuple[Speeds, ...]:
    """Of all devices that were measured."""
    return tuple(map(speeds_from, json.loads((FOLDER / "speed.json").read_text())))


def speeds_of(architecture: str) -> Speeds | None:
    return next((each for each in speeds() if each.architecture == architecture), None)


@cache
def losses() -> Losses:
    found = json.loads((FOLDER / "accuracy.json").read_text())
    weights = tuple(Loss(**each) for each in found["weights"])
    return Losses(found["model"], found["text"], weights, found["cache"])
