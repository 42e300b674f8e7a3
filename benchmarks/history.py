"""Lines for history.jsonl of files of results that were written before it was kept.

    python benchmarks/history.py benchmarks/results/*.json benchmarks/results/quantize/*.json

prints them; runs with --history append theirs by themselves. The files of `python -m qjax.bench
kernels` say when and where they were made; their commit is the one that brought them. Those of
`quantize_vs_peers.py` do not: their commit and date are of the last change, their machine is the
name of the file.
"""

import argparse
import json
import re
import subprocess
from pathlib import Path
from typing import Any

from qjax.bench import history


def line(file: Path) -> dict[str, Any]:
    """The line of one file."""
    content = json.loads(file.read_text("utf-8"))
    kernels = "limits" in content
    asked = ["git", "log", "--format=%h %as", "--abbrev=7", "--", file.name]
    done = subprocess.run(asked, cwd=file.parent, capture_output=True, text=True, check=True)
    changes = done.stdout.splitlines()
    commit, date = changes[-1 if kernels else 0].split()
    if kernels:
        return history.line(content, *history.of_kernels(content), commit)
    named = re.fullmatch(r"(.+)-(\d+)-cores", file.stem)
    if named is None:
        raise SystemExit(f"{file}: its name does not tell the machine, as in amd-epyc-2-cores")
    machine, processors = named.groups()
    versions = {"qjax": content["versions"]["qjax"]["qjax"]}
    versions["jax"] = content["versions"]["qjax"]["jax"]
    head = {
        "date": date,
        "device": machine,
        "processors": int(processors),
        "versions": versions,
    }
    settings = content["settings"]
    what = "quantize_vs_peers, {sequences} sequences of {length}, {windows} windows"
    return history.line(head, what.format(**settings), of_quantizing(content), commit)


def of_quantizing(content: dict[str, Any]) -> dict[str, Any]:
    """Figures of a file of `quantize_vs_peers.py`: its perplexities and divergences."""
    tools = {}
    for row in content["rows"]:
        for found in (row["ours"], row.get("peer")):
            if found:
                tools.setdefault(found["tool"], {})[row["method"]["name"]] = {
                    "perplexity": history.short(found["perplexity"]),
                    "kl": history.short(found["kl_mean"]),
                }
    return {"base_perplexity": history.short(content["perplexity"]), **tools}


def main() -> None:
    parser = argparse.ArgumentParser(description="lines for history.jsonl of files of results")
    parser.add_argument("files", nargs="+", type=Path)
    for found in sorted(map(line, parser.parse_args().files), key=lambda found: found["date"]):
        print(json.dumps(found))


if __name__ == "__main__":
    main()
