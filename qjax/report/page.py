"""The page of a report: a table in Markdown, its numbers as JSON, and plots beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qjax.evaluate import Divergence
from qjax.report import plots

if TYPE_CHECKING:
    from qjax.report.measure import ModelRow, Report


def _of_divergence(row: ModelRow, cell: Callable[[Divergence], str]) -> str:
    """Empty for the base, which is not compared with itself."""
    return "" if row.divergence is None else cell(row.divergence)


# Heading, and what stands under it.
_COLUMNS: tuple[tuple[str, Callable[[ModelRow], str]], ...] = (
    ("model", lambda row: row.name),
    ("weights", lambda row: " ".join(filter(None, (row.method, row.qtype)))),
    ("inputs", lambda row: row.activation),
    ("bits per weight", lambda row: f"{row.bits_per_weight:.2f}"),
    ("memory, MB", lambda row: f"{row.nbytes / 1e6:.1f}"),
    ("stored, MB", lambda row: f"{row.stored / 1e6:.1f}"),
    ("load, s", lambda row: f"{row.load_seconds:.2f}"),
    ("prompt, tokens/s", lambda row: f"{row.prefill.tokens_per_second:.0f}"),
    ("generation, tokens/s", lambda row: f"{row.decode.tokens_per_second:.0f}"),
    ("perplexity", lambda row: str(row.perplexity)),
    ("mean KL divergence", lambda row: _of_divergence(row, lambda found: f"{found.mean:.5f}")),
    ("99%", lambda row: _of_divergence(row, lambda found: f"{found.quantiles[0.99]:.4f}")),
    ("same top token", lambda row: _of_divergence(row, lambda found: f"{found.same_top:.1%}")),
    ("error of logits", lambda row: _of_divergence(row, lambda found: f"{found.logit_error:.2%}")),
)


def write(report: Report, folder: Path) -> None:
    """Writes report.md, report.json, divergence.png and speed.png into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        **report.head,
        "text": report.text,
        "numerics": report.numerics,
        "rows": [{**asdict(row), "bits_per_weight": row.bits_per_weight} for row in report.rows],
    }
    (folder / "report.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    plots.divergence(report.rows, folder / "divergence.png")
    plots.speed(report.rows, folder / "speed.png")
    (folder / "report.md").write_text(_page(report), "utf-8")


def table(report: Report) -> str:
    """The models as a table in Markdown."""
    lines = [
        "| " + " | ".join(heading for heading, _ in _COLUMNS) + " |",
        "| --- | --- | --- " + "| ---: " * (len(_COLUMNS) - 3) + "|",
    ]
    for row in report.rows:
        cells = (cell(row) for _, cell in _COLUMNS)
        lines.append(" ".join(f"| {cell}" if cell else "|" for cell in cells) + " |")
    return "\n".join(lines)


def _page(report: Report) -> str:
    base, head = report.rows[0], report.head
    read = base.perplexity
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    return f"""# {base.name} and quantizations of it

{table(report)}

- Perplexity, and divergence from the base in nats: of {report.text}, {read.tokens} tokens in
  {read.windows} windows of {read.window}, cut and counted as `llama-perplexity` does. The base is
  read in exact numerics, the others in {report.numerics} ones.
- Bits and memory: of all weights as they are held, embeddings included.
- Speed: of one sequence in fast numerics, {base.prefill.test.removeprefix("pp")} tokens of a prompt
  and {base.decode.test.removeprefix("tg")} that are generated.

![KL divergence by bits per weight](divergence.png)

![Perplexity by speed of generation](speed.png)

{head["device"]}, {head["processors"]} processors, {head["date"]}; {versions}.
"""
