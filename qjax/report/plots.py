"""The plots of a report."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qjax.errors import UnsupportedError
from qjax.report import words
from qjax.report.rows import ModelRow, Report

MANY = 10  # lines have as many colours


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
    points = [(row.bits_per_weight, row.divergence[read].mean, row.name) for row in report.rows]
    label = f"mean KL divergence from the base, nats ({read} numerics)"
    _scatter(points, file, "bits per weight", label, log=True)


def speed(report: Report, file: Path) -> None:
    """Perplexity by speed of generation, in fast numerics where the text was read in them."""
    read, first = report.settings["numerics"][-1], report.batches[0]
    points = [
        (row.speed(first), row.perplexity[read].value, row.name)
        for row in report.all_rows
        if read in row.perplexity
    ]
    sequences = "one sequence" if first == 1 else f"{first} sequences"
    _scatter(points, file, f"tokens per second of {sequences}", f"perplexity ({read} numerics)")


def batches(report: Report, file: Path) -> None:
    """Speed of decoding by batch, a line for each model, and where 4-bit weights stop winning."""
    figure, axis = _figure((8.5, 5))
    for place, row in enumerate(report.all_rows):
        axis.plot(
            report.batches,
            [row.speed(batch) for batch in report.batches],
            _style(row, report),
            color="black" if row is report.base else f"C{place % MANY}",
            label=Path(row.name).name,
            marker="o",
            markersize=3,
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(report.batches, [str(batch) for batch in report.batches])
    axis.minorticks_off()
    at = words.crossover(report)
    if at is not None:
        axis.axvline(at, color="gray", linestyle=":")
        axis.set_title(f"4-bit weights stop winning at a batch of {at}", fontsize=9)
    axis.set(xlabel="sequences at a time", ylabel="tokens per second, all together")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.canvas.print_png(file)


def _style(row: ModelRow, report: Report) -> str:
    """Whole lines for 4 bits, broken ones for more, dotted for the base."""
    return ":" if row is report.base else "-" if row.four_bit else "--"


def _figure(size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _scatter(
    points: Sequence[tuple[float, float, str]], file: Path, x: str, y: str, *, log: bool = False
) -> None:
    figure, axis = _figure((7, 4.5))
    ends = [right for right, _, _ in points]
    for right, up, name in points:
        axis.plot([right], [up], "o")
        # Towards the middle, where there is room for it.
        side = -1 if right > (min(ends) + max(ends)) / 2 else 1
        axis.annotate(
            Path(name).name,
            (right, up),
            textcoords="offset points",
            xytext=(6 * side, 4),
            ha="right" if side < 0 else "left",
            fontsize=8,
        )
    axis.set(xlabel=x, ylabel=y)
    if log and all(up > 0 for _, up, _ in points):
        axis.set_yscale("log")
    axis.margins(0.15)
    axis.grid(alpha=0.3)
    figure.canvas.print_png(file)
