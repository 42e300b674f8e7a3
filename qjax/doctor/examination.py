"""`examine`: all checks, beside what was found."""

from __future__ import annotations

import platform as python_platform
import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch, native, platform
from pallas_kernels.embedding import embedding
from pallas_kernels.matmul import WeightSpec, matmul, prepare
from pallas_kernels.native import build
from pallas_kernels.paged_attention import AttentionSpec, empty, paged_attention
from pallas_kernels.user_cache import cache_folder
from qjax.checkpoint.builtin import MODELS, cached_path
from qjax.doctor import accelerators, machine, packages
from qjax.doctor.finding import Finding, Surroundings, here

FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd")
LIBRARIES = ("qjax", "jax", "jaxlib", "flax", "numpy", "tokenizers")


@dataclass(frozen=True)
class Examination:
    """Attributes:
    facts: (name, value) pairs.
    kernels: what runs each operation, {op: implementation}.
    findings: faults first.
    """

    facts: tuple[tuple[str, str], ...]
    kernels: dict[str, str]
    findings: tuple[Finding, ...]

    @property
    def faults(self) -> int:
        return sum(each.fault for each in self.findings)


def examine(around: Surroundings | None = None) -> Examination:
    """Looks at this machine; nothing is changed on it, and nothing fetched."""
    around = around or here()
    kind = platform.device_kind()
    library, why = native.library()
    found = [
        *accelerators.kernels(kind, why if library is None else None, build.find_compiler()),
        *accelerators.devices(around, kind),
        *accelerators.settings(around, bool(jax.config.values["jax_enable_x64"])),
        *accelerators.gpu(around, kind, platform.compute_capability()),
        *accelerators.asked(around),
        *machine.threads(around),
        *machine.folders(around),
        *packages.versions(packages.wanted()),
        *packages.hub(around),
        *packages.extras(packages.missing()),
    ]
    found.sort(key=lambda each: not each.fault)
    return Examination(tuple(facts(around)), kernels(), tuple(found))


def facts(around: Surroundings) -> list[tuple[str, str]]:
    """What is here, as (name, value)."""
    limit, physical = machine.quota(around), machine.cores(around)
    processors = f"{around.processors} processors"
    processors += f" on {physical} cores" if physical else ""
    processors += f", quota {limit:g}" if limit is not None else ""
    lines = [
        ("python", f"{python_platform.python_version()} ({sys.executable})"),
        ("system", f"{python_platform.system()} {python_platform.machine()}, {processors}"),
    ]
    lines += [(name, packages.installed(name) or "missing") for name in LIBRARIES]
    features = [name for name in FEATURES if name in platform.cpu_features()]
    library, isa = native.library()
    folder = cache_folder()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    lines += [
        ("devices", ", ".join(f"{each} ({each.device_kind})" for each in jax.devices())),
        ("cpu features", " ".join(features) or "unknown"),
        ("compiler", build.find_compiler() or "none found (CXX, c++, g++ and clang++ were tried)"),
        ("C++ kernels", isa if library else f"none: {isa}"),
        ("cache", f"{folder} ({size / 1e6:.0f} MB; set QJAX_CACHE to move it)"),
    ]
    for name in MODELS:
        there = cached_path(name).exists()
        lines.append(
            (
                "model",
                f"{name}: {'in the cache' if there else f'not yet fetched (qjax pull {name})'}",
            )
        )
    return lines


def kernels() -> dict[str, str]:
    """Asks each operation for its implementation, as a model would, without running anything."""
    rows = np.zeros((64, 2 * 20), np.uint8)  # q4_1 [64, 64]
    kind, arrays = prepare(WeightSpec("q4_1", (64, 64)), rows)
    weight = kind, jax.tree.map(jnp.asarray, arrays)
    spec = AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=64, scale=1.0, rotary_dim=64)
    x, ids = jnp.zeros((1, 64)), jnp.zeros(1, jnp.int32)
    pages = empty((1, 1, 32, 64), "bfloat16")
    with dispatch.watch() as seen:
        jax.eval_shape(lambda: matmul(x, [weight]))
        jax.eval_shape(lambda: embedding(ids, weight))
        jax.eval_shape(
            lambda: paged_attention(
                *(x, x, x, pages, pages),
                spec=spec,
                block_table=ids[None],
                query_start_loc=jnp.arange(2, dtype=jnp.int32),
                seq_lens=ids + 1,
            )
        )
    return {op: name for op, (name, _) in seen.items()}
