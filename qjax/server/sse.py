"""Server-sent events, for readers that may be slow or gone."""

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.types import Send

_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # of nginx
}
# Seconds for the last words to a reader that was too slow before.
_LAST_WORDS = 5.0


class EventStream:
    """Writes events; each waits until the connection has room for it.

    Args:
      send: of ASGI.
      seconds: that this may take, or TimeoutError is raised.
    """

    def __init__(self, send: Send, seconds: float):
        self._send = send
        self._seconds = seconds

    async def start(self, headers: Mapping[str, str] = {}) -> None:
        found = {**_HEADERS, **headers}
        pairs = [(name.encode(), value.encode()) for name, value in found.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": pairs})

    async def event(self, content: Any) -> None:
        """One event with what `content` is as JSON."""
        await self._write(b"data: " + msgspec.json.encode(content) + b"\n\n")

    async def done(self) -> None:
        """OpenAI's last event, and the end."""
        await self._write(b"data: [DONE]\n\n", more=False)

    async def fail(self, content: Any) -> None:
        """The stream ends with an error, if the reader comes for it."""
        self._seconds = min(self._seconds, _LAST_WORDS)
        await self.event(content)
        await self.done()

    async def _write(self, data: bytes, more: bool = True) -> None:
        async with asyncio.timeout(self._seconds):
            await self._send({"type": "http.response.body", "body": data, "more_body": more})
