"""The soak: what it takes for right and wrong, and a short one against small servers."""

import asyncio
import importlib
import json
import os
import random
import socket
from pathlib import Path
from typing import Any

import pytest

from qjax.bench.serving.client import Server
from qjax.bench.serving.connection import Address
from qjax.errors import QjaxError, RequestError, ServingError
from tests.bench.serving.scripted import Asked, in_thread

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
METRICS = """# HELP qjax:num_requests_running Sequences that run.
# TYPE qjax:num_requests_running gauge
qjax:num_requests_running{model_name="a b"} 2.0
qjax:num_requests_running{model_name="c"} 1.0
qjax:num_requests_waiting{model_name="a b"} 0.0
qjax:kv_cache_usage_perc 0.25
"""
IDLE = """qjax:num_requests_running 0
qjax:num_requests_waiting 0
qjax:kv_cache_usage_perc 0
"""


@pytest.fixture(autouse=True)
def _programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def program(name: str) -> Any:
    return importlib.import_module(name)


def server(url: str = "http://127.0.0.1:1") -> Server:
    return Server(Address.of(url), "words")


# --- one by one -----------------------------------------------------------------------------------


def test_only_this_machine_is_asked() -> None:
    check = program("soak_watch").check_loopback
    for url in ("http://127.0.0.1:1", "http://127.9.9.9", "http://[::1]:1", "http://localhost"):
        check(server(url))
    for url in ("http://192.0.2.1", "http://0.0.0.0:1", "http://[2001:db8::1]", "http://10.0.0.1"):
        with pytest.raises(RequestError, match="must be a loopback address"):
            check(server(url))


def test_the_process_is_the_one_that_listens() -> None:
    process_of = program("soak_watch").Process.of
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        process = process_of(os.getpid(), port)
        assert process.alive
        assert process.resident() > 1 << 20
        assert process.open_files() == len(os.listdir("/proc/self/fd")) - 1
        with pytest.raises(RequestError, match="does not listen"):
            process_of(os.getppid(), port)
    with pytest.raises(RequestError, match="does not listen"):
        process_of(os.getpid(), port)
    with pytest.raises(RequestError, match="no process"):
        process_of((1 << 22) - 1, port)
    other = program("soak_watch").Process(process.pid, "0")  # started at another time
    assert not other.alive


def test_load_of_metrics() -> None:
    parse = program("soak_watch").parse_load
    assert vars(parse(METRICS)) == {"running": 3, "waiting": 0, "cache_usage": 0.25}
    assert not parse(METRICS).idle
    assert parse(IDLE).idle
    assert parse(METRICS.replace("qjax:", "vllm:")) == parse(METRICS)
    with pytest.raises(ServingError, match="num_requests_waiting"):
        parse(METRICS.replace("waiting", "asleep"))


def test_growth_of_memory() -> None:
    growth = program("soak_watch").growth
    flat = [100] * 40
    assert growth(flat) == 0
    assert growth([*range(50, 58), *flat[:32]]) == 0  # warm-up
    assert growth([*flat[:25], 500, *flat[:14]]) == 0  # for one large request
    assert growth([100 + number for number in range(100)]) == pytest.approx(71 / 123.5, rel=0.05)


@pytest.mark.parametrize(
    ("status", "body", "problem"),
    [
        (400, {"error": {"message": "n must be at least 1, got 0.", "param": None}}, ""),
        (422, {"error": {"message": "out of range", "param": "n"}}, ""),
        (429, {}, ""),
        (400, {"error": {"message": "bad request", "param": None}}, "names none of"),
        (400, {"detail": "n"}, "no error of OpenAI's form"),
        (500, {"error": {"message": "n"}}, "answered 500"),
        (200, {"choices": []}, "answered 200"),
    ],
)
def test_refusals(status: int, body: Any, problem: str) -> None:
    requests = program("soak_requests")
    asked = requests.Refused("n=0", {"n": 0}, ("n must", "n"))
    seen = requests.judge_refusal(asked, status, json.dumps(body).encode())
    assert seen.status == status
    assert problem in seen.problem
    assert bool(seen.problem) == bool(problem)


def test_every_refusal_is_wrong_in_its_own_way() -> None:
    found = program("soak_requests").refusals()
    assert len({asked.name for asked in found}) == len(found) > 90
    assert all(asked.names for asked in found)


def event(**fields: Any) -> bytes:
    return f"data: {json.dumps(fields)}\n\n".encode()


@pytest.mark.parametrize(
    ("status", "body", "in_pieces", "fate"),
    [
        (200, b'{"choices": [{"finish_reason": "length"}]}', False, "completed"),
        (200, event(choices=[{"finish_reason": "stop"}]) + b"data: [DONE]\n\n", True, "completed"),
        (503, b'{"error": {"message": "shutting down"}}', True, "told"),
        (200, event(choices=[]) + event(error={"message": "x"}), True, "told"),
        (200, event(choices=[{"finish_reason": "abort"}]), True, "told"),
        (200, event(choices=[{"finish_reason": None}]), True, "cut"),
        (200, b"", False, "cut"),
        (503, b"Service Unavailable", False, "cut"),
    ],
)
def test_fates(status: int, body: bytes, in_pieces: bool, fate: str) -> None:
    assert program("soak_drain").fate(status, body, in_pieces) == fate


def test_verdict() -> None:
    soak, watch, drained = program("soak"), program("soak_watch"), program("soak_drain").Drained
    seen = program("soak_requests").Seen
    well = drained({"completed": 8, "told": 8}, {"told": 3, "not accepted": 1}, 2.0)
    idle, busy = watch.Load(0, 0, 0.0), watch.Load(0, 0, 0.1)

    def failed(
        *,
        statuses: tuple[int | None, ...] = (200, 400, None),
        problem: str = "",
        answers: tuple[str, ...] = ("a", "a"),
        memory: tuple[int, ...] = (100,) * 20,
        alive: bool = True,
        after: Any = idle,
        files: tuple[int, int] = (9, 10),
        drain: Any = well,
    ) -> set[str]:
        record, looks = soak.Record(), watch.Watch(watch.Process(1, "0"))
        for status in statuses:
            record.add("answered", seen(status, problem), 0.1)
        record.answers.update(answers)
        looks.resident = list(memory)
        checks = soak.judge(record, looks, alive, (idle, after), files, drain)
        return {check.name.split()[0] + check.name[-4:] for check in checks if not check.passed}

    assert failed() == set()
    assert failed(statuses=(200, 500)) == {"no 5xx"}
    assert len(failed(problem="x")) == 1
    assert len(failed(answers=("a", "b"))) == 1
    assert len(failed(memory=(*range(100, 120),))) == 1
    assert len(failed(after=busy)) == 1
    assert len(failed(files=(9, 30))) == 1
    assert len(failed(alive=False, after=None)) == 2
    assert len(failed(drain=drained({"completed": 8, "cut": 1}, {}, 2.0))) == 1
    assert len(failed(drain=drained({"not accepted": 1}, {}, None))) == 2


# --- all together ---------------------------------------------------------------------------------


class Small:
    """A server of one model that knows the fields of the soak's requests a little.

    Args:
      faults: how it goes wrong; see where they are looked for.
    """

    def __init__(self, *faults: str):
        self.faults, self.count = faults, 0

    async def __call__(self, asked: Asked) -> None:
        if asked.path == "/metrics":
            asked.answer(200, IDLE.encode())
        elif asked.path == "/v1/models":
            asked.answer(200, {"data": [{"id": "words"}]})
        elif asked.method == "GET" and asked.path in ("/health", "/version"):
            asked.answer(200, {})
        elif asked.path == "/tokenize":
            asked.answer(200, {"count": 1})
        else:
            await self.complete(asked)

    async def complete(self, asked: Asked) -> None:
        self.count += 1
        try:
            body = asked.json
            body["prompt" if asked.path.endswith("v1/completions") else "messages"]
        except (ValueError, KeyError, TypeError):
            asked.answer(400, {"error": {"message": "the body is no JSON with prompt, messages"}})
            return
        # The request that is repeated is never hit, so that its answers can differ.
        if "error" in self.faults and self.count % 3 == 0 and body.get("max_tokens") != 16:
            asked.answer(500, {"error": {"message": "internal error"}})
            return
        text = str(self.count) if "forgetful" in self.faults else "a"
        n = body.get("n", 1)
        choices = [{"index": index, "text": text, "finish_reason": "stop"} for index in range(n)]
        if not body.get("stream"):
            asked.answer(200, {"choices": choices})
            return
        asked.begin()
        for choice in choices:
            asked.event({"choices": [choice]})
        asked.end()


def soaked(small: Small, args: str) -> dict[str, Any]:
    soak = program("soak")
    with in_thread(small) as found:
        options = soak.arguments(
            f"--url {found.url} --pid {os.getpid()} --minutes 10 --max-requests 40 "
            f"--concurrency 4 --interval 0.05 {args}".split()
        )
        report = asyncio.run(soak.soak(options))
    json.dumps(report, allow_nan=False)
    text = "\n".join(soak.table(report))
    assert all(check["name"] in text for check in report["checks"])
    return report


# Those take long by their nature; and this small server does not refuse what others refuse.
SKIP = "--skip hostile --skip left-unanswered --skip read-slowly"


def failures(report: dict[str, Any]) -> list[str]:
    # The memory of this process is not that of a server.
    ignored = ("memory is flat", "open files")
    names = [check["name"] for check in report["checks"] if not check["passed"]]
    return [name for name in names if not name.startswith(ignored)]


def test_a_server_that_does_well() -> None:
    report = soaked(Small(), f"{SKIP} --skip refused")
    assert failures(report) == []
    assert 40 <= sum(tally["count"] for tally in report["requests"].values()) <= 44
    assert report["requests"].keys() <= program("soak_requests").MIX.keys()
    assert report["memory"]["resident"]


def test_servers_that_do_not() -> None:
    report = soaked(Small("error", "forgetful"), SKIP)
    assert failures(report) == [
        "no 5xx",
        "every request was answered, refused or told as it should be",
        "the same request has one answer",
    ]
    assert any("answered 500" in problem for problem in report["problems"])


def test_arguments() -> None:
    soak = program("soak")
    for wrong in (["--pid", "1"], ["--minutes", "1e9"], ["--concurrency", "0"], ["--skip", "x"]):
        with pytest.raises(SystemExit):
            soak.arguments(["--url", "http://127.0.0.1:1", "--pid", "2", *wrong])
    options = soak.arguments(["--url", "http://192.0.2.1:1", "--pid", "2"])
    with pytest.raises(QjaxError, match="loopback"):
        asyncio.run(soak.soak(options))


def test_words_come_from_the_seed() -> None:
    words = program("soak_requests").words
    assert words(random.Random(1), 9) == words(random.Random(1), 9) != words(random.Random(2), 9)
