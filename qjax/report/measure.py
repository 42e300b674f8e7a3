"""`qjax.report`: a base model and others beside it, given or made of it, on one page."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from os import fspath
from pathlib import Path

from qjax.bench import history as lines
from qjax.bench.bandwidth import memory_bandwidth
from qjax.bench.device import description
from qjax.errors import RequestError
from qjax.evaluate.perplexity import Progress
from qjax.evaluate.tasks import items
from qjax.report import making, page, plots
from qjax.report.filling import Job, Source, fill
from qjax.report.making import SAMPLES, Made, Samples
from qjax.report.methods import BY_NAME, chosen
from qjax.report.rows import Report, Store

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
NUMERICS = {"both": ("exact", "fast"), "exact": ("exact",), "fast": ("fast",)}


def report(
    base: Source,
    models: Sequence[Source] = (),
    folder: Source = "report",
    *,
    methods: str | Sequence[str] = (),
    calibration: str | None = None,
    num_samples: int = SAMPLES,
    seq_len: int | None = None,
    keep: Source | None = None,
    text: str | None = None,
    text_name: str = "the text",
    window: int = 512,
    max_windows: int | None = None,
    numerics: str = "both",
    generate: int = 64,
    batches: Sequence[int] | None = None,
    repeats: int = 3,
    history: Source | None = None,
    progress: Progress = iter,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Measures models beside a base, and writes report.md, report.json and plots.

    The models are given, or made of the base by methods; with methods, the base is taken in 16
    bits. One model at a time is in memory, beside the base. report.json is written after each, and
    the same call goes on with it; its rows stay on the page when further models are added.

    Args:
      base, models: anything that `qjax.load` takes; the models have the tokens of the base.
      folder: where the page goes; made where it does not exist.
      methods: names of `qjax.report.METHODS`, or "all" of them.
      calibration: samples for methods that want some, see `qjax.oneshot`; None for text that the
        model itself writes.
      num_samples, seq_len: of these samples.
      keep: a folder for the models that are made, which are used when they are there; None for one
        that is removed.
      text: what perplexity and divergence are measured on; None for the sentences of the task
        qjax_cloze, some 2,500 tokens.
      text_name: what the page calls it.
      window, max_windows: see `qjax.evaluate.perplexity`.
      numerics: of the models while they read the text: "exact", "fast" (which speed is measured
        with), or "both"; see `qjax.generate`. What they are held against is the base in exact ones.
      generate, repeats: tokens to decode, and how often, where speed is measured.
      batches: sequences to decode at a time; None for 1 to 128 with methods, else for 1.
      history: a file that gets a line with the key figures, see `qjax.bench.history`.
      progress: goes over the windows of a text, and may tell how far it is.
      say: is told of each step.

    Raises:
      UnsupportedError: matplotlib is not installed.
      RequestError: an argument is out of range, nothing is to be compared, the text is too short,
        one of the models does not have the base's tokens, or `folder` or `keep` holds something
        else.
    """
    plots.check()
    makers = chosen(methods)
    if not models and not makers:
        raise RequestError('a report needs a model beside the base, or methods="all" to make some.')
    if numerics not in NUMERICS:
        raise RequestError(f"numerics must be one of {', '.join(NUMERICS)}, got {numerics!r:.80}.")
    sweep = sorted(batches or (BATCHES if makers else (1,)))
    if sweep[0] < 1 or len(set(sweep)) < len(sweep):
        raise RequestError(f"batches must be different numbers of at least 1, got {sweep}.")
    if text is None:
        sentences = [f"{item['text']} {item['last']}." for item in items("qjax_cloze")]
        text, text_name = "\n".join(sentences), "the sentences of qjax_cloze"
    asked = Samples(calibration or "self", num_samples, seq_len)
    settings = {
        "base": fspath(base),
        "methods": bool(makers),
        "text": text_name,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "window": window,
        "max_windows": max_windows,
        "numerics": NUMERICS[numerics],
        "generate": generate,
        "batches": sweep,
        "repeats": repeats,
        "samples": making.told(base, asked) if makers else None,
    }
    head = {**description(), "commit": lines.commit(), "bandwidth": memory_bandwidth()}
    store = Store.open(Path(folder) / "report.json", head, settings)
    work = making.work_folder(keep, base, asked) if makers else nullcontext(Path())
    with work as made:
        tokens = cache(partial(making.tokens, base, asked, made))
        jobs = [Job(m.name, partial(making.make, m, made, tokens, keep is None)) for m in makers]
        jobs += [_given(model) for model in models]
        path = partial(making.sixteen_bits, base, made) if makers else lambda: base
        fill(store, path, text, jobs, progress, say)
    assert store.base is not None
    order = {name: place for place, name in enumerate(BY_NAME)}
    rows = sorted(store.rows.values(), key=lambda row: order.get(row.name, len(order)))
    done = Report(store.base, tuple(rows), head, settings)
    page.write(done, Path(folder))
    if history is not None:
        lines.append(Path(history), head, f"report of {fspath(base)}", page.figures(done))
    return done


def _given(model: Source) -> Job:
    name = fspath(model)
    if name in BY_NAME:
        raise RequestError(f"{name} is the name of a method: write ./{name} for the model.")
    return Job(name, lambda params, path: Made(model, None, False))
