"""A recommendation in words: reasons, commands, and why the rest is not it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from qjax.recommend.candidates import GGUF, Candidate
from qjax.recommend.figures import losses
from qjax.recommend.option import Option, Recommendation

_SHORT = (
    40e-6  # seconds of a layer, below which launches of kernels, which nobody counts, take most
)


def explained(found: Recommendation, options: Sequence[Option]) -> Recommendation:
    """With reasons and commands for the best and the runners-up, and notes."""
    if found.best is None:
        return replace(found, notes=(*found.notes, *_notes(found)))
    best = replace(
        found.best,
        reasons=(*found.best.reasons, *_reasons(found, found.best, options)),
        commands=commands(found, found.best),
    )
    others = tuple(replace(each, commands=commands(found, each)) for each in found.runners_up)
    return replace(found, best=best, runners_up=others, notes=(*found.notes, *_notes(found)))


def commands(found: Recommendation, option: Option) -> tuple[str, ...]:
    """That make the model, where there is something to make, and serve it."""
    name, made = found.model, []
    if option.scheme not in (None, "UNQUANTIZED"):
        stem = _stem(found.model)
        groups = f"-g{option.group_size}" if option.group_size else ""
        name = f"{stem}-{option.scheme.lower()}{groups}"
        words = ["qjax", "quantize", found.model]
        if option.scheme in GGUF:
            name += ".gguf"
            words += [name, option.scheme, "--method", option.method]
        else:
            words += [name, "--scheme", option.scheme]
            words += ["--group-size", str(option.group_size)] if option.group_size else []
            words += ["--method", option.method, "--dtype", "bfloat16"]
        made.append(shlex.join(words))
    words = ["qjax", "serve", name, "--max-model-len", str(found.max_model_len)]
    words += ["--max-num-seqs", str(-(-found.max_num_seqs // option.split.data))]
    if option.kv_cache_dtype != "auto":
        words += ["--kv-cache-dtype", option.kv_cache_dtype]
    if option.split.devices > 1:
        words += option.split.flags.split()
    return (*made, shlex.join(words))


def _stem(model: str) -> str:
    path = Path(model).expanduser()
    if path.name == "config.json":
        path = path.resolve().parent
    elif path.exists():
        path = path.resolve()
    name = path.name.split(":")[0]
    return name.removesuffix(".gguf").removesuffix(".safetensors")


def _reasons(found: Recommendation, best: Option, options: Sequence[Option]) -> Iterator[str]:
    yield _first(found, best)
    if math.isfinite(found.tolerance) and best.divergence is not None:
        yield _accuracy(best, found.tolerance)
    elif best.divergence is None:
        yield "what it costs in accuracy was not measured: `qjax eval kld` does"
    yield from _cache(best, options)
    if best.split.devices > 1:
        same = [
            each
            for each in options
            if (each.name, each.kv_cache_dtype) == (best.name, best.kv_cache_dtype)
            and each.split != best.split
        ]
        told = ", ".join(
            f"{each.split.flags} {goal_figure(each, found.goal)}"
            + ("" if each.memory.fits else " (does not fit)")
            for each in same
        )
        yield f"split as {best.split.flags}" + (f"; other splits: {told}" if told else "")


def _first(found: Recommendation, best: Option) -> str:
    """How it stands beside the others."""
    what = {
        "latency": "the least time for a token",
        "throughput": "the most tokens a second, prompts included",
        "size": "the least memory",
    }[found.goal]
    own = goal_figure(best, found.goal)
    others = sorted(found.runners_up, key=lambda each: score(each, found.goal))
    if not others:
        return f"nothing else fits: {own}"
    rival = f"{others[0].name}: {goal_figure(others[0], found.goal)}"
    if score(best, found.goal) <= score(others[0], found.goal):
        return f"of what fits, it has {what}: {own}; next is {rival}"
    return f"of what comes within 10% of {what}, it loses least: {own}; {rival}"


def _accuracy(best: Option, tolerance: float) -> str:
    measured = losses()
    if not best.divergence:
        return "it costs no accuracy: nothing is rounded further"
    return (
        f"it costs a KL divergence of {best.divergence:.4f} nats a token of the {tolerance:g} that "
        f"may be, as measured on {measured.model} over {measured.text} (weights and cache added "
        "up); other models lose more or less, `qjax eval kld` tells"
    )


def _cache(best: Option, options: Sequence[Option]) -> Iterator[str]:
    alike = [each for each in options if (each.name, each.split) == (best.name, best.split)]
    plain = next(each for each in alike if each.kv_cache_dtype == "auto")
    if best.kv_cache_dtype != "auto":
        saved = plain.memory.cache - best.memory.cache
        faster = plain.step_seconds / best.step_seconds
        fits = "" if plain.memory.fits else f", and in {plain.cache_dtype} it would not fit"
        yield (
            f"a cache in {best.cache_dtype} saves {size(saved)} of {size(plain.memory.cache)} and "
            f"decodes {faster:.2f} times as fast as one in {plain.cache_dtype}{fits}"
        )
        return
    int8 = next((each for each in alike if each.kv_cache_dtype == "int8"), None)
    if int8 is not None:
        faster = plain.step_seconds / int8.step_seconds
        yield (
            f"a cache in int8 would save {size(plain.memory.cache - int8.memory.cache)} and decode "
            f"{faster:.2f} times as fast: it pays where memory runs short"
        )


def _notes(found: Recommendation) -> Iterator[str]:
    hardware, speeds = found.hardware, found.speeds
    name = hardware.device.name
    if speeds is None:
        yield f"speeds: roofline only, not measured: no kernel was timed on {name}"
    else:
        here = "" if hardware.device.kind == "cpu" or name in speeds.name else f", not on {name}"
        yield (
            f"speeds: the roofline of {name} by the shares of it that kernels reached on "
            f"{speeds.name} ({speeds.source}, {speeds.date}){here}"
        )
    best = found.best
    if best is None:
        return
    if speeds is not None and best.unmeasured:
        yield f"not measured there, taken as the slowest that was: {', '.join(best.unmeasured)}"
    layers = best.layers
    if hardware.device.kind != "cpu" and best.step_seconds / layers < _SHORT:
        yield (
            f"a layer would take {best.step_seconds / layers * 1e6:.0f} microseconds: launching "
            "its kernels takes longer than that, and is not counted: expect less"
        )


def too_lossy(candidate: Candidate, tolerance: float) -> str:
    """Why a candidate's accuracy does not do; empty where it does."""
    if candidate.loss is None and math.isfinite(tolerance):
        return "what it costs in accuracy was not measured (a tolerance of inf allows it)"
    if candidate.loss is not None and candidate.loss.divergence > tolerance:
        return f"costs a KL divergence of {candidate.loss.divergence:.4f}, more than {tolerance:g}"
    return ""


def too_large(name: str, options: Sequence[Option]) -> str:
    """Why no option of this name fits."""
    small = min((each for each in options if each.name == name), key=lambda each: each.memory.total)
    return f"takes {size(small.memory.total)} of {size(small.memory.usable)} usable"


def score(option: Option, goal: str) -> float:
    """The less the better: seconds, or bytes of all devices."""
    if goal == "latency":
        return option.step_seconds
    if goal == "throughput":
        return 1 / option.total_tokens_per_second
    return option.memory.total * option.split.devices


def goal_figure(option: Option, goal: str) -> str:
    """What the goal goes by."""
    if goal == "latency":
        return f"{option.step_seconds * 1e3:.2f} ms"
    if goal == "throughput":
        return f"{option.total_tokens_per_second:,.0f} tokens/s"
    return size(option.memory.total * option.split.devices)


def size(nbytes: float) -> str:
    """As "1.23 GB"."""
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.1f} MB"
