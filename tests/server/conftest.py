"""A server of a tiny model on a real port, for the tests of its endpoints."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import qjax
from qjax.server.app import create_app
from qjax.server.run import Server, bind
from qjax.server.service import Service, Settings

PAGES = 40
MAX_MODEL_LEN = 256
NAME = "tiny"


@dataclass
class Running:
    """A server in a thread: its address, and what it is made of."""

    server: Server
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
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=httpx.Timeout(60)
        )

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

    def drain(self) -> None:
        self.loop.call_soon_threadsafe(self.server.drain)


@contextlib.contextmanager
def serving(
    load: Callable[[], qjax.Engine], drain_seconds: float = 0.0, wait: bool = True, **settings: Any
) -> Iterator[Running]:
    """A server until the block ends; from its beginning on it is ready, unless told otherwise."""
    server = Server(create_app(load, Settings(names=(NAME,), **settings)), drain_seconds)
    listener = bind("127.0.0.1", 0)
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
def engine(golden: Path) -> qjax.Engine:
    """Of a model that transformers ran, too: see its reference.npz."""
    params = qjax.load(golden / "base-tiny-llama")
    options: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN, "numerics": "exact"}
    return qjax.Engine(params, num_blocks=PAGES, max_num_seqs=4, **options)


@pytest.fixture(scope="module")
def running(engine: qjax.Engine) -> Iterator[Running]:
    with serving(lambda: engine, max_num_seqs=4, max_queue=28) as running:
        yield running


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    with running.client() as client:
        yield client
