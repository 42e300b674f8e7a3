"""A line for each run: what stands in it, and whether the tree's file has what its sources say."""

import json
import subprocess
from pathlib import Path

from qjax.bench import history

ROOT = Path(__file__).resolve().parents[2]
HEAD = {"date": "2026-11-26", "device": "Abacus", "processors": 2, "versions": {"jax": "0.1"}}


def test_lines_are_added(tmp_path):
    file = tmp_path / "new" / "history.jsonl"
    for number in (1, 2):
        history.append(file, {**HEAD, "bandwidth": 1.0}, "counting", {"beads": number})
    first, second = map(json.loads, file.read_text().splitlines())
    assert (first["figures"], second["figures"]) == ({"beads": 1}, {"beads": 2})
    assert {key: first[key] for key in ("date", "machine", "processors", "versions", "what")} == {
        "date": "2026-11-26",
        "machine": "Abacus",
        "processors": 2,
        "versions": {"jax": "0.1"},
        "what": "counting",
    }


def test_commit(tmp_path):
    assert history.commit(tmp_path) is None
    me = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for arguments in (("init", "-q"), (*me, "commit", "-q", "--allow-empty", "-m", "first")):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)
    done = subprocess.run(
        ["git", "log", "--format=%H"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    clean = history.commit(tmp_path)
    assert clean == done.stdout[:7]
    (tmp_path / "file").write_text("changed")
    assert history.commit(tmp_path) == clean  # a file that git does not know
    subprocess.run(["git", "add", "file"], cwd=tmp_path, check=True)
    assert history.commit(tmp_path) == f"{clean}+"


def test_figures_of_kernels():
    def row(op, kind, n, rows, share, **more):
        return {
            "op": op,
            "kind": kind,
            "n": n,
            "k": 64,
            "rows": rows,
            "microseconds": 2.0,
            "bandwidth_share": share,
            **more,
        }

    content = {
        "quick": False,
        "limits": {"bandwidth": 5e10, "peaks": {"int8": 2.5e12}},
        "rows": [
            row("matmul", "Q8_0", 32, 1, 0.5),
            row("matmul", "Q8_0", 32, 1, 0.7),  # of another implementation
            row("matmul", "Q8_0", 64, 1, 0.9),
            row("matmul", "Q8_0", 64, 8, 0.1),
            {"op": "matmul", "kind": "Q8_0", "n": 1, "k": 64, "rows": 1, "failed": "no"},
            row("decode", "BF16", 4, 2, 0.6, tokens_per_second=100.0),
        ],
    }
    assert history.of_kernels(content) == (
        "kernels",
        {
            "cases": 5,
            "bandwidth_gb_s": 50.0,
            "peak_t_s": {"int8": 2.5},
            "matmul_bandwidth_share": {"Q8_0": 0.8},
            "decode_tokens_per_second": {"BF16, 2 at a time": 100.0},
        },
    )


def test_the_file_of_the_tree():
    """Every file of results of kernels has its line."""
    lines = [
        json.loads(line) for line in (ROOT / "benchmarks/history.jsonl").read_text().splitlines()
    ]
    keys = {"date", "machine", "processors", "versions", "commit", "what", "figures"}
    assert all(set(line) == keys for line in lines)
    assert [line["date"] for line in lines] == sorted(line["date"] for line in lines)
    for file in (ROOT / "benchmarks/results").glob("*.json"):
        content = json.loads(file.read_text())
        what, figures = history.of_kernels(content)
        (line,) = (each for each in lines if each["figures"] == json.loads(json.dumps(figures)))
        assert (line["what"], line["machine"]) == (what, content["device"])
