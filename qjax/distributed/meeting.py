"""How processes find each other, before jax does.

Process 0 listens where jax's coordinator will listen later, until all have come. Jax itself ends a
process that cannot reach the others with a stack trace; here it is an error that says who is
missing, or whose arguments differ. The connections stay, and tell at once of a process that dies.
"""

import contextlib
import ipaddress
import os
import socket
import sys
import time
from dataclasses import dataclass
from importlib import metadata

from qjax.distributed.channel import Channel
from qjax.errors import DistributedError

# Other versions may compile other programs, whose collectives would wait for each other.
VERSIONS = " with ".join(f"{name} {metadata.version(name)}" for name in ("jax", "jaxlib"))
# Seconds to send a line of introduction; what else may knock at an open port sends none.
_INTRODUCTION = 5.0


@dataclass(frozen=True)
class Place:
    """Where a process stands among the others.

    Attributes:
      address: "host:port" where process 0 is, as the others see it.
      num_processes, process_id: how many there are, and which this one is.
      local_device_ids: which of this machine's accelerators are its own; None for all.
      found_by: what said so: "arguments", or the name of a kind of cluster.
    """

    address: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None
    found_by: str


def find_place(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    local_device_ids: tuple[int, ...] | None,
    cluster: str | None,
    timeout: float,
) -> Place:
    """What the caller did not say comes from the cluster that this process runs in, by jax's own
    detection: Open MPI, Slurm, TPU pods (GKE or Google Cloud), Kubernetes; mpi4py by name only.

    Raises:
      DistributedError: nothing is found, or something does not fit.
    """
    from jax._src.clusters import ClusterEnv

    given = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    found_by = "arguments"
    if local_device_ids is None and (named := os.environ.get("JAX_LOCAL_DEVICE_IDS")):
        local_device_ids = tuple(int(each) for each in named.split(","))
    values = given, num_processes, process_id, local_device_ids
    if None in values[:3]:
        kinds = {kind.name: kind for kind in ClusterEnv._cluster_types}
        if cluster is not None and cluster not in kinds:
            raise DistributedError(
                f"unknown kind of cluster {cluster!r}: known are {', '.join(sorted(kinds))}."
            )
        candidates = [kind for kind in kinds.values() if not kind.opt_in_only_method]
        if cluster is not None:
            candidates = [kinds[cluster]]
        try:
            found = next((kind for kind in candidates if kind.is_env_present()), None)
            if found is not None:
                found_by = found.name
                values = ClusterEnv.auto_detect_unset_distributed_params(
                    *values, cluster_detection_method=cluster, initialization_timeout=int(timeout)
                )
        except Exception as error:  # jax and the cluster's libraries raise many kinds
            raise DistributedError(
                f"the cluster does not tell who this process is: {error}"
            ) from error
        if found is None:
            raise DistributedError(
                "this process is in no cluster that jax knows (looked for: "
                f"{', '.join(kind.name for kind in candidates)}): give coordinator_address "
                "(host:port of process 0), num_processes and process_id."
            )
    address, count, number, devices = values
    if address is None or count is None or number is None:
        raise DistributedError(
            f"{found_by} does not say all of coordinator_address ({address}), num_processes "
            f"({count}) and process_id ({number}): give what is missing."
        )
    split_address(address)
    if not 0 <= number < count:
        raise DistributedError(f"process_id must be in [0, {count}), got {number}.")
    return Place(address, count, number, None if devices is None else tuple(devices), found_by)


def split_address(address: str) -> tuple[str, int]:
    """("host", port) of "host:port"; an IPv6 address stands in brackets."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise DistributedError(f"coordinator_address must be host:port, got {address!r}.")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def gather(place: Place, bind: str, timeout: float, patience: float) -> dict[int, Channel]:
    """Process 0: waits for all others. Returns a channel to each, by its process_id.

    Args:
      bind: "host:port" to listen at; host "::" is every interface.
      timeout: seconds until all must be here. patience: of the channels.
    """
    deadline = time.monotonic() + timeout
    notice = Notice()
    channels: dict[int, Channel] = {}
    with _listen(*split_address(bind)) as server:
        while len(channels) < place.num_processes - 1:
            missing = sorted(set(range(1, place.num_processes)) - set(channels))
            who = f"process {', '.join(map(str, missing))} of {place.num_processes}"
            left = deadline - time.monotonic()
            if left <= 0:
                why = f"{who} did not come to {place.address} within {timeout:g} s."
                raise DistributedError(_refuse(channels, why))
            server.settimeout(min(left, Notice.AFTER))
            try:
                channel = Channel(server.accept()[0], patience)
            except TimeoutError:
                notice.give(f"waiting at {place.address} for {who}")
                continue
            try:
                introduction = channel.receive(_INTRODUCTION, limit=1000) or []
                name, number, count, channel.host, versions = introduction
            except (TimeoutError, ValueError):
                name, number, count, versions = None, 0, 0, ""
            if name != "qjax":
                channel.close()  # not one of us
            elif count != place.num_processes or not 0 < number < count:
                why = (
                    f"a process says that it is {number} of {count}, but process 0 was told that "
                    f"there are {place.num_processes}: num_processes must be the same in all."
                )
                raise DistributedError(_refuse({**channels, -1: channel}, why))
            elif number in channels:
                why = f"two processes say that they are process {number} of {count}."
                raise DistributedError(_refuse({**channels, -1: channel}, why))
            elif versions != VERSIONS:
                why = f"process {number} has {versions}, and process 0 {VERSIONS}."
                raise DistributedError(_refuse({**channels, -1: channel}, why))
            else:
                channels[number] = channel
    for channel in channels.values():
        channel.send("welcome", socket.gethostname())
    return channels


def join(place: Place, timeout: float, patience: float) -> Channel:
    """Any other process: goes to process 0 and waits until all are there."""
    deadline = time.monotonic() + timeout
    notice = Notice()
    where = f"process 0 at {place.address}"
    problem: Exception | str = "it does not answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection(split_address(place.address), left)
        except OSError as error:
            problem = error
            notice.give(f"waiting for {where}: {error}")
            time.sleep(min(0.1, left))
            continue
        channel = Channel(connection, patience)
        try:
            who = place.process_id, place.num_processes, socket.gethostname(), VERSIONS
            channel.send("qjax", *who)
            # Process 0 waits as long, and may have begun later.
            answer = channel.receive(2 * timeout)
        except (OSError, ValueError) as error:
            channel.close()
            raise DistributedError(f"{where} does not answer as qjax does: {error}") from None
        if answer is not None and answer[0] == "welcome":
            channel.host = answer[1]
            return channel
        channel.close()
        why = f"{where} ended before all were there." if answer is None else str(answer[-1])
        raise DistributedError(why)
    raise DistributedError(f"cannot reach {where} within {timeout:g} s: {problem}")


class Notice:
    """A line on standard error for who wonders why nothing happens; once, and not at once."""

    AFTER = 10.0  # seconds

    def __init__(self):
        self._due: float | None = time.monotonic() + self.AFTER

    def give(self, text: str) -> None:
        if self._due is not None and time.monotonic() >= self._due:
            print(f"qjax: {text}", file=sys.stderr, flush=True)
            self._due = None


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if host == "::" and not socket.has_dualstack_ipv6():
        host, family = "0.0.0.0", socket.AF_INET
    try:
        return socket.create_server(
            (host, port), family=family, backlog=1024, dualstack_ipv6=host == "::"
        )
    except OSError as error:
        raise DistributedError(
            f"process 0 cannot listen at {host} port {port}: {error}. The host of "
            "coordinator_address must be this machine, and the port free."
        ) from None


def _refuse(channels: dict[int, Channel], why: str) -> str:
    for channel in channels.values():
        with contextlib.suppress(OSError):
            channel.send("refused", why)
        channel.close()
    return why
