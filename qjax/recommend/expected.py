"""How long steps take: the roofline, by the shares of it that were measured."""

from __future__ import annotations

from dataclasses import dataclass

from qjax.planning.roofline import Load, telling_seconds, work
from qjax.qarray import QArray
from qjax.recommend.figures import NEAREST, Speeds, bytes_beside, kind_of, share
from qjax.recommend.hardware import Hardware

_BYTES_WIDE = {"int8": "int8", "fp8_e4m3": "fp8", "fp4_e2m1": "fp4"}


@dataclass(frozen=True)
class Step:
    """Attributes:
    seconds: that it takes.
    unmeasured: kinds of weights and caches in it that count as if they reached the roofline.
    """

    seconds: float
    unmeasured: frozenset[str]


def step(
    load: Load,
    hardware: Hardware,
    found: Speeds | None,
    cache_dtype: str,
    *,
    sequences: int,
    tokens: int,
    context: int,
) -> Step:
    """Of one with `tokens` new tokens of `sequences` sequences, `context` cached of each before.

    seconds = sum over weights of max(bytes / bandwidth, operations / peak) / share(kind, rows), the
    same of attention, and what devices tell each other. What was not measured on a device that was
    has the least share of what was. Without any measured figures shares are 1 and
    operations on rounded inputs count half where the device's units multiply them (int8 and FP8
    have twice the rate of bfloat16 in every data sheet of `qjax.planning.devices`, FP4 four times).
    """
    device = hardware.device
    reach = (1.0, 1.0) if found is None or hardware.reached else found.reach
    bandwidth, peak = device.bandwidth * reach[0], device.peak * reach[1]
    done = work(load, sequences=sequences, tokens=tokens, context=context)
    seconds, unmeasured = 0.0, set()
    for each, rows, nbytes, operations in done.products:
        part, rate = 1.0, 1.0
        if rows and each.weight is not None:
            if found is None:
                unmeasured.add(kind_of(each.weight) or each.weight.qtype)
                rate = _rate(each.weight, hardware)
            else:
                part, known = _share(found, each.weight, rows)
                unmeasured |= known
        seconds += max(nbytes / bandwidth, operations / peak / rate) / part
    decoding, part = tokens == sequences, 1.0
    curves = {} if found is None else found.attention if decoding else found.prompt_attention
    if curves:
        size = done.cached / len(load.cache_per_token) if decoding else context + tokens / sequences
        # A type that was not measured is not taken to be better than any that was.
        known = [curves[cache_dtype]] if cache_dtype in curves else curves.values()
        part = min(share(curve, size) for curve in known)
    if cache_dtype not in curves:
        unmeasured.add(f"{'' if decoding else 'prompts over '}{cache_dtype} cache")
    seconds += max(done.cached / bandwidth, done.attending / peak) / part
    seconds += telling_seconds(load, device, sequences=sequences, tokens=tokens)
    return Step(seconds, frozenset(unmeasured))


def _share(found: Speeds, weight: QArray, rows: float) -> tuple[float, set[str]]:
    """Of the roofline, by what was measured; and what was not, which is taken for the slowest."""
    kind = kind_of(weight)
    if kind is None or kind not in found.products:
        slowest = min(share(curve, rows) for curve in found.products.values())
        return slowest, {kind or weight.qtype.upper()}
    beside = bytes_beside(weight)
    own = {weight.qtype.upper()} if weight.qtype in NEAREST else set()
    return share(found.products[kind], rows) * beside, own


def _rate(weight: QArray, hardware: Hardware) -> float:
    if weight.act is None:
        return 1.0
    wide = _BYTES_WIDE.get(weight.act.dtype)
    return (4.0 if wide == "fp4" else 2.0) if wide in hardware.multiplies else 1.0
