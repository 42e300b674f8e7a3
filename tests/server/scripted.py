"""A server with as much of the API as the chat page needs, which says what a test has it say."""

import contextlib
import json
import queue
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from qjax.server import page

MODEL = {
    "id": "scripted",
    "max_model_len": 512,
    "quantization": {"method": "gptq", "qtype": None, "bits_per_weight": 4.5},
}


@dataclass
class Script:
    """What comes next: a str is more of the answer, a dict an event, an int a status, None the
    end; BREAK closes the connection."""

    url: str = ""
    model: dict[str, Any] = field(default_factory=lambda: dict(MODEL))
    message: str = "something about the status"
    next: "queue.Queue[str | dict[str, Any] | int | None]" = field(default_factory=queue.Queue)
    asked: list[dict[str, Any]] = field(default_factory=list)

    def say(self, *items: str | dict[str, Any] | int | None) -> None:
        for item in items:
            self.next.put(item)


BREAK: dict[str, Any] = {}


@contextlib.contextmanager
def scripted() -> Iterator[Script]:
    """Serves until the block ends."""
    script = Script()
    connections: list[socket.socket] = []

    class Handler(BaseHTTPRequestHandler):
        def setup(self) -> None:
            super().setup()
            connections.append(self.connection)

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            if self.path == "/":
                found = page.response(200)
                self.answer(200, bytes(found.body), **dict(found.headers))
            else:
                self.answer(200, json.dumps({"data": [script.model]}).encode())

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            script.asked.append(json.loads(self.rfile.read(length)))
            item, count = script.next.get(timeout=60), 0
            if isinstance(item, int):
                error = {"error": {"message": script.message}}
                self.answer(item, json.dumps(error).encode())
                return
            self.answer(200, b"", content_type="text/event-stream")
            with contextlib.suppress(OSError):  # the browser may go
                while isinstance(item, str | dict) and item is not BREAK:
                    count += 1
                    self.event(self.chunk(item, count) if isinstance(item, str) else item)
                    item = script.next.get(timeout=60)
                if item is None:
                    self.wfile.write(b"data: [DONE]\n\n")

        def event(self, content: dict[str, Any]) -> None:
            """In two writes, the first of which may end within a character."""
            data = f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()
            middle = data.find("…".encode()) + 1 or len(data) // 2
            for piece in (data[:middle], data[middle:]):
                self.wfile.write(piece)
                self.wfile.flush()

        @staticmethod
        def chunk(text: str, count: int) -> dict[str, Any]:
            return {
                "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}],
                "usage": {"completion_tokens": count},
            }

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    script.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield script
    finally:
        server.shutdown()
        for connection in connections:  # browsers open some ahead of need
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        thread.join(60)
        server.server_close()
