"""The table and the plot of results of `python -m qjax.bench kernels --json FILE`.

    python benchmarks/plot_kernels.py benchmarks/results/FILE.json

Writes FILE.md and FILE.png beside it. One panel a shape of weights: bytes/s by rows, a line for
each kind of weight, beside the bandwidth measured in the same run; the last panel has whole decode
steps relative to bfloat16.
"""

import argparse
from pathlib import Path
from typing import Any

from qjax.bench import report, result


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    path = parser.parse_args(args).file
    content = result.read(path)
    path.with_suffix(".md").write_text(report.table(content) + "\n")
    plot(content, path.with_suffix(".png"))


def plot(content: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in content["rows"] if "microseconds" in row]
    products = [row for row in timed if row["op"] in ("matmul", "bfloat16")]
    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in products))
    decoding = [row for row in timed if row["op"] == "decode" and "bfloat16_ratio" in row]
    panels = len(shapes) + bool(decoding)
    if not panels:
        raise SystemExit("no products and no decode steps in these results")
    figure, axes = pyplot.subplots(1, panels, figsize=(5.5 * panels, 4.5), squeeze=False)
    for axis, (n, k) in zip(axes[0], shapes, strict=False):
        here = [row for row in products if (row["n"], row["k"]) == (n, k)]
        lines(axis, here, "rows", "gigabytes_per_second")
        axis.axhline(content["limits"]["bandwidth"] / 1e9, color="black", linestyle="--")
        axis.set(title=f"{n} x {k}", xlabel="rows", ylabel="GB/s", xscale="log", yscale="log")
    if decoding:
        axis = axes[0][-1]
        lines(axis, decoding, "rows", "bfloat16_ratio")
        axis.axhline(1, color="black", linestyle="--")
        axis.set(title="decode steps", xlabel="sequences", ylabel="x bfloat16", xscale="log")
    for axis in axes[0]:
        many = len(axis.get_lines()) > 12
        axis.legend(fontsize=4 if many else 7, ncols=2 if many else 1, loc="lower left")
        axis.grid(alpha=0.3)
    figure.suptitle(f"{content['device']}, {content['date']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def lines(axis: Any, rows: list[dict[str, Any]], x: str, y: str) -> None:
    """One line a kind and implementation that was asked for."""
    for label in dict.fromkeys((row["kind"], row["asked"]) for row in rows):
        points = sorted((r[x], r[y]) for r in rows if (r["kind"], r["asked"]) == label)
        axis.plot(*zip(*points, strict=True), marker="o", label=" ".join(filter(None, label)))


if __name__ == "__main__":
    main()
