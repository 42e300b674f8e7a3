"""A command that several processes run together: its options, and its standard output."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from qjax.distributed import Processes

PANEL = "Several devices and processes"

TensorParallelSize = Annotated[
    int | None,
    typer.Option(
        "--tensor-parallel-size",
        "-tp",
        help="Devices to split the model over; of several processes all, otherwise one.",
        min=1,
        rich_help_panel=PANEL,
    ),
]
EnableExpertParallel = Annotated[
    bool,
    typer.Option(
        "--enable-expert-parallel",
        help="Give each of these devices whole experts, not a part of each.",
        rich_help_panel=PANEL,
    ),
]
AllReduce = Annotated[
    str,
    typer.Option(
        "--all-reduce",
        help="What these devices send of their sums: float32, bfloat16, int8 or fp8_e4m3.",
        rich_help_panel=PANEL,
    ),
]
Distributed = Annotated[
    bool,
    typer.Option(
        "--distributed",
        help="Join the other processes of this Slurm, Kubernetes, TPU or Open MPI job.",
        rich_help_panel=PANEL,
    ),
]
CoordinatorAddress = Annotated[
    str | None,
    typer.Option("--coordinator-address", help="host:port of process 0.", rich_help_panel=PANEL),
]
NumProcesses = Annotated[
    int | None, typer.Option("--num-processes", help="How many processes.", rich_help_panel=PANEL)
]
ProcessId = Annotated[
    int | None,
    typer.Option("--process-id", help="Which of them this one is.", rich_help_panel=PANEL),
]


@contextlib.contextmanager
def joined(
    distributed: bool,
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
) -> Iterator["Processes | None"]:
    """The processes of a command that runs in several, of which each says what it found; None
    where nothing asks for that."""
    given = coordinator_address, num_processes, process_id
    if not distributed and all(value is None for value in given):
        yield None
        return
    from qjax import distributed as together

    with _own_stdout(), together.initialize(*given) as processes:
        print(f"qjax: {processes}", file=sys.stderr, flush=True)
        if processes.process_id > 0:
            os.environ["TQDM_DISABLE"] = "1"  # one bar for all
        yield processes


def mesh_of(
    processes: "Processes | None",
    tensor_parallel_size: int | None,
    expert_parallel: bool,
    data_parallel_size: int = 1,
) -> "Mesh | None":
    """The mesh that the options ask for; None for one device.

    Raises ShardingError where there are not so many devices, or a process would have none.
    """
    several = tensor_parallel_size is not None or expert_parallel or data_parallel_size > 1
    if processes is None and not several:
        return None
    import jax

    from qjax.errors import ShardingError
    from qjax.sharding import make_mesh

    size = tensor_parallel_size or (1 if processes is None else len(jax.devices()))
    sizes = (1, size) if expert_parallel else (size, 1)
    mesh = make_mesh(sizes[0], expert=sizes[1], data=data_parallel_size)
    missing = set(range(jax.process_count())) - {d.process_index for d in mesh.devices.flat}
    if missing:
        raise ShardingError(
            f"{size} of {len(jax.devices())} devices leave none of process {min(missing)}: "
            "leave out --tensor-parallel-size to take all."
        )
    return mesh


@contextlib.contextmanager
def _own_stdout() -> Iterator[None]:
    """Keeps what libraries print to file descriptor 1, as they connect, out of our output."""
    sys.stdout.flush()
    ours, python = os.dup(1), sys.stdout
    os.dup2(2, 1)
    try:
        with os.fdopen(ours, "w") as sys.stdout:
            yield
            sys.stdout.flush()
            os.dup2(ours, 1)
    finally:
        sys.stdout = python
