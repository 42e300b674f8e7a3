"""The table and the plot of a file of results, and the programs beside the package."""

import importlib.util
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from qjax.bench import grid, result

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROW = {"n": 4096, "k": 14336, "asked": "", "implementation": "triton", "refused": {}}
CONTENT = {
    "format": 1,
    "device": "Imaginary Device 9000",
    "processors": 16,
    "date": "2026-01-01",
    "versions": {"jax": "0.10.2"},
    "quick": False,
    "limits": {"bandwidth": 3e12, "peaks": {"bfloat16": 9e14, "int8": 1.8e15}},
    "peers": {"rows": [{"kind": "int4", "n": 4096, "k": 14336, "rows": 1, "microseconds": 24.0}]},
    "rows": [
        ROW
        | {"op": "bfloat16", "kind": "BF16", "rows": 1, "microseconds": 40.0}
        | {"gigabytes_per_second": 2900.0, "bandwidth_share": 0.97},
        ROW
        | {"op": "matmul", "kind": "W4A16 g128", "rows": 1, "microseconds": 12.0}
        | {"gigabytes_per_second": 2500.0, "teraflops": 9.8, "bandwidth_share": 0.83}
        | {"peak_share": 0.0109, "bfloat16_ratio": 3.33},
        ROW | {"op": "matmul", "kind": "NF4", "rows": 1, "failed": "XlaRuntimeError: no"},
        {"op": "decode", "kind": "W4A16 g128", "n": 32, "k": 2048, "rows": 1, "asked": ""}
        | {"implementation": "", "microseconds": 2500.0, "bandwidth_share": 0.6}
        | {"gigabytes_per_second": 1800.0, "bfloat16_ratio": 2.7},
    ],
}


@pytest.fixture
def plot_kernels():
    spec = importlib.util.spec_from_file_location("plot_kernels", BENCHMARKS / "plot_kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_and_plot(plot_kernels, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(CONTENT))
    plot_kernels.main([str(path)])
    lines = (tmp_path / "r.md").read_text().splitlines()
    assert lines[0] == "Imaginary Device 9000, 16 processors, 2026-01-01, jax 0.10.2"
    assert "3000 GB/s, 900 T/s bfloat16, 1.8e+03 T/s int8" in lines[2]
    figures = "triton | 12 | 2500 | 9.8 | 83% | 1% | 3.33 | 2.00 |"
    assert f"| matmul | W4A16 g128 | 4096x14336 | 1 | {figures}" in lines
    assert "| matmul | NF4 | 4096x14336 | 1 | failed | | | | | | | |" in lines
    assert {line.count("|") for line in lines[4:]} == {13}
    png = (tmp_path / "r.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    assert width > 2 * height > 400  # two panels


def test_nothing_to_plot_is_said(plot_kernels, tmp_path):
    with pytest.raises(SystemExit, match="no products"):
        plot_kernels.plot(CONTENT | {"rows": []}, tmp_path / "r.png")


RESULTS = sorted((BENCHMARKS / "results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_stored_results_can_be_read(path):
    content = result.read(path)
    assert content["device"]
    assert {row["op"] for row in content["rows"]} <= {*grid.ALL_OPS, "bfloat16"}
    assert not [row for row in content["rows"] if "failed" in row]


def test_peer_says_what_it_lacks():
    # Without site packages there is no torch, whatever is installed.
    command = [sys.executable, "-S", BENCHMARKS / "torch_kernels.py", "--shape=64x64", "--rows=1"]
    done = subprocess.run(command, capture_output=True, text=True, env={}, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "torch is not installed here\n"
    assert not done.stdout
