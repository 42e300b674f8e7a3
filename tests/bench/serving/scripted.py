"""A server that does what a test tells it, byte by byte, and a clock that no machine holds up."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass
class Asked:
    """A request that came in, and the connection to answer it on."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def answer(self, status: int, content: Any, kind: str = "application/json") -> None:
        """A whole answer, with its length."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.write(
            f"HTTP/1.1 {status} Status\r\nContent-Type: {kind}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )

    def begin(self) -> None:
        """The head of a stream of events."""
        self.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )

    def event(self, data: Any) -> None:
        text = data if isinstance(data, str) else json.dumps(data)
        self.chunk(f"data: {text}\n\n".encode())

    def chunk(self, piece: bytes) -> None:
        self.write(b"%x\r\n" % len(piece) + piece + b"\r\n")

    def write(self, piece: bytes) -> None:
        self.writer.write(piece)

    def end(self) -> None:
        self.event("[DONE]")
        self.write(b"0\r\n\r\n")


Handler = Callable[[Asked], Awaitable[None]]


@dataclass
class Scripted:
    """Where it listens, and what it was asked."""

    port: int
    asked: list[Asked] = field(default_factory=list)
    connections: dict[asyncio.StreamWriter, asyncio.Task[None]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def close(self) -> None:
        """Breaks off what is still connected."""
        for writer in self.connections:
            writer.transport.abort()
        await asyncio.gather(*self.connections.values(), return_exceptions=True)
        await asyncio.sleep(0)


async def serve(handler: Handler, port: int = 0) -> tuple[asyncio.Server, Scripted]:
    """Listens, by default at a port that the system chooses, in the running loop."""
    scripted = Scripted(0)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        scripted.connections[writer] = task
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            method, path, _ = head[0].split(" ")
            headers = {
                name.lower(): value
                for name, _, value in (line.partition(": ") for line in head[1:])
            }
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            asked = Asked(method, path, headers, body, reader, writer)
            scripted.asked.append(asked)
            await handler(asked)
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", port)
    scripted.port = server.sockets[0].getsockname()[1]
    return server, scripted


def beside(handler: Handler, run: Callable[[Scripted], Coroutine[Any, Any, T]]) -> T:
    """What `run` gives, in one loop with a server."""

    async def both() -> T:
        server, scripted = await serve(handler)
        async with server:
            try:
                return await run(scripted)
            finally:
                await scripted.close()

    return asyncio.run(both())


@contextmanager
def in_thread(handler: Handler) -> Iterator[Scripted]:
    """A server in a thread of its own, for what runs a loop itself."""
    loop = asyncio.new_event_loop()
    server, scripted = loop.run_until_complete(serve(handler))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield scripted
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        loop.run_until_complete(scripted.close())
        loop.close()


async def tokens(asked: Asked) -> None:
    """A server of one model, whose every word is a token."""
    if asked.path == "/v1/models":
        asked.answer(200, {"object": "list", "data": [{"id": "words", "object": "model"}]})
    elif asked.path == "/tokenize":
        asked.answer(200, {"count": len(asked.json["prompt"].split())})
    elif asked.path == "/v1/completions":
        body = asked.json
        asked.begin()
        for number in range(body["max_tokens"]):
            asked.event({"choices": [{"index": 0, "text": f" {number}", "finish_reason": None}]})
        asked.event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        usage = {
            "prompt_tokens": len(body["prompt"].split()),
            "completion_tokens": body["max_tokens"],
        }
        asked.event({"choices": [], "usage": usage})
        asked.end()
    else:
        asked.answer(404, {"error": {"message": f"no path {asked.path}"}})


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose time goes on only when everybody sleeps, and then at once to the next who
    wakes."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        selector: Any = self._selector  # type: ignore[attr-defined]
        select = selector.select

        def at_once(timeout: float | None) -> Any:
            self._now += timeout or 0.0
            return select(0)

        selector.select = at_once

    def time(self) -> float:
        return self._now


def virtually(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine that only sleeps."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)
