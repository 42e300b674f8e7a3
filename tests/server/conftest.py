"""A server of a tiny model on a real port, for the tests of its endpoints."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

import qjax
from qjax.server.app import create_app
from qjax.server.run import DrainingServer, bind
from qjax.server.service import Service, Settings

PAGES = 40
MAX_MODEL_LEN = 512
NAME = "tiny"


@dataclass
class Running:
    """A server in a thread: its address, and what it is made of."""

    server: DrainingServer
    port: int
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def service(self) -> Service:
        return self.server.service

    def client(self, key: str = "none") -> openai.OpenAI:
        url = f"{self.url}/v1"
        return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60)

    def post(self, path: str, content: Any, **options: Any) -> httpx.Response:
        """What comes of JSON, or of bytes as they are."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"Content-Type": "application/json", **options.pop("headers", {})}
        return httpx.post(self.url + path, content=body, headers=headers, timeout=60, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **options)

    def until(self, what: Callable[[], bool]) -> None:
        """Waits for something that will be so soon."""
        deadline = time.monotonic() + 60
        while not what():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def idle(self) -> None:
        """Waits until no request is left, and all pages are free."""

        def unused() -> bool:
            stats = self.service.stats()
            assert stats is not None
            running = stats.num_running + stats.num_waiting
            return running == 0 and stats.num_free_blocks == stats.num_blocks

        self.until(unused)

    def ended(self, reason: str) -> float:
        """How many sequences ended so, by the server's metrics."""
        families = text_string_to_metric_families(self.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        wanted = "qjax:request_success_total"
        return sum(
            sample.value
            for sample in samples
            if sample.name == wanted and sample.labels["finished_reason"] == reason
        )

    def drain(self) -> None:
        self.loop.call_soon_threadsafe(self.server.drain)


@contextlib.contextmanager
def serving(
    load: Callable[[], qjax.Engine],
    drain_seconds: float = 0.0,
    wait: bool = True,
    buffer: int | None = None,
    **settings: Any,
) -> Iterator[Running]:
    """A server until the block ends; from its beginning on it is ready, unless told otherwise.

    `buffer` is how many bytes a connection takes that nobody reads, about.
    """
    server = DrainingServer(create_app(load, Settings(names=(NAME,), **settings)), drain_seconds)
    listener = bind("127.0.0.1", 0)
    if buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    loop = asyncio.new_event_loop()

    def run() -> None:
        with contextlib.closing(loop):
            loop.run_until_complete(server.serve([listener]))

    thread = threading.Thread(target=run, name="server")
    running = Running(server, listener.getsockname()[1], loop, thread)
    thread.start()
    try:
        if wait:
            running.until(lambda: running.get("/health").status_code == 200)
        yield running
    finally:
        with contextlib.suppress(RuntimeError):  # it has ended itself
            running.drain()
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def params(golden: Path) -> qjax.Params:
    """A model that transformers ran, too: see its reference.npz."""
    return qjax.load(golden / "base-tiny-llama")


def engine_of(params: qjax.Params, max_num_seqs: int = 4) -> qjax.Engine:
    options: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN, "numerics": "exact"}
    return qjax.Engine(params, num_blocks=PAGES, max_num_seqs=max_num_seqs, **options)


@pytest.fixture(scope="module")
def running(params: qjax.Params) -> Iterator[Running]:
    with serving(lambda: engine_of(params), max_queue=28) as running:
        yield running


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    with running.client() as client:
        yield client


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While it is not set, no engine gets on."""
    step, gate = qjax.Engine.step, threading.Event()

    def held(self: qjax.Engine) -> list[Any]:
        assert gate.wait(60)
        return step(self)

    gate.set()
    monkeypatch.setattr(qjax.Engine, "step", held)
    yield gate
    gate.set()


class Raw:
    """A connection that does what no HTTP client would."""

    def __init__(self, running: Running, buffer: int | None = None):
        self.socket = socket.socket()
        if buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.settimeout(60)
        self.socket.connect(("127.0.0.1", running.port))

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def post(self, path: str, body: bytes, length: int | None = None) -> None:
        """Sends a request, of whose body `length` bytes are announced."""
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += "Connection: close\r\n"
        head += f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
        self.socket.sendall(head.encode() + body)

    def rest(self) -> bytes:
        """All that comes until the connection is closed."""
        found = b""
        while piece := self.socket.recv(65536):
            found += piece
        return found

    def answer(self) -> tuple[int, dict[str, Any]]:
        """Status and JSON of an answer that ends with the connection."""
        head, _, body = self.rest().partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body)
