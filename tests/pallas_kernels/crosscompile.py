"""Compiles programs for devices that are not here, with the compilers that their makers ship.

    python -m tests.pallas_kernels.crosscompile h100 tests.pallas_kernels.triton_programs

compiles what `programs()` of that module yields, and prints a line of JSON for each: its name, and
what the compiler said against it or null. It needs jax[cuda13] or jax[tpu], and no GPU or TPU.
Compilers may end the process they are in, so that tests call `compile_all`, which starts one.

`h100.txtpb` describes an H100 for XLA (openxla/xla#25919, with a runtime version).
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies

from pallas_kernels import dispatch, platform

ROOT = Path(__file__).resolve().parents[2]
# Kind and name of the device for `pallas_kernels.platform`, and what jax calls the topology.
TARGETS = {
    "h100": ("gpu", "NVIDIA H100 80GB HBM3", "h100"),
    "v5e": ("tpu", "TPU v5 lite", "v5e:2x2"),
    "v5p": ("tpu", "TPU v5", "v5p:2x2x1"),
    "v6e": ("tpu", "TPU v6 lite", "v6e:2x2"),
    "tpu7x": ("tpu", "TPU7x", "tpu7x:2x2x1"),
}
# What jax and the plugins of devices read when they are first used.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # side by side with others that only compile
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",
}


class Program(NamedTuple):
    """A function to compile.

    Attributes:
      arguments: trees of jax.ShapeDtypeStruct.
      formats: gives their jax.experimental.layout.Format, and that of the results, as prefixes of
        their trees, from where all of them lie; None leaves it to the compiler.
      donated: which arguments the results take the place of.
      verdict: what is wrong with it, once it is compiled, or None.
      devices: how many it is for.
      on: of several: gives from them a jitted function with its arguments, static ones by name,
        instead of `function` and `arguments`.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    formats: Callable[[Any], tuple[Any, Any]] | None = None
    donated: tuple[int, ...] = ()
    verdict: Callable[[Any], str | None] = lambda _: None
    devices: int = 1
    on: Callable[[list[Any]], tuple[Any, tuple[Any, ...], dict[str, Any]]] | None = None


def compile_all(target: str, module: str, timeout: float = 900) -> dict[str, str | None]:
    """What the compiler said against each of the `programs()` of a module, or None, by name.

    The one at which the process ended has the end of its messages; those behind it are missing.
    """
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, target, module]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    found = {line["name"]: line["error"] for line in lines}
    if run.returncode:
        last = next((name for name, error in found.items() if error == "begun"), "start")
        found[last] = f"the process ended with {run.returncode}: {run.stderr[-2000:]}"
    return found


def lowered(target: str, function: Callable[..., Any], *arguments: Any, **rest: Any) -> str:
    """The text of a function, jitted or not, as it is lowered for a target."""
    kind = TARGETS[target][0]
    with dispatch.use(None), assumed(target):
        traced = jax.jit(function).trace(*arguments, **rest)
        return traced.lower(lowering_platforms=("cuda" if kind == "gpu" else kind,)).as_text()


def check_all(target: str, module: ModuleType) -> None:
    """Compiles all programs of a module, none of which may fail or be missing."""
    found = compile_all(target, module.__name__)
    assert found == {program.name: None for program in module.programs()}


@contextmanager
def assumed(target: str, mesh: Any = None) -> Iterator[None]:
    """Kernels, and jax's own lowering of them, are traced as for a device of this target."""
    kind, name, _ = TARGETS[target]
    if mesh is None:
        device = jax.sharding.AbstractDevice(name, None, kind)
        axis = jax.sharding.AxisType.Auto
        abstract = jax.sharding.AbstractMesh(
            (1,), ("x",), axis_types=(axis,), abstract_device=device
        )
    else:
        abstract = mesh.abstract_mesh
    with platform.assume(kind, name), jax.sharding.use_abstract_mesh(abstract):
        yield


def _devices(target: str, count: int) -> list[Any]:
    """So many devices of a target."""
    kind, _, topology = TARGETS[target]
    if kind == "gpu":
        config = (Path(__file__).parent / f"{target}.txtpb").read_text()
        found = topologies.get_topology_desc(
            platform="cuda", topology_name=topology, topology=f"1x1x{count}", target_config=config
        )
    else:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return list(found.devices[:count])


def _main(target: str, module: str) -> None:
    kind, name, _ = TARGETS[target]
    axis = jax.sharding.AxisType.Auto
    mesh = jax.sharding.Mesh(np.array(_devices(target, 1)), ("x",), axis_types=(axis,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def placed(struct: Any) -> Any:
        return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=everywhere)

    for program in importlib.import_module(module).programs():
        _tell(program.name, "begun")
        arguments = jax.tree.map(placed, program.arguments)
        try:
            with assumed(target, mesh) if program.on is None else platform.assume(kind, name):
                inputs, outputs = (program.formats or (lambda _: (None, None)))(everywhere)
                function = jax.jit(
                    program.function,
                    in_shardings=inputs,
                    out_shardings=outputs,
                    donate_argnums=program.donated,
                )
                static = {}
                if program.on is not None:
                    function, arguments, static = program.on(_devices(target, program.devices))
                lowered = function.trace(*arguments, **static).lower(
                    lowering_platforms=("cuda" if kind == "gpu" else kind,)
                )
                compiled = lowered.compile()
        except Exception as error:
            _tell(program.name, f"{type(error).__name__}: {error}"[:2000])
        else:
            _tell(program.name, program.verdict(compiled))


def _tell(name: str, error: str | None) -> None:
    print(json.dumps({"name": name, "error": error}), flush=True)


if __name__ == "__main__":
    os.environ |= ENVIRONMENT
    _main(*sys.argv[1:])
