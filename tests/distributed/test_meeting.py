"""How processes find each other, with threads in place of processes."""

import contextlib
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from qjax.distributed import meeting
from qjax.distributed.channel import Channel
from qjax.distributed.meeting import Place
from qjax.errors import DistributedError


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def place(port: int, count: int, number: int) -> Place:
    return Place(f"127.0.0.1:{port}", count, number, None, "arguments")


def gather(pool: ThreadPoolExecutor, port: int, count: int, timeout: float = 10) -> Future:
    there = place(port, count, 0)
    return pool.submit(meeting.gather, there, there.address, timeout, 5.0)


def join(pool: ThreadPoolExecutor, port: int, count: int, number: int) -> Future:
    return pool.submit(meeting.join, place(port, count, number), 10.0, 5.0)


def reach(port: int) -> socket.socket:
    """A connection to a process 0 that may not listen yet."""
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port), 5)


def test_all_meet_and_talk(pool: ThreadPoolExecutor) -> None:
    port = free_port()
    others = {number: join(pool, port, 3, number) for number in (1, 2)}  # before process 0
    channels = gather(pool, port, 3).result()
    assert sorted(channels) == [1, 2]
    assert channels[1].host == socket.gethostname()
    for number, other in others.items():
        channels[number].send("call", {"n": number})
        assert other.result().receive(5) == ["call", {"n": number}]
        other.result().close()
        assert channels[number].receive(5) is None
        channels[number].close()


def test_who_does_not_come_is_named_everywhere(pool: ThreadPoolExecutor) -> None:
    port = free_port()
    first = gather(pool, port, 4, timeout=0.5)
    second = join(pool, port, 4, 1)
    for each in (first, second):
        with pytest.raises(DistributedError, match=r"process 2, 3 of 4 did not come .* 0\.5 s"):
            each.result()


def test_who_waits_long_is_told_why(pool: ThreadPoolExecutor, monkeypatch, capsys) -> None:
    monkeypatch.setattr(meeting.Notice, "AFTER", 0.1)
    port = free_port()

    def next_line() -> str:
        deadline, said = time.monotonic() + 20, ""
        while not (said := said + capsys.readouterr().err).endswith("\n"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return said

    here = f"127.0.0.1:{port}"
    second = join(pool, port, 3, 2)
    assert re.match(rf"qjax: waiting for process 0 at {here}: .* refused\n$", next_line())
    first = gather(pool, port, 3)
    assert next_line() == f"qjax: waiting at {here} for process 1 of 3\n"
    third = join(pool, port, 3, 1)
    for channel in (*first.result().values(), second.result(), third.result()):
        channel.close()


def test_different_counts_and_equal_numbers_are_refused(pool: ThreadPoolExecutor) -> None:
    port = free_port()
    first, second = gather(pool, port, 2), join(pool, port, 3, 2)
    for each in (first, second):
        with pytest.raises(DistributedError, match=r"2 of 3, but process 0 was told .* 2"):
            each.result()
    port = free_port()
    first, second, third = gather(pool, port, 3), join(pool, port, 3, 1), join(pool, port, 3, 1)
    for each in (first, second, third):
        with pytest.raises(DistributedError, match="two processes say that they are process 1"):
            each.result()


def test_different_versions_are_refused(pool: ThreadPoolExecutor) -> None:
    port = free_port()
    first = gather(pool, port, 2)
    with reach(port) as other:
        other.sendall(b'["qjax", 1, 2, "there", "jax 0.1"]\n')
        with pytest.raises(DistributedError, match=r"1 has jax 0\.1, and process 0 jax \d.*jaxlib"):
            first.result()
        assert b'"refused","process 1 has jax 0.1' in other.recv(1000)


def test_strangers_are_sent_away(pool: ThreadPoolExecutor) -> None:
    port = free_port()
    first = gather(pool, port, 2)
    for text in (b"GET / HTTP/1.1\r\n\r\n", b"[1, 2]\n", b"", b"x" * 100_000):
        with (
            reach(port) as stranger,
            contextlib.suppress(OSError),
        ):  # it is sent away before it is done
            stranger.sendall(text)
            stranger.shutdown(socket.SHUT_WR)
    second = join(pool, port, 2, 1)
    assert list(first.result()) == [1]
    first.result()[1].close()
    second.result().close()


def test_addresses_that_lead_nowhere() -> None:
    with pytest.raises(DistributedError, match=r"cannot reach process 0 at .* 0\.3 s: .*refused"):
        meeting.join(place(free_port(), 2, 1), 0.3, 5.0)
    nowhere = Place("no-such-host.invalid:1234", 2, 1, None, "arguments")
    with pytest.raises(DistributedError, match=r"no-such-host\.invalid:1234 within 0\.3 s"):
        meeting.join(nowhere, 0.3, 5.0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        there = place(taken.getsockname()[1], 2, 0)
        with pytest.raises(
            DistributedError, match=r"cannot listen at 127\.0\.0\.1 .* the port free"
        ):
            meeting.gather(there, there.address, 1.0, 5.0)


@pytest.mark.parametrize("address", ["host", "host:", ":80", "host:http", "host:70000"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(DistributedError, match="must be host:port"):
        meeting.find_place(address, 2, 1, None, None, 1)


def test_arguments_and_ranges() -> None:
    found = meeting.find_place("[::1]:80", 2, 1, (0, 1), None, 1)
    assert found == Place("[::1]:80", 2, 1, (0, 1), "arguments")
    assert meeting.split_address(found.address) == ("::1", 80)
    assert meeting.is_loopback("::1")
    assert meeting.is_loopback("localhost")
    assert not meeting.is_loopback("10.0.0.1")
    with pytest.raises(DistributedError, match=r"process_id must be in \[0, 2\), got 2"):
        meeting.find_place("a:80", 2, 2, None, None, 1)


# What the launchers set, after their manuals.
SLURM = {
    "SLURM_JOB_ID": "4096",
    "SLURM_STEP_NODELIST": "gpu[03,07-09]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.1.2.3,10.9.9.9:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


@pytest.mark.parametrize(
    ("variables", "kind", "host"), [(SLURM, "slurm", "gpu03"), (OPEN_MPI, "ompi", "10.1.2.3")]
)
def test_clusters(monkeypatch, variables: dict[str, str], kind: str, host: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "1234")
    found = meeting.find_place(None, None, None, None, None, 1)
    assert found == Place(f"{host}:1234", 4, 2, (1,), kind)
    # What is said goes first.
    assert meeting.find_place("a:80", None, None, None, None, 1).address == "a:80"


def test_no_cluster(monkeypatch) -> None:
    with pytest.raises(DistributedError, match=r"in no cluster that jax knows .*slurm.* give"):
        meeting.find_place(None, None, None, None, None, 1)
    with pytest.raises(DistributedError, match="looked for: slurm"):
        meeting.find_place(None, None, None, None, "slurm", 1)
    with pytest.raises(DistributedError, match=r"unknown kind of cluster 'pbs': known are .*slurm"):
        meeting.find_place(None, None, None, None, "pbs", 1)
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "nonsense")
    with pytest.raises(
        DistributedError, match="does not tell who this process is: invalid literal"
    ):
        meeting.find_place(None, 2, 1, None, None, 1)


def pair() -> tuple[Channel, Channel]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        return Channel(one, 0.2), Channel(server.accept()[0], 0.2)


def test_messages_of_any_size_come_whole(pool: ThreadPoolExecutor) -> None:
    one, other = pair()
    long = list(range(200_000))
    sent = pool.submit(lambda: (one.send("a", long), one.send("b")))
    assert other.receive(5) == ["a", long]
    assert other.receive(5) == ["b"]
    sent.result()
    with pytest.raises(TimeoutError):
        other.receive(0.01)
    one.close()
    assert other.receive(5) is None
    other.close()


def test_messages_that_are_none() -> None:
    for text in (b"{}\n", b"[]\n", b"\xff\n", b"[1,\n", b"x" * 5000):
        one, other = pair()
        one._connection.sendall(text)
        with pytest.raises(ValueError):
            other.receive(5, limit=1000)
        one.close()
        other.close()


def test_what_is_not_taken_is_an_error() -> None:
    one, other = pair()
    with pytest.raises(TimeoutError):
        one.send("x" * 50_000_000)
    one.close()
    other.close()
