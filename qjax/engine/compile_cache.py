"""Compiled programs kept on disk, so that only the first start ever pays for compiling."""

import platform
from hashlib import sha256
from pathlib import Path

from qjax.checkpoint.builtin import cache_folder


def enable() -> None:
    """Turns on jax's persistent compilation cache, unless the user has set one."""
    import jax

    if jax.config.jax_compilation_cache_dir is not None:
        return
    # Machine code of one CPU may not run on another that shares the folder.
    folder = cache_folder() / "xla" / sha256(_cpu().encode()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a read-only home costs start-up time and nothing else
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    # The first processor's model and features; clock rates and the like change all the time.
    wanted = ("model name", "flags", "Features", "CPU part")
    first = lines[: lines.index("")] if "" in lines else lines
    return "\n".join(line for line in first if line.startswith(wanted))
