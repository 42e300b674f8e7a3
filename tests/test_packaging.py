"""What the sdist and the wheels hold, what installing qjax brings along, and that it says one thing
about itself everywhere."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email.parser import Parser
from functools import cache
from importlib import import_module
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import qjax
from pallas_kernels.native import build
from tools import wheels

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LARGEST_INSTALL = 1.5e9

BUILD_FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
TOLD = ("CHANGELOG.md", "CITATION.cff")
PACKAGES = ("qjax", "pallas_kernels")

# Stands in for a C++ compiler: says what it compiles for, and "compiles" by writing a header.
COMPILER = """
import sys
if "-dM" in sys.argv:
    print("#define {macro} 1")
elif "-o" in sys.argv:
    open(sys.argv[sys.argv.index("-o") + 1], "wb").write({header!r})
"""
ARM, APPLE = wheels.PLATFORMS[1:]
HEADER = {  # of a library for the machine
    "__aarch64__": ARM.magic.ljust(18, b"\0") + b"\xb7\0",
    "__x86_64__": ARM.magic.ljust(18, b"\0") + b"\x3e\0",
}


def fake_compiler(folder: Path, macro: str) -> str:
    script = folder / f"compiler_for_{macro}.py"
    script.write_text(COMPILER.format(macro=macro, header=HEADER[macro]))
    return f"{sys.executable} {script}"


@dataclass(frozen=True)
class Built:
    sdist: Path
    unpacked: Path  # the sdist's tree
    pure: Path  # a wheel from it, made without a compiler
    arm: Path  # one made with a compiler for Arm, which was asked for by its tag


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Made as `python -m build` does it, from a copy, so that nothing is left in this tree."""
    folder = tmp_path_factory.mktemp("packages")
    source = folder / "source"
    source.mkdir()
    for name in (*BUILD_FILES, *TOLD):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "pallas_kernels/native/libqjax_portable.so").write_bytes(b"of an earlier build")
    (source / "tests").mkdir()
    (source / "tests/test_something.py").touch()

    def run(tree: Path, call: str, **environment: str) -> Path:
        """What a call to setuptools makes, in the folder `out`."""
        made = Path(tempfile.mkdtemp(dir=folder))
        program = f"from setuptools.build_meta import *; out = {str(made)!r}; {call}"
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tree,
            env=os.environ | {"PYTHONWARNINGS": "default"} | environment,
            capture_output=True,
            text=True,
        )
        assert not done.returncode, done.stderr
        (file,) = made.iterdir()
        return file

    sdist = run(source, "build_sdist(out)")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    pure = run(unpacked, "build_wheel(out)", CXX="", PATH="")
    option = {"--build-option": f"--plat-name={ARM.tag}"}
    compiler = fake_compiler(folder, "__aarch64__")
    return Built(sdist, unpacked, pure, run(unpacked, f"build_wheel(out, {option})", CXX=compiler))


def package_files(tree: Path) -> set[str]:
    """The files of both packages, without what is compiled."""
    return {
        str(path.relative_to(tree))
        for package in PACKAGES
        for path in (tree / package).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so", ".tmp")
    }


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def of_dist_info(wheel: Path, file: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(f".dist-info/{file}")]
        return archive.read(name).decode()


def test_sdist_holds_what_a_build_needs_and_no_half_of_the_tests(built: Built) -> None:
    assert package_files(built.unpacked) == package_files(ROOT)
    assert all((built.unpacked / name).is_file() for name in (*BUILD_FILES, *TOLD))
    assert not (built.unpacked / "tests").exists()
    with tarfile.open(built.sdist) as archive:
        assert not [name for name in archive.getnames() if name.endswith((".so", ".o"))]


def test_wheel_without_a_compiler_is_for_any_machine(built: Built) -> None:
    assert built.pure.name == f"qjax-{qjax.__version__}-py3-none-any.whl"
    held = {name for name in names(built.pure) if ".dist-info/" not in name}
    assert held == package_files(ROOT)


def test_wheel_of_another_machine(built: Built) -> None:
    assert built.arm.name == f"qjax-{qjax.__version__}-py3-none-{ARM.tag}.whl"
    libraries = set(names(built.arm)) - set(names(built.pure))
    assert libraries == {"pallas_kernels/native/libqjax_portable.so"}
    with zipfile.ZipFile(built.arm) as archive:  # compiled, not found in the tree
        assert archive.read(libraries.pop()) == HEADER["__aarch64__"]


def test_installed_without_a_compiler_it_says_what_that_costs(built: Built, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(built.pure) as archive:
        archive.extractall(site)
    (script,) = of_dist_info(built.pure, "entry_points.txt").splitlines()[1:]
    assert script == "qjax = qjax.cli.main:main"
    done = subprocess.run(
        [sys.executable, "-c", "from qjax.cli.main import main; main(['doctor'])"],
        cwd=tmp_path,
        env=os.environ
        | {"PYTHONPATH": str(site), "PATH": "", "CXX": "", "QJAX_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr  # a fault
    assert "none found" in done.stdout
    assert "native kernels are not built" in done.stdout
    assert "install a C++17 compiler" in done.stdout


@pytest.mark.parametrize(
    ("macro", "isas"),
    [
        ("__x86_64__", ("avx512bf16", "avx512vnni", "avx2", "portable")),
        ("__aarch64__", ("portable",)),
    ],
)
def test_the_compiler_decides_the_instruction_sets(
    tmp_path: Path, macro: str, isas: tuple[str, ...]
) -> None:
    assert build.isas(fake_compiler(tmp_path, macro)) == isas


def test_an_old_compiler_builds_what_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "old.py"
    old.write_text(
        "import sys\n"
        "if '-E' in sys.argv: print('#define __x86_64__ 1')\n"
        "elif '-mavx512bf16' in sys.argv: sys.exit('unrecognized option -mavx512bf16')\n"
        "else: open(sys.argv[sys.argv.index('-o') + 1], 'w').write(' '.join(sys.argv))\n"
    )
    monkeypatch.setenv("CXX", f"{sys.executable} {old}")
    with pytest.raises(RuntimeError, match="unrecognized option -mavx512bf16"):
        build.build(tmp_path / "native")
    names = {path.name for path in (tmp_path / "native").iterdir()}
    assert names == {f"libqjax_{isa}.so" for isa in ("avx512vnni", "avx2", "portable")}


@pytest.mark.parametrize(("source", "isa"), build.SAME)
def test_what_is_compiled_once_for_two_uses_nothing_that_one_lacks(source: str, isa: str) -> None:
    folder, seen, left = Path(build.__file__).parent, set(), {source}
    while left:
        text = (folder / left.pop()).read_text()
        seen.add(text)
        included = re.findall(r'#include "(\w+\.h)"', text)
        left |= {name for name in included if (folder / name).read_text() not in seen}
    assert len(seen) > 5
    flags = set(build.ISAS[isa]) - set(build.ISAS[build.SAME[source, isa]])
    macros = [f"__{flag.removeprefix('-m').upper()}__" for flag in flags]
    assert macros
    assert not [macro for macro in macros for text in seen if macro in text]


def test_wheels_are_read_before_they_are_given_away(built: Built, tmp_path: Path) -> None:
    mac = tmp_path / built.arm.name.replace(ARM.tag, APPLE.tag)
    shutil.copy(built.arm, mac)
    assert [fault for fault in wheels.faults(mac, APPLE) if "for another machine" in fault]
    assert "not named for" in wheels.faults(built.pure, ARM)[0]
    with zipfile.ZipFile(mac, "w") as archive:
        archive.writestr("pallas_kernels/native/libqjax_portable.so", APPLE.magic + b"\x0c\0\0\x01")
    assert wheels.faults(mac, APPLE) == []


@pytest.mark.parametrize(
    ("found", "granted"),
    [
        ("manylinux_2_28_aarch64", True),
        ("manylinux_2_17_aarch64", True),
        ("manylinux_2_35_aarch64", False),
        ("manylinux_2_28_x86_64", False),
        ("linux_aarch64", False),
    ],
)
def test_glibc_may_be_older_than_the_tag_says(found: str, granted: bool) -> None:
    shown = (
        f'qjax-py3-none-{ARM.tag}.whl is consistent with the following\nplatform tag: "{found}".'
    )
    assert wheels.grants(shown, ARM.tag) == granted


def test_version_is_the_same_everywhere(built: Built) -> None:
    metadata = Parser().parsestr(of_dist_info(built.pure, "METADATA"))
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changes = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[(\d[^]]*)\] - (\d{4}-\d{2}-\d{2})$", changes, re.MULTILINE)
    assert (citation["version"], citation["date-released"]) == released[0]
    assert metadata["Version"] == qjax.__version__ == released[0][0]
    assert "version" not in PROJECT  # pyproject.toml takes it from qjax/__init__.py


def test_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_extras_that_texts_and_messages_name_exist() -> None:
    folders = (*PACKAGES, "docs", "configs", "containers", "tests/server", "tools")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.*")]
    texts = [path for path in files if path.suffix in (".py", ".md", ".yaml", "")]
    named = {
        extra.strip()
        for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *texts]
        for found in re.findall(r"(?:qjax|-e ['\"]?\.)\[([a-z, ]+)\]", path.read_text("utf-8"))
        for extra in found.split(",")
    }
    assert named > {"server", "eval", "calibration"}
    assert named <= PROJECT["optional-dependencies"].keys()


def test_entry_points_lead_somewhere() -> None:
    for target in PROJECT["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(import_module(module), function))


def test_import_waits_with_heavy_libraries() -> None:
    unwanted = "{'flax', 'transformers', 'torch', 'matplotlib', 'jax'}"
    program = f"import sys, qjax; print(*({unwanted} & sys.modules.keys()))"
    output = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True)
    assert output.split() == []


def test_container_copies_what_there_is() -> None:
    steps = (ROOT / "containers/Containerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.*)", steps, re.M) for name in line.split()[:-1]]
    let_through = (ROOT / ".dockerignore").read_text()
    assert set(copied) == set(re.findall(r"^!(.*)", let_through, re.MULTILINE))
    assert all((ROOT / name).exists() for name in copied)
    extras = re.findall(r"EXTRAS=([\w,]+)", steps)
    assert {name for found in extras for name in found.split(",")} == {"server", "cuda"}
    assert PROJECT["optional-dependencies"].keys() >= {"server", "cuda"}


@cache
def runtime_packages() -> dict[str, Distribution]:
    """Everything that the dependencies without extras need, all the way down, by name."""
    found: dict[str, Distribution] = {}

    def add(requirements: list[str], extras: frozenset[str]) -> None:
        for requirement in map(Requirement, requirements):
            wanted = requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in extras | {""}
            )
            name = canonicalize_name(requirement.name)
            if wanted and name not in found:
                found[name] = distribution(name)
                add(found[name].requires or [], frozenset(requirement.extras))

    try:
        add(PROJECT["dependencies"], frozenset())
    except PackageNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    return found


def test_runtime_pulls_no_other_engine() -> None:
    unwanted = {"torch", "tensorflow", "transformers", "nvidia-cublas-cu12", "pandas"}
    assert not unwanted & runtime_packages().keys()


def test_runtime_stays_small() -> None:
    def sizes() -> Iterator[int]:
        for package in runtime_packages().values():
            files = (Path(str(package.locate_file(file))) for file in package.files or [])
            yield sum(file.stat().st_size for file in files if file.is_file())

    assert sum(sizes()) < LARGEST_INSTALL
