"""The application behind a socket, until a signal or a failure ends it."""

import asyncio
import logging
import os
import resource
import socket
import ssl
import sys
from ipaddress import ip_address
from types import FrameType
from typing import Any

import h11
import msgspec
from starlette.applications import Starlette
from uvicorn import Config
from uvicorn import Server as Uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from qjax.errors import RequestError
from qjax.server.errors import ApiError
from qjax.server.service import Service

logger = logging.getLogger("qjax.server")

# Of a request's line and headers together.
_MOST_HEAD = 32 << 10
# Seconds within which these must have come; and that a connection may do nothing between requests.
_HEAD_SECONDS = 30.0
_KEEP_ALIVE = 30
# Milliseconds that a peer may leave unread what it was sent, before the connection is given up.
_UNREAD = 60_000
_MOST_FILES = 65_536
# Seconds from the end of the drain until connections are cut.
_LAST = 5


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
      RequestError: there is no such address here, or somebody has the port.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        raise RequestError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD)
    return found


class DrainingServer(Uvicorn):
    """Serves until the first SIGTERM or SIGINT, then drains; a second one ends the process at once.

    Args:
      app: from `qjax.server.app.create_app`.
      drain_seconds: see `Service.drain`.
      tls: uvicorn's `ssl_keyfile`, `ssl_certfile` and `ssl_ca_certs`; with the last one, clients
        must have a certificate that one of these has signed.

    Raises:
      RequestError: the TLS files cannot be read.
    """

    def __init__(self, app: Starlette, drain_seconds: float = 30.0, **tls: Any):
        config = Config(
            app,
            http=Connection,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=_MOST_HEAD,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=_LAST,
            ssl_cert_reqs=ssl.CERT_REQUIRED if tls.get("ssl_ca_certs") else ssl.CERT_NONE,
            **tls,
        )
        try:
            config.load()
        except OSError as error:  # ssl.SSLError is one
            names = ", ".join(str(path) for path in tls.values() if path)
            raise RequestError(f"cannot use {names} for TLS: {error}") from None
        super().__init__(config)
        self.service: Service = app.state.service
        self._drain_seconds = drain_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._told = False

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        ending = asyncio.create_task(self._end())
        await super().serve(sockets)
        ending.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Of uvicorn; called between any two lines of the main thread."""
        if self._told or self._loop is None:
            os._exit(128 + sig)
        self._told = True
        self._loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Begins to end."""
        if self._draining is None:
            seconds = self._drain_seconds
            self._draining = asyncio.ensure_future(self.service.drain(seconds))

    async def _end(self) -> None:
        await self.service.ended.wait()
        self.should_exit = True


class Connection(H11Protocol):
    """uvicorn's, but the head of a request has a deadline, and errors look like all others."""

    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._cancel_head()

    def send_400_response(self, msg: str) -> None:
        """Of uvicorn; where there is no request that could be answered."""
        self._refuse(
            f"the request is no valid HTTP, or its head is longer than {_MOST_HEAD} bytes."
        )

    def _await_head(self) -> None:
        """The deadline stands while a head is coming, from its first bytes or the connection on."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering or self.transport.is_closing():
            self._cancel_head()
        elif self._head is None:
            self._head = self.loop.call_later(_HEAD_SECONDS, self._late)

    def _cancel_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _late(self) -> None:
        self._head = None
        if not self.transport.is_closing():
            self._refuse(f"the request's head must arrive within {_HEAD_SECONDS:g} seconds.", 408)

    def _refuse(self, message: str, status: int = 400) -> None:
        body = msgspec.json.encode(ApiError(status, message).body)
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
        }
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # or an answer is on its way
            response = h11.Response(status_code=status, headers=list(headers.items()))
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def serve(app: Starlette, host: str, port: int, drain_seconds: float, **tls: Any) -> None:
    """Serves an application of `create_app`, from a port of its own until it is told to end.

    Args:
      host, port: see `bind`.
      drain_seconds, tls: see `DrainingServer`.

    Raises:
      RequestError: it cannot listen there.
      BaseException: what the model could not be loaded for, or the engine failed of.
    """
    _allow_connections()
    server = DrainingServer(app, drain_seconds, **tls)
    listener = bind(host, port)
    service, address = server.service, listener.getsockname()
    scheme = "https" if tls.get("ssl_certfile") else "http"
    shown = f"[{address[0]}]" if listener.family is socket.AF_INET6 else address[0]
    logger.info("listening", extra={"address": f"{scheme}://{shown}:{address[1]}"})
    if not service.settings.api_keys and not ip_address(address[0]).is_loopback:
        logger.warning("others can reach this server, and no --api-key guards it")
    server.run([listener])
    if service.error is not None:
        raise service.error
    if service.loading:
        # Its thread may be deep inside of the compiler, which does not end well with Python.
        sys.stderr.flush()
        os._exit(0)


def _allow_connections() -> None:
    """As many open connections as the system lets this process have: often 1,024 unless asked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
