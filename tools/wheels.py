"""Builds the sdist, and from it one wheel for each platform that jaxlib has wheels for.

    python -m pip install -e '.[release]'
    python tools/wheels.py dist

The compiler is zig's (pip's `ziglang`): it compiles for other machines, against the C library of
the oldest system that a wheel is for, and links its own C++ library in. One wheel serves every
Python version, because the kernels are no extension modules. Then each wheel is read: are its
libraries those of the platform in its name, and does auditwheel find that their symbols are there?
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MANYLINUX = r'"manylinux_2_(\d+)_(\w+)"'


@dataclass(frozen=True)
class Platform:
    """A platform tag of PEP 425, what zig calls it, and how its libraries begin."""

    tag: str
    zig: str
    libraries: int
    magic: bytes
    machine: tuple[int, bytes]  # at this offset


X86_64 = Platform(
    "manylinux_2_28_x86_64", "x86_64-linux-gnu.2.28", 4, b"\x7fELF", (18, b"\x3e\x00")
)
PLATFORMS = (
    X86_64,
    Platform("manylinux_2_28_aarch64", "aarch64-linux-gnu.2.28", 1, b"\x7fELF", (18, b"\xb7\x00")),
    Platform(
        *("macosx_11_0_arm64", "aarch64-macos.11.0", 1),
        *(b"\xcf\xfa\xed\xfe", (4, b"\x0c\x00\x00\x01")),
    ),
)


def build(kind: str, source: Path, output: Path, *settings: str, **environment: str) -> Path:
    """Runs `python -m build` on a source tree and returns the one file that it made."""
    with tempfile.TemporaryDirectory(dir=output) as made:
        command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "-o", made]
        command += [f"-C{setting}" for setting in settings]
        subprocess.run([*command, str(source)], check=True, env=os.environ | environment)
        (file,) = Path(made).iterdir()
        return file.replace(output / file.name)


def build_wheel(platform: Platform, source: Path, output: Path) -> Path:
    compiler = f"{sys.executable} -m ziglang c++ -target {platform.zig} -Wl,-s"
    option = f"--build-option=--plat-name={platform.tag}"
    return build("wheel", source, output, option, CXX=compiler)


def grants(shown: str, tag: str) -> bool:
    """Whether what auditwheel showed names this machine, and no newer glibc than the tag."""
    asked, found = (re.search(MANYLINUX, text) for text in (f'"{tag}"', shown))
    return bool(asked and found and asked[2] == found[2] and int(found[1]) <= int(asked[1]))


def faults(wheel: Path, platform: Platform) -> list[str]:
    """What of a wheel is not as its name says."""
    if not wheel.name.endswith(f"-py3-none-{platform.tag}.whl"):
        return [f"{wheel.name} is not named for {platform.tag}: did the compiler fail?"]
    with zipfile.ZipFile(wheel) as archive:
        libraries = {name: archive.read(name) for name in archive.namelist() if ".so" in name}
    found = []
    if len(libraries) != platform.libraries:
        found.append(f"{wheel.name} has {len(libraries)} libraries, not {platform.libraries}")
    offset, machine = platform.machine
    for name, content in libraries.items():
        if not content.startswith(platform.magic) or not content.startswith(machine, offset):
            found.append(f"{name} in {wheel.name} is for another machine")
    if platform.tag.startswith("manylinux"):
        command = [sys.executable, "-m", "auditwheel", "show", str(wheel)]
        shown = subprocess.run(command, capture_output=True, text=True)
        if not grants(shown.stdout, platform.tag):
            told = shown.stdout + shown.stderr
            found.append(f"auditwheel does not grant {wheel.name} its platform:\n{told}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds and checks the sdist and all wheels.")
    parser.add_argument("output", type=Path, nargs="?", default=ROOT / "dist")
    parser.add_argument(
        *("--only",), choices=[platform.tag for platform in PLATFORMS], help="one platform's wheel"
    )
    arguments = parser.parse_args()
    output: Path = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    sdist = build("sdist", ROOT, output)
    problems = []
    for platform in PLATFORMS:
        if arguments.only not in (None, platform.tag):
            continue
        # A fresh tree each: nothing of another platform, nor of the working tree, slips in.
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(sdist) as archive:
                archive.extractall(folder, filter="data")
            wheel = build_wheel(platform, Path(folder, sdist.name.removesuffix(".tar.gz")), output)
        problems += faults(wheel, platform)
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
