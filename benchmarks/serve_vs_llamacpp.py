"""qjax's server beside llama.cpp's: the same file, the same load, in turns, one of them alive.

    python benchmarks/serve_vs_llamacpp.py smollm2-135m \\
        --llama-server ~/llama.cpp/build/bin/llama-server \\
        --json benchmarks/results/serving/MACHINE.json

Clients are those of `qjax bench serve`: `--streams` at a time, each with other random words of
`--input-len` tokens, until `--output-len` are generated, greedily. They run on the same machine;
how long they kept a processor busy is told. Each round starts both servers anew, warms them up with
as many requests as there are streams, and swaps who is first. Before, llama-server runs the load
once with each of its settings for attention and cache, and keeps the fastest.

llama-server comes with llama.cpp. Without one, `--peer-python` names an interpreter that has
llama-cpp-python, whose server answers one request after the other.

A second test is of qjax alone: prompts with `--prefix-len` tokens in common, one at a time, with
and without the prefix cache. Installs nothing.
"""

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import qjax
from qjax.bench.serving.client import Server, first_model
from qjax.bench.serving.connection import Address
from qjax.bench.serving.load import benchmark
from qjax.bench.serving.metrics import flat, metrics
from qjax.bench.serving.prompts import Random, counted_with, random_samples
from qjax.checkpoint import source
from qjax.errors import QjaxError, ServingError

START_SECONDS = 600
END_SECONDS = 60
SETTINGS = (
    ("--flash-attn", "on", "--no-kv-unified"),
    ("--flash-attn", "on", "--kv-unified"),
    ("--flash-attn", "off", "--no-kv-unified"),
)


@dataclass(frozen=True)
class Load:
    """`requests` prompts, `streams` at a time; lengths in tokens."""

    streams: int
    requests: int
    warmups: int
    input_len: int
    output_len: int
    prefix_len: int = 0

    @property
    def max_model_len(self) -> int:
        return -(-(self.prefix_len + self.input_len + self.output_len + 16) // 256) * 256


@dataclass(frozen=True)
class Engine:
    """A server's command, which `settings` and --port N end, and what its requests need."""

    name: str
    command: tuple[str, ...]
    extra: dict[str, Any] = field(default_factory=dict)
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A round of an engine; `figures` are those of `qjax bench serve`."""

    engine: str
    figures: dict[str, Any]


def ours(file: Path, load: Load, *more: str) -> Engine:
    command = (sys.executable, "-m", "qjax", "serve", str(file), "--host", "127.0.0.1")
    limits = ("--max-num-seqs", load.streams, "--max-model-len", load.max_model_len)
    return Engine("qjax", (*command, *map(str, limits)), settings=more)


def llama_server(program: str, file: Path, load: Load, threads: int) -> Engine:
    """Each slot has a context of its own size of `load`."""
    limits = ("-np", load.streams, "-c", load.streams * load.max_model_len)
    limits += ("-t", threads, "-tb", threads, "--cache-ram", 0)
    command = (program, "-m", str(file), "--host", "127.0.0.1", *map(str, limits))
    return Engine("llama.cpp", command)


def llama_cpp_python(python: str, file: Path, load: Load, threads: int) -> Engine:
    command = (python, "-m", "llama_cpp.server", "--model", str(file), "--host", "127.0.0.1")
    limits = ("--n_ctx", load.max_model_len, "--n_threads", threads, "--n_threads_batch", threads)
    limits += ("--interrupt_requests", "false", "--logits_all", "false")
    # It knows no ignore_eos, and penalizes repetition unless told otherwise.
    extra = {"min_tokens": load.output_len, "repeat_penalty": 1.0}
    return Engine("llama.cpp (llama_cpp.server)", (*command, *map(str, limits)), extra)


@contextlib.contextmanager
def served(engine: Engine, threads: int) -> Iterator[Server]:
    """Starts a server, and ends it.

    Raises:
      RuntimeError: it does not come up; with the end of what it wrote.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    server = Server(
        Address.of(f"http://127.0.0.1:{port}"),
        "",
        ignore_eos=True,
        extra={"temperature": 0, **engine.extra},
        timeout=1800,
    )
    environment = os.environ | {"QJAX_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*engine.command, *engine.settings, "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
        )
        try:
            yield _ready(server, process, log)
        finally:
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ready(server: Server, process: subprocess.Popen, log: Any) -> Server:
    """The server with its model, as soon as it tells which that is."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(ServingError):
            return asyncio.run(first_model(server))
        time.sleep(0.2)
    log.seek(0)
    raise RuntimeError(f"{process.args} does not come up: {log.read()[-2000:]}")


def run(engine: Engine, load: Load, file: Path, threads: int, seed: int) -> Row:
    """One round: starts it, warms it up, and measures.

    Raises:
      RuntimeError: a request failed.
    """
    sizes = Random(load.input_len, load.output_len, prefix_len=load.prefix_len)

    async def measured(server: Server) -> dict[str, Any]:
        samples = await random_samples(
            sizes, load.requests + load.warmups, seed, counted_with(str(file))
        )
        ran = await benchmark(
            server,
            samples[: load.requests],
            [0.0] * load.requests,
            warmups=samples[load.requests :],
            max_concurrency=load.streams,
        )
        if errors := [one.error for one in ran.outcomes if one.error]:
            raise RuntimeError(f"{engine.name}: {len(errors)} requests failed: {errors[0]}")
        found = metrics(ran.outcomes, ran.duration, percentiles=(50, 99))
        return flat(found) | {"client_seconds": ran.client_seconds}

    with served(engine, threads) as server:
        row = Row(engine.name, asyncio.run(measured(server)))
    print(shown(row), flush=True)
    return row


def fastest(engine: Engine, load: Load, file: Path, threads: int) -> Engine:
    """llama-server with those of its settings that it is fastest with."""
    found: list[tuple[float, Engine]] = []
    for settings in SETTINGS:
        tried = replace(engine, settings=settings)
        try:
            row = run(tried, load, file, threads, seed=0)
        except RuntimeError as error:
            print(f"{' '.join(settings)}: {error}", file=sys.stderr)
            continue
        found.append((row.figures["output_throughput"], tried))
    if not found:
        raise RuntimeError("llama-server runs with none of its settings")
    return max(found, key=lambda each: each[0])[1]


def in_turns(
    engines: tuple[Engine, ...], load: Load, file: Path, threads: int, rounds: int
) -> list[Row]:
    """Rounds of all engines; each round has prompts of its own, the same for all."""
    rows = []
    for turn in range(rounds):
        order = engines if turn % 2 == 0 else engines[::-1]
        rows += [run(engine, load, file, threads, seed=1 + turn) for engine in order]
    return rows


def median(rows: list[Row], engine: str, figure: str) -> float:
    return statistics.median(row.figures[figure] for row in rows if row.engine == engine)


def ratios(rows: list[Row], engine: str, other: str) -> dict[str, float]:
    """How many times better the medians of one engine's rounds are than another's."""

    def of(figure: str) -> float:
        return median(rows, engine, figure) / median(rows, other, figure)

    return {
        "output_throughput": of("output_throughput"),
        "total_token_throughput": of("total_token_throughput"),
        "median_ttft_ms": 1 / of("median_ttft_ms"),
        "p99_ttft_ms": 1 / of("p99_ttft_ms"),
        "median_tpot_ms": 1 / of("median_tpot_ms"),
    }


HEAD = (
    "| server | output tokens/s | all tokens/s | median TTFT ms | p99 TTFT ms | median TPOT ms | "
    "client's share of a processor |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
)


def shown(row: Row) -> str:
    figures = row.figures
    return (
        f"| {row.engine} | {figures['output_throughput']:.0f} | "
        f"{figures['total_token_throughput']:.0f} | {figures['median_ttft_ms']:.0f} | "
        f"{figures['p99_ttft_ms']:.0f} | {figures['median_tpot_ms']:.1f} | "
        f"{figures['client_seconds'] / figures['duration']:.0%} |"
    )


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report in Markdown."""
    for test in report["tests"]:
        load = test["load"]
        prefix = f"{load['prefix_len']} tokens in common, " if load["prefix_len"] else ""
        yield (
            f"{report['file']}, {report['threads']} threads: {load['requests']} prompts of {prefix}"
            f"{load['input_len']} tokens, {load['output_len']} generated, {load['streams']} at a "
            "time."
        )
        yield ""
        yield from HEAD
        yield from (shown(Row(**row)) for row in test["rows"])
        yield ""
        named = {
            "output_throughput": "output tokens/s",
            "total_token_throughput": "all tokens/s",
            "median_ttft_ms": "median TTFT",
            "p99_ttft_ms": "p99 TTFT",
            "median_tpot_ms": "median TPOT",
        }
        better = ", ".join(
            f"{name} **{test['ratios'][figure]:.2f}x**" for figure, name in named.items()
        )
        yield f"{' against '.join(test['engines'])}, medians of rounds: {better}."
        for name, settings in test["engines"].items():
            about = f"{report['versions'].get(name, '')} {' '.join(settings)}".strip()
            yield f"{name}: {about or 'by default'}."
        yield ""


def peer_version(options: argparse.Namespace) -> str:
    if options.llama_server:
        command = [options.llama_server, "--version"]
    else:
        command = [options.peer_python, "-c", "import llama_cpp; print(llama_cpp.__version__)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr[-500:]}")
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return next((line for line in lines if "version" in line), lines[-1])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="qjax's server beside llama.cpp's")
    parser.add_argument("model", help="a GGUF file, or a name that qjax.load finds one by")
    parser.add_argument("--llama-server", help="llama.cpp's program")
    parser.add_argument("--peer-python", help="instead, an interpreter that has llama_cpp.server")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--requests", type=int, help="of a round; by default twice the streams")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--prefix-len", type=int, default=1000, help="0 leaves that test out")
    parser.add_argument("--json", type=Path, help="also write all figures here, a table beside it")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    found = source.resolve(options.model)
    if found.kind != "gguf":
        sys.exit(f"{options.model} is no GGUF file, which is all that llama.cpp reads.")
    file, threads = found.path.resolve(), options.threads
    load = Load(
        options.streams,
        options.requests or 2 * options.streams,
        options.streams,
        options.input_len,
        options.output_len,
    )
    versions, tests = {"qjax": qjax.__version__}, []

    def test(load: Load, *engines: Engine) -> None:
        rows = in_turns(engines, load, file, threads, options.rounds)
        names = {engine.name: list(engine.settings) for engine in engines}
        tests.append(
            {
                "load": asdict(load),
                "engines": names,
                "rows": [asdict(row) for row in rows],
                "ratios": ratios(rows, *names),
            }
        )

    print("\n".join(HEAD), flush=True)
    if options.llama_server or options.peer_python:
        if options.llama_server:
            peer = llama_server(options.llama_server, file, load, threads)
            peer = fastest(peer, load, file, threads)
        else:
            peer = llama_cpp_python(options.peer_python, file, load, threads)
        versions[peer.name] = peer_version(options)
        test(load, ours(file, load), peer)
    if options.prefix_len:
        shared = Load(1, 16, 2, 24, 8, options.prefix_len)
        cached = ours(file, shared, "--enable-prefix-caching")
        plain = ours(file, shared, "--no-enable-prefix-caching")
        test(shared, cached, replace(plain, name="qjax without prefix cache"))
    report = {
        "file": file.name,
        "threads": threads,
        "rounds": options.rounds,
        "versions": versions,
        "tests": tests,
    }
    text = "\n".join(table(report)).rstrip()
    print(f"\n{text}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")
        options.json.with_suffix(".md").write_text(text + "\n")


if __name__ == "__main__":
    try:
        main()
    except (QjaxError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
