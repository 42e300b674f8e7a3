"""`qjax doctor`: what qjax found on this machine, what is missing, and what that costs."""

import importlib.util
import os
import platform
import sys
from pathlib import Path

import typer

FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd")
LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "tokenizers")


def doctor() -> None:
    """Show what qjax found on this machine, and what would make it faster."""
    from importlib import metadata

    import qjax

    _line("qjax", qjax.__version__)
    _line("python", f"{platform.python_version()} ({sys.executable})")
    _line("system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors")
    for library in LIBRARIES:
        found = importlib.util.find_spec(library)
        _line(library, metadata.version(library) if found else "missing")

    import jax

    _line("devices", ", ".join(str(device) for device in jax.devices()))
    _line("cpu features", " ".join(_cpu_features()) or "unknown")
    _compiler()
    _kernels()
    _cache()


def _line(name: str, value: str) -> None:
    typer.echo(f"{name:<14}{value}")


def _cpu_features() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    words = set(text.split())
    return [feature for feature in FEATURES if feature in words]


def _compiler() -> None:
    from pallas_kernels.native import build

    compiler = build.find_compiler()
    _line("compiler", compiler or "none found (CXX, c++, g++ and clang++ were tried)")


def _kernels() -> None:
    """Asks each operation for its implementation, as a model would, without running anything."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels import dispatch
    from pallas_kernels.embedding import embedding
    from pallas_kernels.matmul import WeightSpec, matmul, prepare
    from pallas_kernels.paged_attention import AttentionSpec, empty, paged_attention

    rows = np.zeros((64, 2 * 20), np.uint8)  # q4_1 [64, 64]
    kind, arrays = prepare(WeightSpec("q4_1", (64, 64)), rows)
    weight = kind, jax.tree.map(jnp.asarray, arrays)
    spec = AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=64, scale=1.0, rotary_dim=64)
    x, ids = jnp.zeros((1, 64)), jnp.zeros(1, jnp.int32)
    pages = empty((1, 1, 32, 64), "bfloat16")
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
    reasons = set()
    for op, (name, refused) in dispatch.chosen().items():
        _line("kernel", f"{op}: {name}")
        if "native" in refused:
            reasons.add(refused["native"])
    for reason in sorted(reasons):
        typer.echo(
            f"\nThe C++ kernels are not in use: {reason}.\n"
            "Answers are the same without them, but prompts and generation are several times "
            "slower.\nTo build them, install a C++17 compiler (g++ or clang++), then run: "
            "python -m pip install --force-reinstall --no-deps qjax\n"
            "(in a checkout: python -m pip install -e .)"
        )


def _cache() -> None:
    from pallas_kernels.user_cache import cache_folder
    from qjax.checkpoint.builtin import MODELS, cached_path

    folder = cache_folder()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    _line("cache", f"{folder} ({size / 1e6:.0f} MB; set QJAX_CACHE to move it)")
    for name in MODELS:
        here = cached_path(name).exists()
        _line(
            "model", f"{name}: {'in the cache' if here else f'not yet fetched (qjax pull {name})'}"
        )


command = doctor
