"""Compiles the C++ kernels while the package is built; everything else is in pyproject.toml.

The library is optional: without a C++17 compiler the install goes on, the XLA implementations do
the work, and `qjax doctor` says what that costs. It is called through XLA's FFI and is no Python
extension module, so one build serves every Python version: the wheel is tagged by platform only.
"""

import importlib.util
import subprocess
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
    """build_ext whose one "extension" is the kernel library, compiled by build.py.

    An editable install compiles next to the sources, any other into the folder that setuptools
    gathers the package in.
    """

    library: Path | None = None

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        folder = (ROOT if in_place else Path(self.build_lib)) / NATIVE
        folder.mkdir(parents=True, exist_ok=True)
        if not in_place:  # setuptools reuses its folder: an earlier build must not slip in
            for stale in (*folder.glob("*.so"), *folder.glob("*.dylib")):
                stale.unlink()
        try:
            self.library = load_builder().build(folder)
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            reason = f"compiling them failed: {error}"
        else:
            reason = "no C++17 compiler was found (CXX, c++, g++ and clang++ were tried)"
        if self.library is None:
            print(f"qjax: installing without the C++ kernels: {reason}.", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        return [] if self.library is None else [str(self.library)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """Names the wheel after the platform when the library is in it, and `any` when it is not."""

    def get_tag(self) -> tuple[str, str, str]:
        compiled = self.get_finalized_command("build_ext").get_outputs()
        platform = super().get_tag()[2] if compiled else "any"
        return "py3", "none", platform


setup(
    ext_modules=[Extension("pallas_kernels.native.kernels", sources=[])],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
