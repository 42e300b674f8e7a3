"""Compiles the C++ kernels while the package is built; everything else is in pyproject.toml.

They are optional: without a C++17 compiler the install goes on, the XLA implementations do the
work, and `qjax doctor` says what that costs. XLA's FFI calls them, they are no Python extension
modules, so one build serves every Python version: the wheel is tagged by platform only.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NATIVE = Path("pallas_kernels", "native")


def load_builder() -> ModuleType:
    """build.py by its path: the package cannot be imported before it is installed."""
    spec = importlib.util.spec_from_file_location("native_build", ROOT / NATIVE / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildKernels(build_ext):
    """build_ext whose one "extension" is the kernel libraries, compiled by build.py.

    An editable install compiles next to the sources, any other into the folder that setuptools
    gathers the package in.
    """

    libraries_built: tuple[Path, ...] = ()

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        folder = (ROOT if in_place else Path(self.build_lib)) / NATIVE
        if not in_place:  # setuptools reuses its folder: an earlier build must not slip in
            for stale in folder.glob("*.so"):
                stale.unlink()
        try:
            load_builder().build(folder)
        except (OSError, RuntimeError) as error:
            print(f"qjax: installed without all C++ kernels: {error}", file=sys.stderr)
        # An old compiler may know some instruction sets and not others.
        self.libraries_built = tuple(sorted(folder.glob("*.so")))

    def get_outputs(self) -> list[str]:
        return [str(library) for library in self.libraries_built]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """A wheel named after the platform when the libraries are in it, and `any` otherwise."""

    def get_tag(self) -> tuple[str, str, str]:
        compiled = self.get_finalized_command("build_ext").get_outputs()
        platform = super().get_tag()[2] if compiled else "any"
        return "py3", "none", platform


setup(
    ext_modules=[Extension("pallas_kernels.native.kernels", sources=[])],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
