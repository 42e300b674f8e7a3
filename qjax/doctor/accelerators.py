"""Checks of jax's devices and settings, and of the compiled kernels."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from qjax.doctor.finding import Finding, Surroundings

_GPU_FILES = ("dev/nvidia0", "dev/nvidiactl", "dev/kfd")
_OFF = ("0", "false")


def gpu_present(around: Surroundings) -> str | None:
    """ "NVIDIA" or "AMD", where the driver shows a GPU; None where not."""
    for path in _GPU_FILES:
        if (around.root / path).exists():
            return "AMD" if path.endswith("kfd") else "NVIDIA"
    return None


def devices(around: Surroundings, kind: str) -> Iterator[Finding]:
    """A GPU that jax does not use.

    Args:
      kind: of the devices that jax uses: "cpu", "gpu" or "tpu".
    """
    maker = gpu_present(around)
    if maker is None or kind != "cpu":
        return
    for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME"):
        if "cpu" in around.environ.get(name, ""):
            yield Finding(
                name,
                f"{around.environ[name]!r:.40} keeps jax off the {maker} GPU that is here",
                f"unset {name}",
            )
            return
    if around.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles"):
        yield Finding(
            "CUDA_VISIBLE_DEVICES",
            "hides the GPU that is here",
            "unset CUDA_VISIBLE_DEVICES, or set it to the number of the GPU",
        )
        return
    extra = "cuda13" if maker == "NVIDIA" else "rocm7-local"
    yield Finding(
        "GPU",
        f"an {maker} GPU is here, and jax runs on the CPU: its plugin is missing, or does not load",
        f"python -m pip install -U 'jax[{extra}]', then ask python for jax.devices()",
    )


def settings(around: Surroundings, x64: bool) -> Iterator[Finding]:
    """JAX_ENABLE_X64 and XLA_FLAGS.

    Args:
      x64: whether jax uses types of 64 bits.
    """
    if x64:
        yield Finding(
            "x64",
            "jax_enable_x64 is on: numbers without a type of their own take twice the bytes, and "
            "kernels that are made for 32 bits may refuse them",
            "unset JAX_ENABLE_X64, or jax.config.update('jax_enable_x64', False)",
        )
    text = around.environ.get("XLA_FLAGS", "")
    try:
        flags = shlex.split(text)
    except ValueError:
        flags = [text]
    for flag in flags:
        name, _, value = flag.partition("=")
        if not name.startswith("--xla"):
            yield Finding(
                "XLA_FLAGS",
                f"{flag!r:.60} is no flag of XLA, which ends the process over it",
                "flags begin with --xla_ and stand apart by spaces",
            )
        elif name == "--xla_force_host_platform_device_count":
            yield Finding(
                "XLA_FLAGS",
                f"{flag}: the CPU is shown as {value} devices, for tests; a model runs on one",
                "leave that flag out to use all cores for it",
                fault=False,
            )
        elif name == "--xla_cpu_multi_thread_eigen" and value.lower() in _OFF:
            yield Finding("XLA_FLAGS", f"{flag}: XLA uses one core", "leave that flag out")
        elif name == "--xla_gpu_autotune_level" and value in ("0", "1"):
            yield Finding(
                "XLA_FLAGS", f"{flag}: XLA's own products are not tuned", "leave it out", False
            )


def gpu(around: Surroundings, kind: str, capability: tuple[int, int] | None) -> Iterator[Finding]:
    """What a GPU cannot do, and how jax takes its memory."""
    if kind != "gpu":
        return
    if capability is not None and capability < (8, 9):
        dotted = ".".join(map(str, capability))
        yield Finding(
            "compute capability",
            f"{dotted} has no units for 8-bit floats: FP8 models run with inputs emulated, without "
            "the speed",
            "prefer W4A16 or W8A8 on it; `qjax recommend` weighs them",
            fault=False,
        )
    if around.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "").lower() in _OFF:
        yield Finding(
            "XLA_PYTHON_CLIENT_PREALLOCATE",
            "off: jax takes memory as it goes, which may break up what is free",
            "unset it where nothing else uses the GPU",
            fault=False,
        )
    text = around.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
    try:
        fraction = float(text) if text else 0.75
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        yield Finding(
            "XLA_PYTHON_CLIENT_MEM_FRACTION",
            f"{text!r:.40} is no share of the memory",
            "set it to a number above 0 and up to 1, such as 0.9",
        )


def kernels(kind: str, reason: str | None, compiler: str | None) -> Iterator[Finding]:
    """The C++ kernels, which a CPU wants.

    Args:
      reason: why there are none, as `pallas_kernels.native.library` says; None where there are.
      compiler: that was found, or None.
    """
    if kind != "cpu" or reason is None:
        return
    build = "in a checkout: python -m pip install -e .; else: python -m pip install "
    build += "--force-reinstall --no-deps qjax"
    yield Finding(
        "C++ kernels",
        f"{reason}. Answers are the same without them, but prompts and generation are several "
        "times slower",
        build if compiler else f"install a C++17 compiler (g++ or clang++), then, {build}",
    )


def asked(around: Surroundings) -> Iterator[Finding]:
    """Kernels that somebody named."""
    for name in ("QJAX_IMPLEMENTATION", "QJAX_CPU_KERNELS"):
        if value := around.environ.get(name):
            yield Finding(
                name,
                f"{value!r:.40}: kernels are those, not the fastest that fit",
                f"unset {name}",
                fault=False,
            )
