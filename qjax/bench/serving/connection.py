"""One HTTP/1.1 request over a connection of its own, at little cost to the machine.

A load generator often shares its machine with the server that it measures, so what it spends on
each token is taken from what it measures. h11 does the protocol, asyncio the transport, and there
is nothing in between: no pool, no redirects, no decompression.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import h11

from qjax.errors import RequestError, ServingError

# Most bytes of a header block, and of one read.
_MOST_BYTES = 1 << 16


@dataclass(frozen=True)
class Address:
    """Where a server is. `path` comes before that of each request."""

    scheme: str
    host: str
    port: int
    path: str = ""

    @classmethod
    def of(cls, url: str) -> "Address":
        """Raises RequestError: it is no http or https address."""
        try:
            parts = urlsplit(url)
            port = parts.port or {"http": 80, "https": 443}[parts.scheme]
            if not parts.hostname or parts.username or parts.query or parts.fragment:
                raise ValueError
        except (ValueError, KeyError):
            raise RequestError(
                f"base_url must be like http://127.0.0.1:8000, got {url!r}."
            ) from None
        return cls(parts.scheme, parts.hostname, port, parts.path.rstrip("/"))

    @property
    def netloc(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.netloc}{self.path}"


class Response:
    """What came back. Made by `request`."""

    def __init__(
        self, head: h11.Response, connection: h11.Connection, reader: asyncio.StreamReader
    ):
        self.status = head.status_code
        self.content_type = dict(head.headers).get(b"content-type", b"").decode("latin-1")
        self._connection, self._reader = connection, reader

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The body, piece by piece, as it arrives.

        Raises:
          ServingError: it ended too early, or is no HTTP.
        """
        while True:
            event = await _next(self._connection, self._reader)
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return

    async def read(self, most: int = 1 << 26) -> bytes:
        """The whole body.

        Raises:
          ServingError: as `pieces`; or it has more than `most` bytes.
        """
        found = bytearray()
        async for piece in self.pieces():
            found += piece
            if len(found) > most:
                raise ServingError(f"the answer has more than {most} bytes")
        return bytes(found)


@asynccontextmanager
async def request(
    address: Address,
    method: str,
    path: str,
    *,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
) -> AsyncGenerator[Response, None]:
    """Sends a request, gives its response, and closes the connection, whatever is left unread.

    Raises:
      ServingError: nobody listens there, or what came back is no HTTP response.
    """
    try:
        secure = address.scheme == "https"
        reader, writer = await asyncio.open_connection(address.host, address.port, ssl=secure)
    except OSError as error:
        raise ServingError(f"cannot connect to {address}: {error}") from error
    try:
        connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MOST_BYTES)
        head = {"Host": address.netloc, "Connection": "close", **(headers or {})}
        if body:
            head |= {"Content-Length": str(len(body))}
        sent = connection.send(
            h11.Request(method=method, target=address.path + path, headers=list(head.items()))
        )
        assert sent is not None
        writer.write(sent + body)
        if body:
            connection.send(h11.Data(data=body))
        connection.send(h11.EndOfMessage())
        while not isinstance(found := await _next(connection, reader), h11.Response):
            if not isinstance(found, h11.InformationalResponse):
                raise ServingError(f"{address} closed the connection without an answer")
        yield Response(found, connection, reader)
    finally:
        # Nobody waits for what is still on its way.
        writer.transport.abort()


async def _next(connection: h11.Connection, reader: asyncio.StreamReader) -> h11.Event:
    try:
        while True:
            event = connection.next_event()
            if event is not h11.NEED_DATA:
                assert isinstance(event, h11.Event)
                return event
            connection.receive_data(await reader.read(_MOST_BYTES))
    except h11.RemoteProtocolError as error:
        raise ServingError(f"the answer is cut short or no HTTP: {error}") from error
    except OSError as error:
        raise ServingError(f"the connection broke: {error}") from error
