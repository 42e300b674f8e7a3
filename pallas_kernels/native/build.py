"""Compiles the CPU kernels: one shared library for each instruction set, chosen at run time.

Separate libraries keep code for one instruction set from being linked into another. Nothing but
a C++17 compiler (g++ or clang++) and the headers that come with jaxlib is needed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = ("ffi.cc", "pack.cc", "pool.cc")
_VNNI = ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq",
         "-mavx512vnni", "-mprefer-vector-width=512")  # fmt: skip
# Best first: the loader takes the first that the processor supports.
ISAS: dict[str, tuple[str, ...]] = {
    "avx512bf16": (*_VNNI, "-mavx512bf16", "-mavx512vbmi"),
    "avx512vnni": _VNNI,
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "portable": (),
}


def isas() -> tuple[str, ...]:
    """The instruction sets that this kind of processor may have."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return tuple(ISAS) if x86 else ("portable",)


def library_name(isa: str) -> str:
    return f"libqjax_{isa}.so"


def find_compiler() -> str | None:
    """$CXX, c++, g++ or clang++: the first that exists."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    return None


def digest() -> str:
    """Of the C++ sources that lie here: a library carries that of those it was built from."""
    found = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.[ch]*")):
        if file.suffix in (".cc", ".h"):
            found.update(file.read_bytes())
    return found.hexdigest()[:16]


def build(output_dir: Path, force: bool = False) -> list[Path]:
    """Compiles every library into `output_dir` and returns their paths.

    Up-to-date libraries are kept unless `force`. Raises FileNotFoundError where no compiler is
    found, and RuntimeError with the compiler's messages where it fails.
    """
    from jax import ffi

    compiler = find_compiler()
    if compiler is None:
        raise FileNotFoundError("no C++17 compiler found: install g++ or clang++, or set CXX")
    here = Path(__file__).parent
    newest = max(p.stat().st_mtime for p in here.iterdir() if p.suffix in (".cc", ".h", ".py"))
    output_dir.mkdir(parents=True, exist_ok=True)
    sources = digest()

    def compile_one(isa: str) -> Path:
        target = output_dir / library_name(isa)
        if not force and target.exists() and target.stat().st_mtime >= newest:
            return target
        # Compiled beside its place and moved: a running process never maps half a library.
        partial = target.with_suffix(f".{os.getpid()}.tmp")
        command = [*compiler.split(), "-std=c++17", "-O3", "-fPIC", "-shared", "-pthread"]
        command += ["-fno-math-errno", "-ffp-contract=fast", "-w"]
        command += [*ISAS[isa], f"-I{ffi.include_dir()}", f"-I{here}"]
        command += [f'-DQJAX_SOURCES="{sources}"']
        command += [str(here / source) for source in SOURCES] + ["-o", str(partial)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{compiler} failed on the {isa} kernels:\n{done.stderr}")
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        return target

    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        return list(threads.map(compile_one, isas()))


if __name__ == "__main__":
    for path in build(Path(__file__).parent, force="--force" in sys.argv):
        print(path)
