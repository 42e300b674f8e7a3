"""The page of a report: tables in Markdown, with plots beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qjax.bench.history import short
from qjax.report import plots, words
from qjax.report.claims import CLAIMS, SOURCE
from qjax.report.methods import BY_NAME
from qjax.report.rows import ModelRow, Report

Cell = Callable[[ModelRow], str]
SUFFIX = {"exact": "", "fast": ", fast"}


def write(report: Report, folder: Path) -> None:
    """Writes report.md, divergence.png, speed.png and, of several batches, batches.png."""
    plots.divergence(report, folder / "divergence.png")
    plots.speed(report, folder / "speed.png")
    if len(report.batches) > 1:
        plots.batches(report, folder / "batches.png")
    (folder / "report.md").write_text(_page(report), "utf-8")


def table(report: Report) -> str:
    """What each model takes, how fast it is and what it loses, as a table in Markdown."""
    base, last = report.base, report.batches[-1]
    columns: list[tuple[str, Cell]] = [
        ("model", lambda row: row.name),
        ("weights", lambda row: " ".join(filter(None, (row.method, row.qtype)))),
        ("inputs", lambda row: row.activation),
        ("bits per weight", lambda row: f"{row.bits_per_weight:.2f}"),
        ("memory, MB", lambda row: f"{row.nbytes / 1e6:.1f}"),
        ("of base", lambda row: f"{row.nbytes / base.nbytes:.0%}"),
        ("stored, MB", lambda row: f"{row.stored / 1e6:.1f}"),
        ("quantizing, s", lambda row: _of(row.quantize_seconds, "{:.1f}")),
        ("load, s", lambda row: f"{row.load_seconds:.2f}"),
        ("prompt, tokens/s", lambda row: f"{row.prefill.tokens_per_second:.0f}"),
    ]
    for batch in dict.fromkeys((report.batches[0], last)):
        name = "generation, tokens/s" if batch == 1 else f"{batch} sequences, tokens/s"
        columns.append((name, lambda row, batch=batch: f"{row.speed(batch):.0f}"))
    for numerics in dict.fromkeys(("exact", *report.settings["numerics"])):
        columns += _accuracy(numerics)
    return _table(columns, report.all_rows)


def beside_claims(report: Report) -> str:
    """The table of vLLM's page, with what was measured beside its claims."""
    base, batches = report.base, report.batches
    read, rows = words.accuracy_of(report), {row.name: row for row in report.rows}
    said = {claim.method: claim for claim in CLAIMS}
    columns: list[tuple[str, Cell]] = [
        ("method", lambda row: said[row.name].label if row.name in said else row.name),
        ("page: memory", lambda row: said[row.name].memory if row.name in said else ""),
        ("speed", lambda row: said[row.name].speed if row.name in said else ""),
        ("loss", lambda row: said[row.name].loss if row.name in said else ""),
        ("here: memory", lambda row: f"{row.nbytes / base.nbytes:.0%}"),
        *(
            (
                "speed, 1 sequence" if batch == 1 else f"{batch} sequences",
                lambda row, batch=batch: f"{row.speed(batch) / base.speed(batch):.2f}x",
            )
            for batch in dict.fromkeys((batches[0], batches[len(batches) // 2], batches[-1]))
        ),
        ("prompt", lambda row: f"{_prompt(row) / _prompt(base):.2f}x"),
        ("perplexity", lambda row: f"{words.rise(report, row, read):+.1%}"),
        *(
            (
                f"KL divergence{SUFFIX[numerics]}",
                lambda row, numerics=numerics: f"{row.divergence[numerics].mean:.4f}",
            )
            for numerics in report.settings["numerics"]
        ),
        ("same top token", lambda row: f"{row.divergence[read].same_top:.1%}"),
    ]
    names = [*said, *(name for name in BY_NAME if name not in said)]
    return _table(columns, [rows[name] for name in names if name in rows])


def sweep(report: Report) -> str:
    """Decoding by batch: tokens per second, times the base's, and share of the bandwidth."""

    def cell(row: ModelRow, batch: int) -> str:
        share = next(found.bandwidth_share for found in row.decode if found.batch == batch)
        times = (
            "" if row is report.base else f", {row.speed(batch) / report.base.speed(batch):.2f}x"
        )
        return f"{row.speed(batch):.0f}{times} ({share:.0%})"

    def slower(row: ModelRow) -> str:
        at = words.behind(report, row)
        return "" if row is report.base else "never" if at is None else f"from {at}"

    columns: list[tuple[str, Cell]] = [
        ("model", lambda row: row.name),
        *((str(batch), lambda row, batch=batch: cell(row, batch)) for batch in report.batches),
        ("behind the base", slower),
    ]
    return _table(columns, report.all_rows, left=1)


def figures(report: Report) -> dict[str, Any]:
    """The key figures, for a line of the history."""
    return {
        row.name: {
            "bits_per_weight": short(row.bits_per_weight),
            "tokens_per_second": {
                found.batch: short(found.tokens_per_second) for found in row.decode
            },
            "perplexity": {name: short(found.value) for name, found in row.perplexity.items()},
            "kl": {name: short(found.mean) for name, found in row.divergence.items()},
        }
        for row in report.all_rows
    }


def _accuracy(numerics: str) -> list[tuple[str, Cell]]:
    """Columns of what was read in some numerics."""

    def found(row: ModelRow, form: Callable[[Any], str]) -> str:
        return form(row.divergence[numerics]) if numerics in row.divergence else ""

    more = SUFFIX[numerics]
    return [
        (f"perplexity{more}", lambda row: str(row.perplexity.get(numerics, ""))),
        (f"mean KL divergence{more}", lambda row: found(row, lambda one: f"{one.mean:.5f}")),
        (f"99%{more}", lambda row: found(row, lambda one: f"{one.quantiles[0.99]:.4f}")),
        (f"same top token{more}", lambda row: found(row, lambda one: f"{one.same_top:.1%}")),
    ]


def _prompt(row: ModelRow) -> float:
    return row.prefill.tokens_per_second


def _of(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _table(columns: Sequence[tuple[str, Cell]], rows: Sequence[ModelRow], left: int = 3) -> str:
    lines = [
        "| " + " | ".join(heading for heading, _ in columns) + " |",
        "| --- " * left + "| ---: " * (len(columns) - left) + "|",
    ]
    for row in rows:
        cells = (cell(row) for _, cell in columns)
        lines.append(" ".join(f"| {cell}" if cell else "|" for cell in cells) + " |")
    return "\n".join(lines)


def _page(report: Report) -> str:
    base, head, settings = report.base, report.head, report.settings
    read = base.perplexity["exact"]
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    commit = f", commit {head['commit']}" if head["commit"] else ""
    found = [row.bandwidth for each in report.all_rows for row in each.decode]
    prompt = base.prefill.test.removeprefix("pp")
    generated = base.decode[0].test.removeprefix("tg")
    parts = [
        f"# {settings['base']} and quantizations of it",
        words.verdict(report),
        table(report),
        f"""- Perplexity, and divergence from the base in nats: of {settings["text"]}, {read.tokens}
  tokens in {read.windows} windows of {read.window}, cut and counted as `llama-perplexity` does.
  What models are held against is the base in exact numerics. In fast ones, which speed is measured
  with, inputs are rounded as well, on a CPU to 8-bit integers.
- Bits and memory: of all weights as they are held, embeddings included.
- Speed: in fast numerics, {prompt} tokens of a prompt of one sequence, and {generated} tokens that
  are generated for each, of all sequences together. Memory gave {min(found) / 1e9:.1f} to
  {max(found) / 1e9:.1f} GB/s while this was measured: so much may speeds differ by chance.""",
    ]
    if settings["methods"]:
        parts += [_claims_section(report), _methods_section(report)]
    if len(report.batches) > 1:
        parts += [
            "## Decoding by batch",
            "Tokens per second of all sequences together, times the base's, and in brackets the "
            "bytes of weights and cache that are read, as a share of the bandwidth of memory.",
            sweep(report),
            words.crossing(report),
            "![Speed of decoding by batch](batches.png)",
        ]
    parts += [
        "## Plots",
        "![KL divergence by bits per weight](divergence.png)",
        "![Perplexity by speed of generation](speed.png)",
        f"{head['device']}, {head['processors']} processors, {head['date']}{commit}; {versions}.",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _claims_section(report: Report) -> str:
    return f"""## Beside vLLM's page

What [vLLM's documentation on quantization]({SOURCE}) says of memory, speed and loss of accuracy
against FP16, on GPUs and for models that it does not name; and what was measured here against
{report.base.name}. The page's loss is one of accuracy in tasks; here it is the rise of perplexity.

{beside_claims(report)}"""


def _methods_section(report: Report) -> str:
    samples = report.settings["samples"]
    given = Path(samples["calibration"])
    source = given.name if given.suffix else samples["calibration"]  # a file, or of the hub
    source = "text that the model wrote" if source == "self" else source
    length = f" of {samples['seq_len']} tokens" if samples["seq_len"] else ""
    made = [BY_NAME[row.name] for row in report.rows if row.name in BY_NAME]
    return "\n".join(
        [
            "## Methods",
            "",
            *(f"- {method.name}: {method.about}." for method in made),
            "",
            f"Samples, where a method takes some: {samples['num_samples']} sequences{length}, of "
            f"{source}.",
        ]
    )
