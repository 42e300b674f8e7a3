"""What a server takes: its process as Linux sees it, and its cache as its own metrics tell."""

import asyncio
import ipaddress
import os
import re
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from soak_requests import post

from qjax.bench.serving.client import Server
from qjax.errors import RequestError, ServingError

_LISTENING = "0A"


def check_loopback(server: Server) -> None:
    """Raises RequestError: the server is not on this machine, and no soak is asked of others."""
    host, port = server.address.host, server.address.port
    try:
        found = {each[4][0] for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise RequestError(f"url: {host} is unknown: {error}") from error
    if not all(ipaddress.ip_address(str(each)).is_loopback for each in found):
        raise RequestError(f"url must be a loopback address, such as 127.0.0.1, got {host}.")


@dataclass(frozen=True)
class Process:
    """A process by its id and the time that it started, so that no other is taken for it."""

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int, port: int) -> "Process":
        """Raises RequestError: there is none, or it does not listen at this port."""
        try:
            sockets = set(_open_files(pid))
            started = _stat(pid)[19]
        except OSError as error:
            raise RequestError(f"pid: there is no process {pid} to look at: {error}") from error
        lines = [
            line.split()
            for name in ("tcp", "tcp6")
            if (table := Path(f"/proc/net/{name}")).exists()
            for line in table.read_text().splitlines()[1:]
        ]
        listening = {
            f"socket:[{line[9]}]"
            for line in lines
            if line[3] == _LISTENING and int(line[1].rpartition(":")[2], 16) == port
        }
        if not listening & sockets:
            raise RequestError(f"pid: process {pid} does not listen at port {port}.")
        return cls(pid, started)

    @property
    def alive(self) -> bool:
        try:
            fields = _stat(self.pid)
        except OSError:
            return False
        return fields[19] == self.started and fields[0] not in "ZX"

    def resident(self) -> int:
        """Bytes of memory; 0 where it has ended."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return 0
        found = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
        return int(found[1]) * 1024 if found else 0

    def open_files(self) -> int:
        try:
            return len(_open_files(self.pid))
        except OSError:
            return 0


def _open_files(pid: int) -> list[str]:
    """What a process has open, or had a moment ago."""
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.append(os.readlink(path))
    return found


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, which may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


@dataclass(frozen=True)
class Load:
    """What the server's own metrics say of its load.

    Attributes:
      cache_usage: of the pages of its cache, the share that requests hold.
    """

    running: float
    waiting: float
    cache_usage: float

    @property
    def idle(self) -> bool:
        return self.running == self.waiting == 0


async def load_of(server: Server) -> Load:
    """Raises ServingError: the server tells no such metrics."""
    status, body = await post(server, "/metrics", b"", "GET")
    if status != 200:
        raise ServingError(f"/metrics answers {status}")
    return parse_load(body.decode())


def parse_load(text: str) -> Load:
    """The load in metrics of Prometheus's text form, whatever stands before the names' colon."""

    def value(name: str) -> float:
        found = re.findall(rf"^\w+:{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
        if not found:
            raise ServingError(f"/metrics does not tell {name}")
        return sum(map(float, found))

    return Load(
        *map(value, ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"))
    )


async def idle_load(server: Server, seconds: float) -> Load:
    """The load as soon as nothing runs or waits, or as it is after some seconds."""
    deadline = time.monotonic() + seconds
    while not (found := await load_of(server)).idle and time.monotonic() < deadline:
        await asyncio.sleep(0.2)
    return found


@dataclass
class Watch:
    """Looks at a process every so often."""

    process: Process
    seconds: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)

    async def run(self, interval: float, on_look: Callable[[], object] = lambda: None) -> None:
        start = time.monotonic()
        while self.process.alive:
            self.seconds.append(time.monotonic() - start)
            self.resident.append(self.process.resident())
            on_look()
            await asyncio.sleep(interval)


def growth(resident: Sequence[int], warm_up: float = 0.2, part: float = 0.1) -> float:
    """How much larger memory is at the end than after the warm-up, as a fraction.

    Args:
      resident: bytes, at equal times.
      warm_up: share of the samples that comes before.
      part: share of the others whose medians stand for the beginning and the end, so that what is
        only held while a large request is refused does not count.
    """
    after = resident[int(len(resident) * warm_up) :]
    count = max(1, int(len(after) * part))
    return statistics.median(after[-count:]) / statistics.median(after[:count]) - 1
