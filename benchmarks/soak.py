"""A server under mixed and hostile load for a while: does it stay up, and let go of what it held.

    qjax serve smollm2-135m --port 8000 &
    python benchmarks/soak.py --url http://127.0.0.1:8000 --pid $! --minutes 30 --drain \\
        --report benchmarks/results/serving/soak.json

Workers send requests that are answered, streamed, left early, read slowly, refused, or hardly HTTP,
while the server's memory is watched. At the end, nothing may have got a 5xx or no answer, every
refusal was a 4xx that names what is wrong, memory is flat after a warm-up, and the pages of the
cache and the open files are back to what they were. With --drain, the server is then sent SIGTERM
under load, and every request that it had accepted is answered or told.

Only a server on this machine is asked, at a loopback address. Linux only.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from soak_drain import CUT, NOT_ACCEPTED, Drained, drain
from soak_requests import MIX, Refused, Seen, post, refusals, refused, words
from soak_watch import Load, Process, Watch, check_loopback, growth, idle_load

from qjax.bench.serving.client import COMPLETIONS, Server, first_model
from qjax.bench.serving.connection import Address
from qjax.errors import QjaxError, ServingError

MOST_PROBLEMS = 50
MEMORY_GROWTH = 0.03
# Files that a server may have opened since, such as a log.
MORE_FILES = 4
REFUSED = "refused"


@dataclass
class Tally:
    """What became of the requests of one kind."""

    count: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    longest: float = 0.0
    seconds: float = 0.0

    def add(self, seen: Seen, seconds: float) -> None:
        self.count += 1
        self.statuses[str(seen.status)] = self.statuses.get(str(seen.status), 0) + 1
        self.longest = max(self.longest, seconds)
        self.seconds += seconds


@dataclass
class Record:
    """All that a soak has seen.

    Attributes:
      problems: the first of them.
      answers: those to the one request that is repeated, by which a server gone wrong would show.
    """

    tallies: dict[str, Tally] = field(default_factory=dict)
    num_problems: int = 0
    problems: list[str] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, seen: Seen, seconds: float) -> None:
        self.tallies.setdefault(kind, Tally()).add(seen, seconds)
        if seen.problem:
            self.num_problems += 1
            if len(self.problems) < MOST_PROBLEMS:
                self.problems.append(f"{kind}: {seen.problem}")

    @property
    def count(self) -> int:
        return sum(tally.count for tally in self.tallies.values())


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    found: str


async def worker(
    server: Server,
    rng: random.Random,
    wrong: Iterator[Refused],
    kinds: list[str],
    record: Record,
    limits: argparse.Namespace,
) -> None:
    """Sends one request after another until the time, or the number, is up."""
    weights = [MIX[kind][0] if kind in MIX else limits.refused for kind in kinds]
    end = time.monotonic() + 60 * limits.minutes
    while time.monotonic() < end and record.count < limits.max_requests:
        kind = rng.choices(kinds, weights)[0]
        start = time.monotonic()
        try:
            async with asyncio.timeout(limits.timeout):
                if kind == REFUSED:
                    seen = await refused(server, next(wrong))
                else:
                    seen = await MIX[kind][1](server, rng)
        except TimeoutError:
            seen = Seen(None, f"no end after {limits.timeout:g} s")
        except (ServingError, OSError) as error:
            seen = Seen(None, f"{type(error).__name__}: {error}")
            await asyncio.sleep(0.2)  # a server that is gone is not asked all the faster
        record.add(kind, seen, time.monotonic() - start)


async def known_answer(server: Server) -> str:
    """The answer to a request that is always the same."""
    body = {
        "model": server.model,
        "prompt": words(random.Random(0), 20),
        "max_tokens": 16,
        "temperature": 0,
        "ignore_eos": True,
    }
    status, found = await post(server, COMPLETIONS, body)
    if status != 200:
        raise ServingError(f"a plain request is answered {status}: {found[:300]!r}")
    return json.loads(found)["choices"][0]["text"]


async def repeat_known_answer(server: Server, record: Record, interval: float) -> None:
    while True:
        try:
            record.answers[await known_answer(server)] += 1
        except (ServingError, OSError) as error:
            record.add("known answer", Seen(None, str(error)), 0.0)
        await asyncio.sleep(interval)


async def soak(options: argparse.Namespace) -> dict[str, Any]:
    """Runs it all; the report."""
    address = Address.of(options.url)
    server = Server(address, "", api_key=os.environ.get("OPENAI_API_KEY"), timeout=options.timeout)
    check_loopback(server)
    process = Process.of(options.pid, address.port)
    server = await first_model(server)
    kinds = [kind for kind in (*MIX, REFUSED) if kind not in options.skip]
    rng, record, watch = random.Random(options.seed), Record(), Watch(process)
    wrong = refusals()
    rng.shuffle(wrong)
    wrong_ones = itertools.cycle(wrong)

    before = await idle_load(server, 60)
    record.answers[await known_answer(server)] += 1
    before_files = process.open_files()
    background = [
        asyncio.create_task(watch.run(options.interval)),
        asyncio.create_task(repeat_known_answer(server, record, 20)),
    ]
    start = time.monotonic()
    await asyncio.gather(
        *(
            worker(server, random.Random(rng.random()), wrong_ones, kinds, record, options)
            for _ in range(options.concurrency)
        )
    )
    minutes = (time.monotonic() - start) / 60
    for task in background:
        task.cancel()
    await asyncio.gather(*background, return_exceptions=True)

    alive = process.alive
    after = await idle_load(server, 60) if alive else None
    files = process.open_files()
    for _ in range(50):  # connections that were left may still be about to close
        if files <= before_files + MORE_FILES:
            break
        await asyncio.sleep(0.2)
        files = process.open_files()
    drained = None
    if options.drain and alive:
        drained = await drain(server, process, rng, options.concurrency, options.deadline)
    checks = judge(record, watch, alive, (before, after), (before_files, files), drained)
    return {
        "model": server.model,
        "minutes": minutes,
        "concurrency": options.concurrency,
        "seed": options.seed,
        "kinds_of_refusals": len(wrong),
        "checks": [asdict(check) for check in checks],
        "requests": {kind: asdict(tally) for kind, tally in record.tallies.items()},
        "problems": record.problems,
        "memory": {"seconds": watch.seconds, "resident": watch.resident},
        "drain": drained and asdict(drained),
    }


def judge(
    record: Record,
    watch: Watch,
    alive: bool,
    load: tuple[Load, Load | None],
    files: tuple[int, int],
    drained: Drained | None,
) -> list[Check]:
    """What must be true of a soak.

    Args:
      load, files: before and after.
    """
    statuses = Counter[str]()
    for tally in record.tallies.values():
        statuses.update(tally.statuses)
    errors = sum(count for status, count in statuses.items() if status.startswith("5"))
    before, after = load
    back = after is not None and after.idle and after.cache_usage <= before.cache_usage
    grown = growth(watch.resident) if watch.resident else float("nan")
    checks = [
        Check("the server is up", alive, "yes" if alive else "it ended"),
        Check("no 5xx", not errors, f"{errors} of {record.count} requests"),
        Check(
            "every request was answered, refused or told as it should be",
            not record.num_problems,
            f"{record.num_problems} problems",
        ),
        Check(
            "the same request has one answer",
            len(record.answers) == 1,
            f"{len(record.answers)} answers in {record.answers.total()}",
        ),
        Check(
            f"memory is flat within {MEMORY_GROWTH:.0%} after warm-up",
            abs(grown) <= MEMORY_GROWTH,
            f"{grown:+.2%}",
        ),
        Check(
            "nothing runs or waits, and the cache's pages are free", back, f"{before} -> {after}"
        ),
        Check(
            "open files are closed", files[1] <= files[0] + MORE_FILES, f"{files[0]} -> {files[1]}"
        ),
    ]
    if drained:
        lost = [fate for fate in (CUT, NOT_ACCEPTED) if drained.accepted.get(fate)]
        checks += [
            Check(
                "SIGTERM: every accepted request completed or was told",
                not lost and not drained.late.get(CUT),
                f"{drained.accepted}; of those that came later {drained.late}",
            ),
            Check(
                "SIGTERM: the process ended within the deadline",
                drained.seconds is not None,
                "it went on" if drained.seconds is None else f"after {drained.seconds:.1f} s",
            ),
        ]
    return checks


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report in Markdown."""
    yield (
        f"{report['model']}: {report['minutes']:.1f} minutes, {report['concurrency']} clients, "
        f"{report['kinds_of_refusals']} kinds of wrong requests."
    )
    yield from ("", "| check | | found |", "| --- | --- | --- |")
    for check in report["checks"]:
        mark = "passed" if check["passed"] else "**failed**"
        yield f"| {check['name']} | {mark} | {check['found']} |"
    yield from ("", "| requests | count | statuses | mean s | longest s |")
    yield "| --- | ---: | --- | ---: | ---: |"
    for kind, tally in report["requests"].items():
        counts = sorted(tally["statuses"].items())
        statuses = ", ".join(
            f"{count} x {'none' if status == 'None' else status}" for status, count in counts
        )
        mean = tally["seconds"] / tally["count"]
        yield (f"| {kind} | {tally['count']} | {statuses} | {mean:.2f} | {tally['longest']:.2f} |")
    if memory := report["memory"]["resident"]:
        yield ""
        yield f"Resident memory: {min(memory) / 1e6:.0f} to {max(memory) / 1e6:.0f} MB."
    if report["problems"]:
        yield from ("", "Problems, the first of them:", "")
        yield from (f"- {problem}" for problem in report["problems"])


def arguments(args: list[str] | None = None) -> argparse.Namespace:
    def bounded(kind: type, low: float, high: float):
        def parse(text: str):
            value = kind(text)
            if not low <= value <= high:
                raise argparse.ArgumentTypeError(f"must be in [{low:g}, {high:g}], got {text}")
            return value

        return parse

    parser = argparse.ArgumentParser(description="a server under mixed and hostile load")
    parser.add_argument("--url", required=True, help="http://127.0.0.1:PORT")
    parser.add_argument("--pid", type=bounded(int, 2, 1 << 22), required=True, help="the server's")
    parser.add_argument("--minutes", type=bounded(float, 0, 24 * 60), default=30.0)
    parser.add_argument("--max-requests", type=bounded(int, 1, 10**7), default=10**6)
    parser.add_argument("--concurrency", type=bounded(int, 1, 256), default=16)
    parser.add_argument("--timeout", type=bounded(float, 1, 3600), default=120.0, help="seconds")
    parser.add_argument(
        "--interval", type=bounded(float, 0.05, 60), default=2.0, help="seconds between two looks"
    )
    parser.add_argument(
        "--refused", type=bounded(float, 0, 100), default=4.0, help="weight of wrong requests"
    )
    parser.add_argument(
        "--skip", action="append", default=[], choices=[*MIX, REFUSED], help="may be repeated"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drain", action="store_true", help="end the server by SIGTERM, at last")
    parser.add_argument("--deadline", type=bounded(float, 1, 600), default=60.0, help="of it, in s")
    parser.add_argument("--report", type=Path, help="JSON; a table is put beside it")
    return parser.parse_args(args)


def main() -> None:
    options = arguments()
    report = asyncio.run(soak(options))
    text = "\n".join(table(report))
    print(text)
    if options.report:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(json.dumps(report, indent=1) + "\n")
        options.report.with_suffix(".md").write_text(text + "\n")
    if not all(check["passed"] for check in report["checks"]):
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except QjaxError as error:
        sys.exit(f"error: {error}")
