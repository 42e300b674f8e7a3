"""Quantizing by qjax beside LLM Compressor and llama-quantize: accuracy and time, one run.

    qjax convert smollm2-135m base --format safetensors
    python benchmarks/quantize_vs_peers.py base --calibration valid.txt --text test.txt \\
        --peer-python ~/peers/bin/python --llama-tools ~/llama.cpp/build/bin \\
        --json benchmarks/results/quantize-MACHINE.json

Both sides get the same weights in float32, the same recipe and the same calibration tokens: the
first `--sequences` x `--length` of a text. Both results are then read by qjax, which measures their
perplexity and their KL divergence from the model on another text, with exact numerics. Times are
those of processes that quantize one after the other, from the model's folder to the result's, after
their imports; compiling counts.

Installs nothing: LLM Compressor must be in the environment of `--peer-python`, llama-imatrix and
llama-quantize in the folder `--llama-tools`. Where one of them is not given, its methods are left
out.
"""

import argparse
import json
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
    peer: Side


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
        for one in (row.ours, row.peer):
            ratio = f"**{row.ours.kl_mean / row.peer.kl_mean:.3f}**" if one is row.ours else ""
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
        outputs = {}
        for who in ("qjax", "peer"):
            name = f"{who} {method.name}".replace(" ", "-").replace("+", "and")
            outputs[who] = self._work / (name + (".gguf" if method.gguf else ""))
        request = {"recipe": method.recipe, "tokens": str(self._tokens)}
        with Worker(sys.executable, "oneshot_worker.py", self._options.model) as worker:
            self.versions["qjax"] = worker.ask("info")
            ours = worker.ask("quantize", **request, output=str(outputs["qjax"]))
        if method.gguf:
            assert self._llama
            tool, theirs = "llama-quantize", self._llama.quantize(method.gguf, outputs["peer"])
        else:
            tool, theirs = "LLM Compressor", self._compressed(request, outputs["peer"])
        found = [divergence(self._base, qjax.load(outputs[who])) for who in ("qjax", "peer")]
        self.base_perplexity = found[0].base.value
        return Row(method, side("qjax", ours, found[0]), side(tool, theirs, found[1]))

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
    parser.add_argument("--only", default="", help="methods whose name holds this text")
    parser.add_argument("--json", type=Path, help="also write all figures here, a table beside it")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    wanted = [
        method
        for method in METHODS
        if options.only in method.name
        and (options.llama_tools if method.gguf else options.peer_python)
    ]
    if not wanted:
        sys.exit("no method is left: --peer-python or --llama-tools is needed, see --help.")
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
    """All figures as JSON, and a table in Markdown beside it."""
    settings = ("sequences", "length", "windows", "peer_batch", "threads")
    report = {
        "settings": {name: getattr(options, name) for name in settings},
        "versions": comparison.versions,
        "perplexity": comparison.base_perplexity,
        "rows": [asdict(row) for row in rows],
    }
    options.json.write_text(json.dumps(report, indent=2) + "\n")
    text = "\n".join(table(rows, comparison.base_perplexity))
    options.json.with_suffix(".md").write_text(text + "\n")


if __name__ == "__main__":
    try:
        main()
    except (QjaxError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
