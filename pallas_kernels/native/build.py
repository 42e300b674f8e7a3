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

# The slowest to compile first.
SOURCES = ("matmul.cc", "attention.cc", "ffi.cc", "pack.cc", "nearest.cc", "gram.cc", "pool.cc")
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
# Sources that use nothing of an instruction set beyond another one: compiled once for both.
SAME = {(source, "avx512bf16"): "avx512vnni" for source in ("matmul.cc", "nearest.cc", "gram.cc")}


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

    def is_new(isa: str) -> bool:
        library = output_dir / library_name(isa)
        return not force and library.exists() and library.stat().st_mtime >= newest

    known = isas(compiler)
    wanted = [isa for isa in known if not is_new(isa)]
    with (
        # Built beside its place and moved: a running process never maps half a library.
        tempfile.TemporaryDirectory(dir=output_dir) as folder,
        ThreadPoolExecutor(os.cpu_count() or 1) as threads,
    ):

        def compiled(source: str, isa: str) -> str:
            name = str(Path(folder, f"{isa}_{source}.o"))
            run(*FLAGS, *ISAS[isa], *includes, "-c", str(here / source), "-o", name)
            return name

        def built_for(source: str, isa: str) -> tuple[str, str]:
            return source, SAME.get((source, isa), isa)

        every = dict.fromkeys(built_for(source, isa) for source in SOURCES for isa in wanted)
        objects = {one: threads.submit(compiled, *one) for one in every}
        failed = []
        for isa in wanted:
            try:
                parts = [objects[built_for(source, isa)].result() for source in SOURCES]
                # Without the instruction set: some compilers would build their C++ library for it.
                linked = Path(folder, library_name(isa))
                run("-shared", "-pthread", *parts, "-o", str(linked))
            except RuntimeError as error:  # others may still work
                failed.append(error)
            else:
                linked.replace(output_dir / linked.name)
    if failed:
        raise failed[0]
    return [output_dir / library_name(isa) for isa in known]


if __name__ == "__main__":
    for path in build(Path(__file__).parent, force="--force" in sys.argv):
        print(path)
