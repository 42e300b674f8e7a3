"""Quantizing by qjax beside LLM Compressor and llama-quantize: accuracy and time, one run.

    qjax convert smollm2-135m base --format safetensors
    python benchmarks/quantize_vs_peers.py base --calibration valid.txt --text test.txt \\
        --peer-python ~/peers/bin/python --llama-tools ~/llama.cpp/build/bin \\
        --json benchmarks/results/quantize/MACHINE.json

Both sides get the same weights in float32, the same recipe and the same calibration tokens: the
first `--sequences` x `--length` of a text. Both results are then read by qjax, which measures their
perplexity and their KL divergence from the model on another text, with exact numerics. Times are
those of processes that quantize one after the other, from the model's folder to the result's, after
their imports; compiling counts.

Installs nothing: LLM Compressor must be in the environment of `--peer-python`, llama-imatrix and
llama-quantize in the folder `--llama-tools`. Where one of them is not given, qjax stands alone.
Rows of other methods that are already in the file of `--json` stay there.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from quantize_methods import METHODS, Method
from worker import Worker

import qjax
from qjax.errors import QjaxError
from qjax.evaluate.divergence import Divergence, Reference, divergence, reference


@dataclass(frozen=True)
class Side:
    """A method as one tool did it: seconds that it took, and how far its result lies off."""

    tool: str
    seconds: float
    perplexity: float
    kl_mean: float
    kl_error: float
    kl_99: float
    same_top: float


@dataclass(frozen=True)
class Row:
    method: Method
    ours: Side
    peer: Side | None


def calibration(model: qjax.Params, text: Path, sequences: int, length: int) -> np.ndarray:
    """int32 [sequences, length]: the first tokens of a text."""
    assert model.tokenizer
    ids = model.tokenizer.encode(text.read_text(encoding="utf-8"))
    if len(ids) < sequences * length:
        sys.exit(f"{text} has {len(ids)} tokens, less than {sequences} x {length}.")
    return np.array(ids[: sequences * length], np.int32).reshape(sequences, length)


class LlamaQuantize:
    """llama.cpp's tools, with the interface of a `Worker` that quantizes."""

    def __init__(self, tools: Path, model: Path, text: Path, shape: tuple[int, int], threads: int):
        self._tools, self._model, self._threads = tools, model, threads
        self._imatrix = model.with_suffix(".imatrix")
        chunks, length = shape
        start = time.perf_counter()
        self._run(
            *("llama-imatrix", "-m", model, "-f", text, "-o", self._imatrix, "-t", threads),
            *("-c", length, "-b", length, "--chunks", chunks, "-ngl", 0),
        )
        self.imatrix_seconds = time.perf_counter() - start

    def version(self) -> str:
        return self._run("llama-imatrix", "--version").strip().splitlines()[0]

    def quantize(self, kind: str, output: Path) -> float:
        """Seconds, those of the importance matrix included."""
        start = time.perf_counter()
        self._run(
            "llama-quantize", "--imatrix", self._imatrix, self._model, output, kind, self._threads
        )
        return time.perf_counter() - start + self.imatrix_seconds

    def _run(self, tool: str, *arguments: object) -> str:
        command = [str(self._tools / tool), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{tool} ended with {done.returncode}: {done.stderr[-500:]}")
        return done.stdout + done.stderr


def side(tool: str, seconds: float, found: Divergence) -> Side:
    return Side(
        tool,
        seconds,
        found.other.value,
        found.mean,
        found.error,
        found.quantiles[0.99],
        found.same_top,
    )


def table(rows: list[Row], base: float) -> Iterator[str]:
    yield f"Perplexity of the model itself: {base:.4f}. KL divergence from it in nats."
    yield ""
    yield (
        "| method | tool | perplexity | mean KL | ± | 99% | same top token | s | "
        "KL, ours / theirs |"
    )
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for row in rows:
        for one in (row.ours, *([row.peer] if row.peer else [])):
            ratio = ""
            if row.peer and one is row.ours:
                ratio = f"**{row.ours.kl_mean / row.peer.kl_mean:.3f}**"
            yield (
                f"| {row.method.name} | {one.tool} | {one.perplexity:.3f} | {one.kl_mean:.5f} | "
                f"{one.kl_error:.5f} | {one.kl_99:.4f} | {one.same_top:.2%} | {one.seconds:.1f} | "
                f"{ratio} |"
            )


class Comparison:
    """Quantizes by both sides into a folder, and measures what came of it."""

    def __init__(self, options: argparse.Namespace, work: Path):
        self._options, self._work = options, work
        model = qjax.load(options.model)
        self._tokens = self._work / "tokens.npy"
        shape = (options.sequences, options.length)
        np.save(self._tokens, calibration(model, options.calibration, *shape))
        self._base: Reference = reference(
            model, options.text.read_text(encoding="utf-8"), max_windows=options.windows
        )
        self.base_perplexity = float("nan")
        self.versions: dict[str, Any] = {}
        self._llama: LlamaQuantize | None = None
        if options.llama_tools:
            file = self._work / "base.gguf"
            qjax.save(model, file, format="gguf")
            self._llama = LlamaQuantize(
                options.llama_tools, file, options.calibration, shape, options.threads
            )
            self.versions["llama.cpp"] = self._llama.version()

    def row(self, method: Method) -> Row:
        name = method.name.replace(" ", "-").replace("+", "and")
        ending = ".gguf" if method.gguf else ""
        outputs = [self._work / f"{who}-{name}{ending}" for who in ("qjax", "peer")]
        request = {"recipe": method.recipe, "tokens": str(self._tokens)}
        with Worker(sys.executable, "oneshot_worker.py", self._options.model) as worker:
            self.versions["qjax"] = worker.ask("info")
            ours = self._measured(
                "qjax", outputs[0], worker.ask("quantize", **request, output=str(outputs[0]))
            )
        peer = None
        if method.gguf and self._llama:
            seconds = self._llama.quantize(method.gguf, outputs[1])
            peer = self._measured("llama-quantize", outputs[1], seconds)
        elif not method.gguf and self._options.peer_python:
            seconds = self._compressed(request, outputs[1])
            peer = self._measured("LLM Compressor", outputs[1], seconds)
        return Row(method, ours, peer)

    def _measured(self, tool: str, output: Path, seconds: float) -> Side:
        found = divergence(self._base, qjax.load(output))
        self.base_perplexity = found.base.value
        return side(tool, seconds, found)

    def _compressed(self, request: dict[str, str], output: Path) -> float:
        with Worker(
            self._options.peer_python,
            "llmcompressor_worker.py",
            self._options.model,
            str(self._options.threads),
        ) as worker:
            self.versions["LLM Compressor"] = worker.ask("info")
            return worker.ask(
                "quantize", **request, output=str(output), batch=self._options.peer_batch
            )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="quantizing by qjax beside other tools")
    parser.add_argument("model", help="a folder with dense weights")
    parser.add_argument("--calibration", type=Path, required=True, help="text, UTF-8")
    parser.add_argument("--text", type=Path, required=True, help="to measure on, UTF-8")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=20, help="of 512 tokens, to measure on")
    parser.add_argument("--peer-python", help="an interpreter that has LLM Compressor")
    parser.add_argument("--peer-batch", type=int, default=8, help="sequences of a batch of its")
    parser.add_argument("--llama-tools", type=Path, help="folder of llama.cpp's programs")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--only", action="append", default=[], help="methods whose name holds this text; repeatable"
    )
    parser.add_argument("--json", type=Path, help="also write all figures here, a table beside it")
    parser.add_argument("--note", default="", help="text to stand below the table")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    only = options.only or [""]
    wanted = [method for method in METHODS if any(text in method.name for text in only)]
    if not wanted:
        sys.exit(f"no method has such a name: {', '.join(method.name for method in METHODS)}")
    with tempfile.TemporaryDirectory() as work:
        comparison = Comparison(options, Path(work))
        rows = []
        for method in wanted:
            rows.append(comparison.row(method))
            lines = list(table(rows[-1:], comparison.base_perplexity))
            print("\n".join(lines[4 if len(rows) > 1 else 0 :]), flush=True)
            if options.json:  # each time: the next one may take an hour
                write(options, comparison, rows)


def write(options: argparse.Namespace, comparison: Comparison, rows: list[Row]) -> None:
    """All figures as JSON, and a table in Markdown beside it; with the rows of earlier runs.

    Raises:
      RuntimeError: these were taken with other settings, or of another model.
    """
    names = ("sequences", "length", "windows", "peer_batch", "threads")
    settings = {name: getattr(options, name) for name in names}
    versions, perplexity = comparison.versions, comparison.base_perplexity
    note = options.note
    found = {row.method.name: row for row in rows}
    if options.json.exists():
        before = json.loads(options.json.read_text())
        same = math.isclose(before["perplexity"], perplexity, rel_tol=1e-6)
        if before["settings"] != settings or not same:
            raise RuntimeError(f"{options.json} holds results of other settings or another model")
        versions = before["versions"] | versions
        note = note or before.get("note", "")
        found = {row["method"]["name"]: _row(row) for row in before["rows"]} | found
    order = {method.name: place for place, method in enumerate(METHODS)}
    rows = sorted(found.values(), key=lambda row: order.get(row.method.name, len(order)))
    report = {
        "settings": settings,
        "versions": versions,
        "perplexity": perplexity,
        "note": note,
        "rows": [asdict(row) for row in rows],
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=2) + "\n")
    text = "\n".join([*table(rows, perplexity), *(["", note] if note else [])])
    options.json.with_suffix(".md").write_text(text + "\n")


def _row(found: dict[str, Any]) -> Row:
    peer = found["peer"] and Side(**found["peer"])
    return Row(Method(**found["method"]), Side(**found["ours"]), peer)


if __name__ == "__main__":
    try:
        main()
    except (QjaxError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
