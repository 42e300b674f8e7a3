"""Measures the models of a report, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from qjax import bench, evaluate
from qjax.api import load
from qjax.evaluate.perplexity import Progress
from qjax.params import Params
from qjax.report.making import SIXTEEN, Made
from qjax.report.rows import ModelRow, Store

PROMPT = 512  # tokens, or half of what a model takes

Source = str | PathLike[str]


@dataclass(frozen=True)
class Job:
    """A row to be measured: its name, and what gives its model, of a base and the base's path."""

    name: str
    model: Callable[[Params, Source], Made]


def fill(
    store: Store,
    path: Callable[[], Source],
    text: str,
    jobs: Sequence[Job],
    progress: Progress,
    say: Callable[[str], None],
) -> None:
    """Measures what the store does not have yet.

    Args:
      path: gives the base, as `qjax.load` takes it.
      text: for perplexity and divergence.
      progress, say: see `qjax.report`.
    """
    missing = [job for job in jobs if job.name not in store.rows]
    if store.base is not None and not missing:
        return
    settings = store.settings
    say("base: the model")
    source = path()
    params, seconds = _loaded(source)
    say("base: reads the text")
    limits = {name: settings[name] for name in ("window", "max_windows")}
    exactly = evaluate.reference(params, text, **limits, progress=progress)
    if store.base is None:
        name = SIXTEEN[_most(params).qtype] if settings["methods"] else settings["base"]
        found = _divergences(exactly, params, set(settings["numerics"]) - {"exact"}, progress)
        say("base: speed")
        row = _row(name, params, None, seconds, settings, found)
        row.perplexity["exact"] = exactly.perplexity()
        store.add(row, base=True)
    for job in missing:
        say(f"{job.name}: the model")
        made = job.model(params, source)
        other, seconds = _loaded(made.path)
        say(f"{job.name}: reads the text")
        found = _divergences(exactly, other, settings["numerics"], progress)
        say(f"{job.name}: speed")
        store.add(_row(job.name, other, made.seconds, seconds, settings, found))
        del other
        made.discard()


def _loaded(source: Source) -> tuple[Params, float]:
    """A model, and the seconds that loading it took."""
    started = time.perf_counter()
    params = load(source)
    return params, time.perf_counter() - started


def _divergences(
    exactly: evaluate.Reference, params: Params, numerics: Any, progress: Progress
) -> dict[str, evaluate.Divergence]:
    return {
        name: evaluate.divergence(exactly, params, numerics=name, progress=progress)
        for name in numerics
    }


def _most(params: Params) -> Any:
    """The kind of most of the weights, see `qjax.params.Use`."""
    return max(params.summary().uses, key=lambda use: use.weights)


def _row(
    name: str,
    params: Params,
    quantize_seconds: float | None,
    load_seconds: float,
    settings: Mapping[str, Any],
    found: dict[str, evaluate.Divergence],
) -> ModelRow:
    most, total = _most(params), params.summary().total
    prefill, *decode = bench.run(
        params,
        prompt_lengths=(min(PROMPT, params.config.max_position_embeddings // 2),),
        generate=settings["generate"],
        batches=settings["batches"],
        repeats=settings["repeats"],
    )
    return ModelRow(
        name=name,
        method=most.method,
        qtype=most.qtype,
        activation=most.activation,
        bits=most.bits_per_weight,
        weights=total.weights,
        nbytes=total.nbytes,
        stored=total.stored,
        quantize_seconds=quantize_seconds,
        load_seconds=load_seconds,
        prefill=prefill,
        decode=tuple(decode),
        perplexity={numerics: one.other for numerics, one in found.items()},
        divergence=found,
    )
