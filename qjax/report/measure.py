"""Measures a base model and others beside it, one after the other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from qjax import bench, evaluate
from qjax.api import load
from qjax.bench.device import description
from qjax.errors import RequestError
from qjax.evaluate.perplexity import Progress
from qjax.evaluate.tasks import items
from qjax.params import Params
from qjax.report import page, plots

PROMPT = 512  # tokens, or half of what a model takes


@dataclass(frozen=True)
class ModelRow:
    """A model of the report.

    Attributes:
      name: as it was asked for.
      method, qtype, activation: of most of its weights, see `qjax.params.Use`.
      weights: how many numbers.
      nbytes, stored: bytes in memory, and in the checkpoint.
      load_seconds: for `qjax.load`.
      prefill, decode: tokens per second of one sequence, in fast numerics.
      perplexity: of the text.
      divergence: from the base; None for the base itself.
    """

    name: str
    method: str
    qtype: str
    activation: str
    weights: int
    nbytes: int
    stored: int
    load_seconds: float
    prefill: bench.BenchRow
    decode: bench.BenchRow
    perplexity: evaluate.Perplexity
    divergence: evaluate.Divergence | None

    @property
    def bits_per_weight(self) -> float:
        """In memory, embeddings and norms included."""
        return 8 * self.nbytes / self.weights


@dataclass(frozen=True)
class Report:
    """Attributes:
    rows: the base, then the others.
    head: device, versions and date, as of `python -m qjax.bench kernels`.
    text: what was read.
    numerics: that the others had while they read it; the base's were exact.
    """

    rows: tuple[ModelRow, ...]
    head: dict[str, Any]
    text: str
    numerics: str


def report(
    base: str | PathLike[str],
    models: Sequence[str | PathLike[str]],
    folder: str | PathLike[str],
    *,
    text: str | None = None,
    text_name: str = "the text",
    window: int = 512,
    max_windows: int | None = None,
    numerics: str = "exact",
    generate: int = 64,
    repeats: int = 3,
    progress: Progress = iter,
) -> Report:
    """Measures models beside a base, and writes report.md, report.json and two plots.

    One model at a time is in memory, beside the base.

    Args:
      base, models: anything that `qjax.load` takes; the models have the tokens of the base.
      folder: where the page goes; made where it does not exist. Files of an earlier report are
        written over.
      text: what perplexity and divergence are measured on; None for the sentences of the task
        qjax_cloze, some 2,500 tokens.
      text_name: what the page calls it.
      window, max_windows: see `qjax.evaluate.perplexity`.
      numerics: of the models while they read the text, see `qjax.generate`; the base's are exact.
      generate, repeats: tokens to decode, and how often, where speed is measured.
      progress: goes over the windows of a text, and may tell how far it is.

    Raises:
      UnsupportedError: matplotlib is not installed.
      RequestError: an argument is out of range, no model is named, the text is too short, or one of
        the models does not have the base's tokens.
    """
    plots.check()
    if not models:
        raise RequestError("a report needs a model beside the base.")
    if text is None:
        sentences = [f"{item['text']} {item['last']}." for item in items("qjax_cloze")]
        text, text_name = "\n".join(sentences), "the sentences of qjax_cloze"
    speed = {"generate": generate, "repeats": repeats}
    started = time.perf_counter()
    params = load(base)
    seconds = time.perf_counter() - started
    exactly = evaluate.reference(
        params, text, window=window, max_windows=max_windows, progress=progress
    )
    rows: list[ModelRow] = []
    for model in models:
        started = time.perf_counter()
        other = load(model)
        other_seconds = time.perf_counter() - started
        found = evaluate.divergence(exactly, other, numerics=numerics, progress=progress)
        if not rows:
            rows.append(_row(base, params, seconds, found.base, None, **speed))
        rows.append(_row(model, other, other_seconds, found.other, found, **speed))
        del other
    done = Report(tuple(rows), description(), text_name, numerics)
    page.write(done, Path(folder))
    return done


def _row(
    name: str | PathLike[str],
    params: Params,
    load_seconds: float,
    perplexity: evaluate.Perplexity,
    divergence: evaluate.Divergence | None,
    *,
    generate: int,
    repeats: int,
) -> ModelRow:
    summary = params.summary()
    most, total = max(summary.uses, key=lambda use: use.weights), summary.total
    prompt = min(PROMPT, params.config.max_position_embeddings // 2)
    prefill, decode = bench.run(
        params, prompt_lengths=(prompt,), generate=generate, batches=(1,), repeats=repeats
    )
    return ModelRow(
        name=fspath(name),
        method=most.method,
        qtype=most.qtype,
        activation=most.activation,
        weights=total.weights,
        nbytes=total.nbytes,
        stored=total.stored,
        load_seconds=load_seconds,
        prefill=prefill,
        decode=decode,
        perplexity=perplexity,
        divergence=divergence,
    )
