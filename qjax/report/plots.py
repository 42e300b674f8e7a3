"""The plots of a report."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qjax.errors import UnsupportedError

if TYPE_CHECKING:
    from qjax.report.measure import ModelRow


def check() -> None:
    """Raises UnsupportedError where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise UnsupportedError(
            "matplotlib, which draws the plots of a report, is not installed: install it with "
            "pip install 'qjax[eval]'"
        )


def divergence(rows: Sequence[ModelRow], file: Path) -> None:
    """Mean KL divergence from the base by bits per weight, of all rows but the base's."""
    points = [
        (row.bits_per_weight, row.divergence.mean, row.name) for row in rows if row.divergence
    ]
    _scatter(points, file, "bits per weight", "mean KL divergence from the base, nats", log=True)


def speed(rows: Sequence[ModelRow], file: Path) -> None:
    """Perplexity by speed of generation."""
    points = [(row.decode.tokens_per_second, row.perplexity.value, row.name) for row in rows]
    _scatter(points, file, "generation, tokens per second", "perplexity")


def _scatter(
    points: Sequence[tuple[float, float, str]], file: Path, x: str, y: str, *, log: bool = False
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axis: Any = figure.add_subplot()
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
    canvas.print_png(file)
