"""What the server holds of requests that are still coming in, and for how long."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import Request

from qjax.server.errors import ApiError, queue_full, unavailable

MAX_BODY = 8 << 20  # bytes; a million token ids take some 6 MiB
_MAX_BODIES = 64 << 20  # of all that are being read
# What is too long is read on for a while, or the client would not hear why it is refused.
_MAX_DISCARDED = 64 << 20


class ClientGone(Exception):
    """The client has closed its connection: nobody is left to answer."""


class Bodies:
    """Reads the bodies of requests, each within `MAX_BODY` bytes and `seconds`.

    Attributes:
      held: bytes of those that are not whole yet.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self.held = 0
        self._reading: set[asyncio.Timeout] = set()
        self._ending = False

    async def read(self, request: Request) -> bytes:
        """The body of a request with JSON.

        Raises:
          ApiError: it says that it is none (415), is too long (413), takes too long (408), or all
            bodies together are too long (429).
          ClientGone: before its end.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # A page of another site cannot send this without asking, and nobody would answer.
            raise ApiError(415, f"Content-Type must be application/json, got {kind[:80]!r}.")
        declared = int(request.headers.get("content-length", "0"))
        if declared > MAX_BODY + _MAX_DISCARDED:
            raise _too_long()
        try:
            with self._timed() as timeout:
                async with timeout:
                    return await self._read(request)
        except TimeoutError:
            if self._ending:
                raise unavailable("the server is shutting down.") from None
            raise ApiError(
                408,
                f"the body must arrive within {self._seconds:g} seconds.",
                headers={"Connection": "close"},
            ) from None

    def end(self) -> None:
        """No body is waited for any longer."""
        self._ending = True
        now = asyncio.get_running_loop().time()
        for timeout in self._reading:
            if not timeout.expired():
                timeout.reschedule(now)

    @contextmanager
    def _timed(self) -> Iterator[asyncio.Timeout]:
        timeout = asyncio.timeout(self._seconds)
        self._reading.add(timeout)
        try:
            yield timeout
        finally:
            self._reading.discard(timeout)

    async def _read(self, request: Request) -> bytes:
        body, size, more = bytearray(), 0, True
        try:
            while more and size <= MAX_BODY + _MAX_DISCARDED:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                more = message.get("more_body", False)
                piece = message.get("body", b"")
                size += len(piece)
                if size > MAX_BODY:
                    self.held -= len(body)
                    body.clear()
                    continue
                body += piece
                self.held += len(piece)
                if self.held > _MAX_BODIES:
                    raise queue_full("too many large requests are coming in.")
        finally:
            self.held -= len(body)
        if size > MAX_BODY:
            raise _too_long()
        return bytes(body)


def _too_long() -> ApiError:
    return ApiError(
        413, f"the body must be at most {MAX_BODY} bytes.", headers={"Connection": "close"}
    )
