"""The processes of a program: each watches that the others live and keep up, and all end together.

What jax does on its own, and what is added. A process that is killed breaks the collectives that
others are in, with an error that names no process; process 0 knows after jax's heartbeat timeout,
and then ends with a stack trace; jax ends the others at once where it is process 0 that has gone.
Here the connections of `qjax.distributed.meeting` break at once, and the processes end with a line
that names the one at fault and how far it got, and exit code 1. Jax's own heartbeats remain behind
that. A process that is stopped, or cut off, breaks no connection: silence says so.
"""

import contextlib
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import jax

from qjax.distributed import meeting
from qjax.distributed.channel import Channel
from qjax.distributed.meeting import Place
from qjax.distributed.replay import Recorder, Replay
from qjax.errors import DistributedError, QjaxError
from qjax.params import Params

# Seconds that jax's own heartbeats are slower than ours, whose message is the clearer one.
_BEHIND = 4
# Seconds that others may take to end, or to be found dead, before this process ends.
_GRACE = 2.0


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    local_device_ids: Sequence[int] | None = None,
    cluster_detection_method: str | None = None,
    coordinator_bind_address: str | None = None,
    initialization_timeout: float = 300,
    heartbeat_timeout: float = 12,
    step_timeout: float = 300,
) -> "Processes":
    """Joins this process to the others; every one of them calls it, before jax does anything else.

    The names are those of `jax.distributed.initialize`, whose detection of clusters is used for
    what is not given. Who can reach process 0's port can join: the network must be a trusted one.

    Args:
      coordinator_address: "host:port": process 0's machine, and a port that is free there.
      num_processes, process_id: how many processes, and which this one is, from 0.
      local_device_ids: which accelerators of this machine are this process's; None for all, or, in
        Slurm and MPI, one for each process.
      cluster_detection_method: "slurm", "ompi", "k8s", "gketpu", "gcetpu", or "mpi4py", which is
        never tried unasked; None for the first that is there.
      coordinator_bind_address: "host:port" that process 0 listens at, where that is not the
        address that others see; None for all interfaces, or only the loopback if that is meant.
      initialization_timeout: seconds until all must have come.
      heartbeat_timeout: seconds of silence after which a process counts as dead.
      step_timeout: seconds that a process may lag behind process 0, compiling included.

    Raises:
      DistributedError: nothing is found, addresses are wrong, or others do not come in time.
    """
    from jax._src import xla_bridge

    if xla_bridge.backends_are_initialized() or jax.distributed.is_initialized():
        raise DistributedError(
            "distributed.initialize must be called once, and before anything else uses jax."
        )
    place = meeting.find_place(
        coordinator_address,
        num_processes,
        process_id,
        None if local_device_ids is None else tuple(local_device_ids),
        cluster_detection_method,
        initialization_timeout,
    )
    host, port = meeting.split_address(place.address)
    bind = coordinator_bind_address or os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
    bind = bind or (place.address if meeting.is_loopback(host) else f"[::]:{port}")
    if place.process_id == 0:
        channels = meeting.gather(place, bind, initialization_timeout, heartbeat_timeout)
    else:
        channels = {0: meeting.join(place, initialization_timeout, heartbeat_timeout)}
    # Its handler takes SIGTERM for a notice to save a training step, and the process lives on.
    jax.config.update("jax_enable_preemption_service", False)
    processes = Processes(place, channels, heartbeat_timeout, step_timeout)
    try:
        jax.distributed.initialize(
            place.address,
            place.num_processes,
            place.process_id,
            local_device_ids=place.local_device_ids,
            cluster_detection_method="deactivate",
            coordinator_bind_address=bind,
            initialization_timeout=int(initialization_timeout),
            heartbeat_timeout_seconds=int(heartbeat_timeout) + _BEHIND,
            shutdown_timeout_seconds=int(heartbeat_timeout),
        )
    except (RuntimeError, ValueError) as error:
        raise DistributedError(f"jax's processes do not come together: {error}") from error
    return processes


class Processes:
    """This process among the others; made by `initialize`, and used in a `with` statement.

    At its end a process waits for the others. Where one fails in between, all end with a message.

    Attributes:
      place: which process this is, of how many.
    """

    def __init__(
        self,
        place: Place,
        channels: dict[int, Channel],
        heartbeat_timeout: float,
        step_timeout: float,
    ):
        self.place = place
        self._channels = channels
        self._heartbeat = heartbeat_timeout
        self._interval = min(1.0, heartbeat_timeout / 4, step_timeout / 4)
        self._step_timeout = step_timeout
        self._changed = threading.Condition()
        self._leaving = False
        self._closed = threading.Event()
        self._ending = threading.Lock()
        self._sent = 0  # calls of engines, by process 0
        self._done = dict.fromkeys(range(place.num_processes), 0)
        self._since = dict.fromkeys(channels, time.monotonic())
        self._ready: set[int] = set()
        self._left: set[int] = set()
        self._calls: queue.SimpleQueue[list[Any] | None] = queue.SimpleQueue()
        for number in channels:
            threading.Thread(target=self._listen, args=(number,), daemon=True).start()
        threading.Thread(target=self._report, daemon=True).start()

    def __str__(self) -> str:
        place = self.place
        return (
            f"process {place.process_id} of {place.num_processes}, "
            f"{len(jax.local_devices())} devices here, {self.num_devices} in all, "
            f"coordinator {place.address} ({place.found_by})"
        )

    @property
    def process_id(self) -> int:
        return self.place.process_id

    @property
    def num_processes(self) -> int:
        return self.place.num_processes

    @property
    def num_devices(self) -> int:
        """Devices of all processes together."""
        return len(jax.devices())

    def lead(self, params: Params) -> bool:
        """Hands the other processes over to process 0; every process calls it, once.

        Process 0 waits for the others and gets True. What its engines of this model do from there
        on, those of `qjax.generate` and `qjax.LLM` too, the others do as well, for as long as its
        `with` statement lasts; then they get False. Its engines must all be used by one thread.
        What uses the weights without an engine (`qjax.forward`, `qjax.save`, perplexity) must be
        called in every process instead, without `lead`.

        Raises:
          DistributedError: another process ended instead; the model is of fewer processes.
        """
        if params.mesh is not None:
            having = {device.process_index for device in params.mesh.devices.flat}
            if missing := set(range(self.num_processes)) - having:
                raise DistributedError(
                    f"the model is split over {params.mesh.devices.size} devices, and none of them "
                    f"is of process {min(missing)}: split it over all {self.num_devices}."
                )
        if self.process_id == 0:
            with self._changed:
                self._changed.wait_for(lambda: self._left or len(self._ready) == len(self._since))
                if self._left:
                    raise DistributedError(
                        f"process {min(self._left)} ended its `with` and did not call lead()."
                    )
            Recorder(params, self._call).start()
            return True
        self._channels[0].send("ready")
        replay = Replay(params)
        with _deaf():
            while (call := self._calls.get()) is not None:
                replay.carry_out(*call)
                self._done[self.process_id] += 1
        return False

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        Recorder.stop()
        if error is not None and not (isinstance(error, SystemExit) and not error.code):
            self._fail(error)
        self._leaving = True
        for channel in self._channels.values():
            with contextlib.suppress(OSError):  # who listens has seen it
                channel.send("bye")
        with self._changed:
            self._changed.wait_for(lambda: len(self._left) == len(self._channels))
        self._closed.set()
        jax.distributed.shutdown()
        for channel in self._channels.values():
            channel.close()

    def _call(self, *call: Any) -> None:
        """Process 0: has all others make a call of an engine."""
        self._sent += 1
        for number, channel in self._channels.items():
            if number in self._left:
                raise DistributedError(f"process {number} ended its `with` before process 0.")
            # Who listens to a broken connection ends this process.
            with contextlib.suppress(OSError):
                channel.send("call", *call)

    def _listen(self, number: int) -> None:
        """What process `number` says, until it has nothing more to say."""
        channel = self._channels[number]
        while True:
            try:
                message = channel.receive(self._heartbeat)
                if message is not None:
                    self._take(number, *message)
                    continue
            except TimeoutError:
                if self._leaving and number in self._left:
                    continue
                self._end(
                    f"{self._name(number)} was not heard of for {self._heartbeat:g} s, and is "
                    f"stopped or cut off{self._progress(number)}"
                )
                continue
            except (ValueError, TypeError) as error:
                self._end(f"{self._name(number)} says what this process does not know: {error}")
            if self._leaving and number in self._left:
                return
            self._end(f"{self._name(number)} died{self._progress(number)}")

    def _take(self, number: int, kind: str, *content: Any) -> None:
        if kind == "call":
            self._calls.put(list(content))
        elif kind == "report":
            (done,) = content
            if done > self._done[number] or done == self._sent:
                self._since[number] = time.monotonic()
            self._done[number] = done
        elif kind == "ready":
            with self._changed:
                self._ready.add(number)
                self._changed.notify_all()
        elif kind == "bye":
            with self._changed:
                self._left.add(number)
                self._changed.notify_all()
            self._calls.put(None)
        elif kind == "end":
            self._end(content[0])
        else:
            raise ValueError(kind)

    def _report(self) -> None:
        """Says again and again that this process lives; in process 0, that the others keep up."""
        while not self._closed.wait(self._interval):
            for channel in self._channels.values():
                with contextlib.suppress(OSError):  # who listens sees it too
                    channel.send("report", self._done[self.process_id])
            if self.process_id > 0:
                continue
            now = time.monotonic()
            late = [
                number
                for number, since in self._since.items()
                if self._done[number] < self._sent and now - since > self._step_timeout
            ]
            if late:
                which = "; ".join(f"{self._name(n)} lags{self._progress(n)}" for n in late)
                self._end(f"no progress within {self._step_timeout:g} s: {which}")

    def _name(self, number: int) -> str:
        return f"process {number} on {self._channels[number].host}"

    def _progress(self, number: int) -> str:
        if number == 0 or not self._sent:
            return ""
        return f", after {self._done[number]} of {self._sent} calls of the engine"

    def _fail(self, error: BaseException) -> NoReturn:
        """Ends all processes because of an error in this one."""
        if isinstance(error, QjaxError | KeyboardInterrupt | SystemExit):
            self._end(str(error) or type(error).__name__, itself=True)
        # An error of a collective means that another one died, which is found meanwhile.
        time.sleep(_GRACE / 2)
        with self._ending:
            traceback.print_exception(error)
        lines = f"{type(error).__name__}: {error}".splitlines()
        self._end(lines[0][:500], itself=True)

    def _end(self, why: str, itself: bool = False) -> NoReturn:
        """Says why, has the others end too, and ends this process as it is.

        Args:
          why: what happened. itself: whether this process failed, rather than another.
        """
        with self._ending:  # the first to know speaks for all; os._exit never lets go
            place = self.place
            who = f"process {place.process_id} of {place.num_processes} on {socket.gethostname()}"
            told = f"{who} failed: {why}" if itself else why
            for channel in self._channels.values():
                with contextlib.suppress(OSError):
                    channel.send("end", told)
            print(f"qjax: {told if itself else f'{who} ends: {why}'}", file=sys.stderr, flush=True)
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            if place.process_id == 0:
                # Jax ends them less gently when its coordinator goes.
                time.sleep(_GRACE / 2)
            os._exit(1)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Leaves signals to stop, which a terminal or a cluster sends to all processes, to process 0:
    it ends what it does in its own way, and the others with it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # other threads get no signals
        return
    before = {each: signal.signal(each, signal.SIG_IGN) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
