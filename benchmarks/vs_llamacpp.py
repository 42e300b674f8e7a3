"""qjax beside llama.cpp: the same file, the same threads, measured in turns.

    python benchmarks/vs_llamacpp.py smollm2-135m --peer-python ~/peers/bin/python

Installs nothing: llama-cpp-python must be in this environment, or in that of `--peer-python`.
Machines drift, by tens of percent on shared ones, so the two run in turns, `--repeats` times each,
and only the ratios of one run mean something. llama.cpp's time has no sampling in it, and its
settings for attention and cache are the fastest ones for each test; qjax's is that of whole
requests.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from worker import Worker

from qjax.checkpoint import source
from qjax.errors import QjaxError


@dataclass(frozen=True)
class Test:
    """A prompt of `prompt` tokens, or decoding `generate` tokens for `batch` sequences after it."""

    prompt: int
    batch: int = 1
    generate: int = 0

    @property
    def name(self) -> str:
        return f"tg{self.generate} x {self.batch}" if self.generate else f"pp{self.prompt}"

    def prepare(self, worker: Worker) -> dict:
        if not self.generate:
            return worker.ask("prepare_prompt", length=self.prompt)
        return worker.ask("prepare_decode", **asdict(self))


@dataclass(frozen=True)
class Row:
    """Tokens/s of each repeat, and the settings that llama.cpp was fastest with."""

    test: str
    qjax: list[float]
    llamacpp: list[float]
    settings: dict[str, bool]

    @property
    def ratio(self) -> float:
        return statistics.median(self.qjax) / statistics.median(self.llamacpp)


def measure(test: Test, ours: Worker, peer: Worker, repeats: int) -> Row:
    """Both in turns; who is first changes with each turn."""
    test.prepare(ours)
    settings = test.prepare(peer)
    rates: dict[Worker, list[float]] = {ours: [], peer: []}
    for turn in range(repeats):
        for worker in (ours, peer) if turn % 2 == 0 else (peer, ours):
            rates[worker].append(worker.ask("measure"))
    return Row(test.name, rates[ours], rates[peer], settings)


def table_line(row: Row) -> str:
    """A line of the table: medians first, then mean ± standard deviation."""
    cells = []
    for rates in (row.qjax, row.llamacpp):
        sd = statistics.stdev(rates) if len(rates) > 1 else 0.0
        cells.append(f"{statistics.median(rates):.1f} ({statistics.fmean(rates):.1f} ± {sd:.1f})")
    settings = ", ".join(name.replace("_", " ") for name, on in row.settings.items() if on) or "-"
    return f"| {row.test} | {cells[0]} | {cells[1]} | **{row.ratio:.2f}** | {settings} |"


def arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",") if part]

    parser = argparse.ArgumentParser(description="qjax beside llama.cpp, on one GGUF file")
    parser.add_argument("model", help="a GGUF file, or a name that qjax.load finds one by")
    parser.add_argument("--peer-python", default=sys.executable, help="where llama_cpp is found")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batches", type=numbers, default=[1, 8, 32])
    parser.add_argument("--prompts", type=numbers, default=[512, 2048])
    parser.add_argument("--generate", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--numerics", default="fast", choices=["fast", "exact"])
    parser.add_argument("--json", type=Path, help="also write all figures here")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    here = options.peer_python == sys.executable
    if here and importlib.util.find_spec("llama_cpp") is None:
        sys.exit(
            "llama-cpp-python is not installed here: give an interpreter that has it by "
            "--peer-python (this script installs nothing)."
        )
    found = source.resolve(options.model)
    if found.kind != "gguf":
        sys.exit(f"{options.model} is no GGUF file, which is all that llama.cpp reads.")
    tests = [Test(16, batch, options.generate) for batch in options.batches]
    tests += [Test(length) for length in options.prompts]

    os.environ["QJAX_NUM_THREADS"] = str(options.threads)
    with (
        Worker(sys.executable, "qjax_worker.py", str(found.path), options.numerics) as ours,
        Worker(
            options.peer_python, "llamacpp_worker.py", str(found.path), str(options.threads)
        ) as peer,
    ):
        about = {"qjax": ours.ask("info"), "llamacpp": peer.ask("info")}
        print(f"{found.path.name}, {options.threads} threads, {options.repeats} repeats in turns")
        print(f"{about['qjax']['version']} ({options.numerics}); {about['llamacpp']['version']}")
        print("tokens/s of all sequences: median (mean ± standard deviation)\n")
        print("| test | qjax | llama.cpp | ratio of medians | llama.cpp's best settings |")
        print("| --- | ---: | ---: | ---: | --- |", flush=True)
        rows = []
        for test in tests:
            rows.append(measure(test, ours, peer, options.repeats))
            print(table_line(rows[-1]), flush=True)
    if options.json:
        figures = [asdict(row) | {"ratio": row.ratio} for row in rows]
        report = {"file": found.path.name, "threads": options.threads, **about, "tests": figures}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (QjaxError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
