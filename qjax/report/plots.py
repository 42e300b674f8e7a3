"""The plots of a report."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qjax.errors import UnsupportedError
from qjax.report import words
from qjax.report.rows import ModelRow, Report

COLOURS = 20  # that tab20 has


def check() -> None:
    """Raises UnsupportedError where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise UnsupportedError(
            "matplotlib, which draws the plots of a report, is not installed: install it with "
            "pip install 'qjax[eval]'"
        )


def divergence(report: Report, file: Path) -> None:
    """Mean KL divergence from the base by bits per weight, of all rows but the base's."""
    read = words.accuracy_of(report)
    points = {row.name: (row.bits_per_weight, row.divergence[read].mean) for row in report.rows}
    label = f"mean KL divergence from the base, nats ({read} numerics)"
    _scatter(report, points, file, "bits per weight", label, log=True)


def speed(report: Report, file: Path) -> None:
    """Perplexity by speed of generation, in fast numerics where the text was read in them."""
    read, first = report.settings["numerics"][-1], report.batches[0]
    points = {row.name: (row.speed(first), row.perplexity[read].value) for row in report.all_rows}
    sequences = "one sequence" if first == 1 else f"{first} sequences"
    _scatter(
        report, points, file, f"tokens per second of {sequences}", f"perplexity ({read} numerics)"
    )


def batches(report: Report, file: Path) -> None:
    """Speed of decoding by batch, a line for each model, and where 4-bit weights stop winning."""
    figure, axis = _figure((8.5, 5))
    for row in report.all_rows:
        speeds = [row.speed(batch) for batch in report.batches]
        # Whole lines for 4 bits, broken ones for more, dotted for the base.
        style = ":" if row is report.base else "-" if row.four_bit else "--"
        axis.plot(report.batches, speeds, style, markersize=4, **_look(row, report))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(report.batches, [str(batch) for batch in report.batches])
    axis.minorticks_off()
    at = words.crossover(report)
    if at is not None:
        axis.axvline(at, color="gray", linestyle=":")
        axis.set_title(f"4-bit weights stop winning at a batch of {at}", fontsize=9)
    axis.set(xlabel="sequences at a time", ylabel="tokens per second, all together")
    _finish(figure, axis, file)


def _scatter(
    report: Report,
    points: Mapping[str, tuple[float, float]],
    file: Path,
    x: str,
    y: str,
    *,
    log: bool = False,
) -> None:
    figure, axis = _figure((8, 4.5))
    for row in report.all_rows:
        if row.name in points:
            axis.plot(*points[row.name], linestyle="", **_look(row, report))
    axis.set(xlabel=x, ylabel=y)
    if log and all(up > 0 for _, up in points.values()):
        axis.set_yscale("log")
    axis.margins(0.1)
    _finish(figure, axis, file)


def _look(row: ModelRow, report: Report) -> dict[str, Any]:
    """A model has the same colour in all plots: circles for 4 bits, squares for more."""
    from matplotlib import colormaps

    place = report.rows.index(row) if row is not report.base else None
    return {
        "color": "black" if place is None else colormaps["tab20"](place % COLOURS),
        "marker": "o" if row.four_bit else "s",
        "label": Path(row.name).name,
    }


def _figure(size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _finish(figure: Any, axis: Any, file: Path) -> None:
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.canvas.print_png(file)
