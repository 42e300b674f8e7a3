"""One line for each run of a benchmark, so that they can be compared over time.

A line of such a file (benchmarks/history.jsonl) is a JSON object:

    date, machine, processors, versions   where and with what it ran
    commit                                of the code, where it is a checkout of git; "+" behind it
                                          where files of the checkout had been changed
    what                                  which benchmark, of what
    figures                               the few numbers that are worth comparing
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GIT_SECONDS = 10


def append(
    file: Path, head: Mapping[str, Any], what: str, figures: Mapping[str, Any]
) -> dict[str, Any]:
    """Adds the line of a run to a file, which is made where it does not exist, and gives it back.

    Args:
      head: of `qjax.bench.device.description`.
      what: which benchmark, of what.
      figures: its key figures.
    """
    made = line(head, what, figures, commit())
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(made) + "\n")
    return made


def line(
    head: Mapping[str, Any], what: str, figures: Mapping[str, Any], commit: str | None
) -> dict[str, Any]:
    """The line of a run; see the head of this module."""
    return {
        "date": head["date"],
        "machine": head["device"],
        "processors": head["processors"],
        "versions": head["versions"],
        "commit": commit,
        "what": what,
        "figures": figures,
    }


def commit(root: Path = ROOT) -> str | None:
    """The commit of a checkout, with "+" where its files were changed; None where it is none."""
    if not (root / ".git").exists():
        return None
    try:
        found = [
            subprocess.run(
                ["git", "-C", str(root), *arguments],
                capture_output=True,
                text=True,
                timeout=GIT_SECONDS,
                check=True,
            ).stdout.strip()
            for arguments in (
                ("rev-parse", "--short=7", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no"),
            )
        ]
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or a checkout that it does not trust
    return found[0] + ("+" if found[1] else "")


def of_kernels(content: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """What and figures of a file of `python -m qjax.bench kernels`.

    Of products with one row, how much of the bandwidth each kind of weight gets, by its best
    implementation, median of the shapes; tokens per second of whole decode steps.
    """
    shares: dict[str, dict[tuple[int, int], float]] = defaultdict(dict)
    decode: dict[str, float] = {}
    for row in content["rows"]:
        if "microseconds" not in row:
            continue
        if row["op"] == "matmul" and row["rows"] == 1:
            shape, best = (row["n"], row["k"]), shares[row["kind"]]
            best[shape] = max(best.get(shape, 0.0), row["bandwidth_share"])
        elif row["op"] == "decode":
            name = f"{row['kind']}, {row['rows']} at a time"
            decode[name] = max(decode.get(name, 0.0), row["tokens_per_second"])
    limits = content["limits"]
    figures = {
        "cases": sum("microseconds" in row for row in content["rows"]),
        "bandwidth_gb_s": short(limits["bandwidth"] / 1e9),
        "peak_t_s": {name: short(rate / 1e12) for name, rate in limits["peaks"].items()},
        "matmul_bandwidth_share": {
            kind: short(statistics.median(best.values())) for kind, best in shares.items()
        },
    }
    if decode:
        figures["decode_tokens_per_second"] = decode
    details = [name for name in ("quick",) if content["quick"]] + [content.get("note", "")]
    return ", ".join(["kernels", *filter(None, details)]), figures


def short(value: float) -> float:
    """With four digits."""
    return float(f"{value:.4g}")
