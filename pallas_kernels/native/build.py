"""Compiles the CPU kernels: one shared library for each instruction set, chosen at run time.

Separate libraries keep code for one instruction set from being linked into another. Nothing but
a C++17 compiler (g++ or clang++) and the headers that come with jaxlib is needed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = ("ffi.cc", "pack.cc", "pool.cc")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-pthread", "-fno-math-errno", "-ffp-contract=fast", "-w")
_VNNI = ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq",
         "-mavx512vnni", "-mprefer-vector-width=512")  # fmt: skip
# Best first: the loader takes the first that the processor supports.
ISAS: dict[str, tuple[str, ...]] = {
    "avx512bf16": (*_VNNI, "-mavx512bf16", "-mavx512vbmi"),
    "avx512vnni": _VNNI,
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "portable": (),
}


def isas(compiler: str) -> tuple[str, ...]:
    """The instruction sets of the processors that `compiler` compiles for, which need not be this
    one: `aarch64-linux-gnu-g++`, or clang++ with a -target. Raises RuntimeError where it fails.
    """
    command = [*compiler.split(), "-dM", "-E", "-x", "c++", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{compiler} failed on an empty file:\n{done.stderr}")
    return tuple(ISAS) if "__x86_64__" in done.stdout.split() else ("portable",)


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

    They are for the processors that the compiler compiles for, so that CXX may name one for another
    machine. Up-to-date libraries are kept unless `force`. Raises FileNotFoundError where no
    compiler is found, and RuntimeError with the compiler's messages where it fails.
    """
    from jax import ffi

    compiler = find_compiler()
    if compiler is None:
        raise FileNotFoundError("no C++17 compiler found: install g++ or clang++, or set CXX")
    here = Path(__file__).parent
    newest = max(p.stat().st_mtime for p in here.iterdir() if p.suffix in (".cc", ".h", ".py"))
    output_dir.mkdir(parents=True, exist_ok=True)
    includes = (f"-I{ffi.include_dir()}", f"-I{here}", f'-DQJAX_SOURCES="{digest()}"')

    def run(*arguments: str) -> None:
        done = subprocess.run([*compiler.split(), *arguments], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{compiler} failed:\n{done.stderr}")

    def build_one(isa: str) -> Path:
        target = output_dir / library_name(isa)
        if not force and target.exists() and target.stat().st_mtime >= newest:
            return target
        # Built beside its place and moved: a running process never maps half a library.
        with tempfile.TemporaryDirectory(dir=output_dir) as folder:
            objects = [str(Path(folder, source).with_suffix(".o")) for source in SOURCES]
            for source, compiled in zip(SOURCES, objects, strict=True):
                run(*FLAGS, *ISAS[isa], *includes, "-c", str(here / source), "-o", compiled)
            # Without the instruction set: some compilers would build their C++ library for it.
            linked = Path(folder, target.name)
            run("-shared", "-pthread", *objects, "-o", str(linked))
            linked.replace(target)
        return target

    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        return list(threads.map(build_one, isas(compiler)))


if __name__ == "__main__":
    for path in build(Path(__file__).parent, force="--force" in sys.argv):
        print(path)
