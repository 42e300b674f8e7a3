"""What installing qjax brings along, read from the metadata of the installed packages."""

import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
LARGEST_INSTALL = 1.5e9


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


def test_version_is_the_same_everywhere() -> None:
    import qjax

    assert qjax.__version__ == PROJECT["version"]


def test_licence_is_whole() -> None:
    text = (Path(__file__).parent.parent / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
