"""Compiled programs kept on disk, so that only the first start ever pays for compiling.

Jax's own persistent cache saves compiling, but the program must be traced before it can be looked
up, which takes longer than all else at a start. So the engine's steps are also kept whole, under a
key that is known without tracing: everything that the trace depends on.
"""

import contextlib
import os
import platform
import shutil
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import tuning
from pallas_kernels.user_cache import cache_folder

# Each version of the code has a folder of its own; so many of them are kept.
MAX_VERSIONS = 8

_FOLDER = "jax_compilation_cache_dir"


def enable() -> None:
    """Turns on jax's persistent compilation cache, unless the user has set one."""
    if jax.config.values[_FOLDER]:
        return
    folder = cache_folder() / "xla" / _version()
    try:
        if not folder.exists():
            folder.mkdir(parents=True)
            _forget_old(folder.parent)
    except OSError:
        return  # a read-only home costs start-up time and nothing else
    jax.config.update(_FOLDER, str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def load_or_compile(
    key: str, arguments: Any, results: Any, compile_it: Callable[[], jax.stages.Compiled]
) -> jax.stages.Compiled:
    """A compiled program from disk, or compiled now and then put there.

    Args:
      key: tells programs of the same code apart.
      arguments: a pytree with the structure of (args, kwargs). results: of what it returns.
      compile_it: compiles the program.
    """
    base = jax.config.values[_FOLDER]
    if not base or jax.default_backend() != "cpu":
        return compile_it()
    from jax.experimental import serialize_executable

    path = Path(base) / "steps" / _version() / _digest(f"{key} {tuning.version()}")
    structures = jax.tree.structure(arguments), jax.tree.structure(results)
    devices = sorted(jax.device_put(0).devices(), key=lambda device: device.id)
    # A file that is not there, damaged, or that this version of jax cannot read, is made anew.
    with contextlib.suppress(Exception):
        return serialize_executable.deserialize_and_load(
            path.read_bytes(), *structures, execution_devices=devices
        )
    _found.any = False
    compiled = compile_it()
    if _found.any:
        # What jax has loaded from its own cache works, but XLA cannot write it out a second time:
        # the copy would lack its functions.
        return compiled
    payload, *made = serialize_executable.serialize(compiled)
    assert tuple(made) == structures, "results do not have the structure that was foretold"
    # A full or read-only disk costs start-up time and nothing else.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, payload)
    return compiled


# Whether jax found a program in its own cache, on this thread.
_found = threading.local()


def _listen(event: str, **_: Any) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _found.any = True


jax.monitoring.register_event_listener(_listen)


@cache
def _version() -> str:
    """Everything that a traced step depends on beside its arguments, this CPU included: machine
    code made on one may not run on another that shares the folder."""
    root = Path(__file__).parents[2]
    files = [
        (str(file.relative_to(root)), file.stat().st_size, file.stat().st_mtime_ns)
        for package in ("qjax", "pallas_kernels")
        for file in sorted((root / package).rglob("*"))
        if file.suffix in (".py", ".so", ".dylib")
    ]
    libraries = [(name, metadata.version(name)) for name in ("jax", "jaxlib", "flax", "numpy")]
    flags = sorted((k, v) for k, v in os.environ.items() if k.startswith(("JAX_", "XLA_", "QJAX_")))
    settings = sorted((name, str(value)) for name, value in jax.config.values.items())
    # Where programs are kept changes nothing in them.
    told = [item for item in flags + settings if "cache" not in item[0].lower()]
    return _digest(repr((files, libraries, told, _cpu())))


def _cpu() -> str:
    """The first processor's model and features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    first = lines[: lines.index("")] if "" in lines else lines
    # Not all lines: clock rates and the like change all the time.
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(line for line in first if line.startswith(wanted))


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:32]


def _write(path: Path, data: bytes) -> None:
    """Writes a file that is there whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(data)
            file.close()
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise


def _forget_old(parent: Path) -> None:
    newest_first = sorted(parent.iterdir(), key=lambda folder: -folder.stat().st_mtime)
    for folder in newest_first[MAX_VERSIONS:]:
        shutil.rmtree(folder, ignore_errors=True)
