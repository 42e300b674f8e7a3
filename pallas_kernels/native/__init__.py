"""The compiled CPU kernels: which library this processor runs, and its functions.

`build.py` compiles one library for each instruction set. The best one that the processor supports
is loaded once and its XLA custom calls are registered. `QJAX_CPU_KERNELS` names another one (for
tests and comparisons); without any library every caller gets the reason and XLA does the work.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import jax

from pallas_kernels.native import grids
from pallas_kernels.native.build import ISAS, digest, library_name
from pallas_kernels.platform import cpu_features

ENVIRONMENT_VARIABLE = "QJAX_CPU_KERNELS"
CALLS = (
    "qjax_matmul",
    "qjax_matmul_grouped",
    "qjax_embedding",
    "qjax_attention",
    "qjax_nearest_level",
    "qjax_nearest_vector",
    "qjax_gram",
)

# Numbers of ggml for the types whose tiles the kernels read.
TYPE_IDS = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10,
    "q3_k": 11, "q4_k": 12, "q5_k": 13, "q6_k": 14, "iq2_xxs": 16, "iq2_xs": 17, "iq3_xxs": 18,
    "iq1_s": 19, "iq4_nl": 20, "iq3_s": 21, "iq2_s": 22, "iq4_xs": 23, "iq1_m": 29, "bf16": 30,
    "tq1_0": 34, "tq2_0": 35, "q1_0": 41, "q2_0": 42,
}  # fmt: skip
# Types with a grid: its name, and its number in blocks.h.
_GRIDS = {
    "iq1_s": ("iq1", 0), "iq1_m": ("iq1", 0), "iq2_xxs": ("iq2_xxs", 1), "iq2_xs": ("iq2_xs", 2),
    "iq2_s": ("iq2_s", 3), "iq3_xxs": ("iq3_xxs", 4), "iq3_s": ("iq3_s", 5),
}  # fmt: skip

# What /proc/cpuinfo must list before a library may be loaded.
_AVX512 = frozenset("avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_vnni".split())
REQUIRED = {
    "avx512bf16": _AVX512 | {"avx512_bf16", "avx512vbmi"},
    "avx512vnni": _AVX512,
    "avx2": frozenset({"avx2", "fma", "f16c"}),
    "portable": frozenset[str](),
}


def supported_isas() -> list[str]:
    """Instruction sets of this processor that have kernels, best first."""
    features = cpu_features()
    return [isa for isa in ISAS if REQUIRED[isa] <= features]


def _declare(loaded: ctypes.CDLL) -> None:
    """Types of the functions that are called from here."""
    loaded.qjax_tile_bytes.restype = ctypes.c_int64
    loaded.qjax_tile_bytes.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    loaded.qjax_set_grid.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p,
    ]  # fmt: skip
    for convert in (loaded.qjax_pack, loaded.qjax_unpack):
        convert.argtypes = [
            ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
            ctypes.c_int,
        ]  # fmt: skip


def _is_of_these_sources(loaded: ctypes.CDLL) -> bool:
    """Its functions may otherwise want other arguments, or give other results."""
    try:
        loaded.qjax_sources.restype = ctypes.c_char_p
        return loaded.qjax_sources().decode() == digest()
    except AttributeError:
        return False


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The loaded library and its instruction set; or None and the reason why there is none."""
    wanted = os.environ.get(ENVIRONMENT_VARIABLE)
    if wanted and wanted not in supported_isas():
        known = ", ".join(supported_isas())
        return None, f"{ENVIRONMENT_VARIABLE}={wanted} does not run on this processor ({known} do)"
    for isa in [wanted] if wanted else supported_isas():
        path = Path(__file__).parent / library_name(isa)
        if not path.exists():
            continue
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError as error:
            return None, f"{path.name} cannot be loaded: {error}"
        if not _is_of_these_sources(loaded):
            return None, (
                f"{path.name} was built from other sources; build it again: "
                "python -m pallas_kernels.native.build"
            )
        _declare(loaded)
        for name in CALLS:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(loaded[name]), platform="cpu")
        return loaded, isa
    return None, "native kernels are not built (a C++17 compiler at install time builds them)"


@functools.cache
def provide_grid(qtype: str) -> None:
    """Hands the library the grid of a type that has one; it keeps a copy."""
    loaded, _ = library()
    if qtype not in _GRIDS or loaded is None:
        return
    name, number = _GRIDS[qtype]
    entries, levels = grids.tables(name)
    loaded.qjax_set_grid(number, entries.ctypes.data, len(entries), levels.ctypes.data)


def require() -> ctypes.CDLL:
    """The library; refuses (NotImplementedError) where there is none or the device is no CPU."""
    from pallas_kernels.platform import device_kind

    if device_kind() != "cpu":
        raise NotImplementedError(f"native kernels run on a CPU, not on {device_kind()}")
    loaded, why = library()
    if loaded is None:
        raise NotImplementedError(why)
    return loaded
