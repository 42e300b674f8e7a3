"""Makes `speed.json` and `accuracy.json` from the results of benchmarks.

    python -m qjax.recommend benchmarks/results

reads nvidia-h200.json and amd-epyc-2-cores.json there (of `python -m qjax.bench kernels --json`),
and quantize/*.json (of benchmarks/quantize_vs_peers.py). A results file of another device is what
`qjax recommend --results FILE` goes by.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qjax.bench.result import ResultError, read
from qjax.recommend.figures import FOLDER, Speeds, speeds_from
from qjax.recommend.hardware import abilities, lookup

SPEED_FILES = ("nvidia-h200.json", "amd-epyc-2-cores.json")

# What the lines of benchmarks/quantize_methods.py are called by `qjax quantize`.
_METHODS = {
    "RTN W4A16 g64": ("W4A16", "rtn", 64),
    "GPTQ W4A16 g64": ("W4A16", "gptq", 64),
    "GPTQ W4A16 g32": ("W4A16", "gptq", 32),
    "SmoothQuant + GPTQ W8A8": ("W8A8", "smoothquant", None),
    "FP8_DYNAMIC": ("FP8_DYNAMIC", "rtn", None),
    "GPTQ NVFP4": ("NVFP4", "gptq", None),
    "GGUF Q8_0": ("Q8_0", "rtn", None),
    "GGUF Q6_K": ("Q6_K", "rtn", None),
    "GGUF Q4_K_M": ("Q4_K_M", "imatrix", None),
    "GGUF Q3_K_M": ("Q3_K_M", "imatrix", None),
    "GGUF Q2_K": ("Q2_K", "imatrix", None),
}
# By `python benchmarks/kv_cache_kl.py smollm2-135m TEXT` on wikitext-2, against a bfloat16 cache.
_CACHE = {"bfloat16": 0.0, "float32": 0.00002, "int8": 0.0002, "fp8_e4m3": 0.0025, "int4": 0.0185}
# Attention alone on two cores of an AMD EPYC in the shape of an 8B model, 8,184 positions, by
# `python benchmarks/kv_cache.py --shape 8b`: how much faster than over bfloat16, and bytes of that.
# What share of the bandwidth bfloat16 reaches was not measured there: it counts as all of it.
_CPU_CACHE = {"bfloat16": (1.0, 1.0), "int8": (1.08, 0.52), "fp8_e4m3": (1.11, 0.5),
              "int4": (1.45, 0.27)}  # fmt: skip
# Of prompts, likewise, by `--context 2048 --tokens 512`.
_CPU_PROMPTS = {"bfloat16": 1.0, "int8": 0.89, "fp8_e4m3": 0.93, "int4": 0.79}


def speeds(path: Path) -> Speeds:
    """The shares of its rooflines that a device reached.

    A share is the time at best by the bandwidth and the bfloat16 products of the same run, over the
    time that was taken by what runs without naming an implementation. Of products, that is at the
    size at which most kinds of weights were measured.

    Raises:
      ResultError: it is no file of results, or holds no products.
    """
    found = read(path)
    limits = found["limits"]
    bandwidth, peak = limits["bandwidth"], limits["peaks"]["bfloat16"]
    rows = [row for row in found["rows"] if row["asked"] == "" and "failed" not in row]

    def share_of(row: Mapping[str, Any]) -> float:
        by_bytes = row["gigabytes_per_second"] * 1e9 / bandwidth
        return round(max(by_bytes, row["teraflops"] * 1e12 / peak), 4)

    products = [row for row in rows if row["op"] == "matmul"]
    if not products:
        raise ResultError(f"{path}: no products were measured")
    cpu = found["kind"] == "cpu"
    # On an accelerator XLA runs the products of what is not quantized.
    products += [row for row in rows if row["op"] == "bfloat16" and not cpu]
    sizes = Counter((row["n"], row["k"]) for row in products)
    size = max(sizes, key=lambda each: sizes[each])
    attention = curves(
        (row["kind"], row["gigabytes_per_second"] * row["microseconds"] * 1e3, share_of(row))
        for row in rows
        if row["op"] == "paged_attention"
    )
    prompts = curves(
        (row["kind"], row["k"], share_of(row)) for row in rows if row["op"] == "prefill_attention"
    )
    if cpu and not attention:
        attention = {key: [[1, round(a * b, 4)]] for key, (a, b) in _CPU_CACHE.items()}
        prompts = {key: [[2048, part]] for key, part in _CPU_PROMPTS.items()}
    published = None if cpu else lookup(found["device"])
    reach = (1.0, 1.0)
    if published is not None:
        reach = (round(bandwidth / published.bandwidth, 4), round(peak / published.peak, 4))
    architecture = "CPU" if cpu else abilities(published)[0] if published else found["device"]
    return speeds_from(
        {
            "name": found["device"],
            "kind": found["kind"],
            "architecture": architecture,
            "source": path.name,
            "date": found["date"],
            "processors": found["processors"],
            "bandwidth": bandwidth,
            "peak": peak,
            "reach": reach,
            "products": curves(
                (row["kind"], row["rows"], share_of(row))
                for row in products
                if (row["n"], row["k"]) == size
            ),
            "attention": attention,
            "prompt_attention": prompts,
        }
    )


def curves(points: Iterable[tuple[str, float, float]]) -> dict[str, list[list[float]]]:
    """By kind, shares over sizes; of points at one size the better one."""
    found: dict[str, dict[float, float]] = {}
    for kind, size, share in points:
        of = found.setdefault(kind, {})
        of[round(size)] = max(of.get(round(size), 0.0), share)
    return {kind: [[size, of[size]] for size in sorted(of)] for kind, of in found.items()}


def losses(folder: Path) -> dict[str, Any]:
    """What rounding has cost, of quantize/*.json; of figures taken twice the larger."""
    found: dict[tuple, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        for row in json.loads(path.read_text())["rows"]:
            key = _METHODS.get(row["method"]["name"])
            if key is None:
                continue
            divergence = round(row["ours"]["kl_mean"], 5)
            if key not in found or divergence > found[key]["divergence"]:
                scheme, method, group_size = key
                found[key] = {
                    "scheme": scheme,
                    "method": method,
                    "group_size": group_size,
                    "divergence": divergence,
                    "same_top": round(row["ours"]["same_top"], 4),
                    "source": f"quantize/{path.name}",
                }
    return {
        "model": "SmolLM2-135M",
        "text": "wikitext-2",
        "weights": [found[key] for key in _METHODS.values() if key in found],
        "cache": _CACHE,
    }


def as_json(found: Speeds) -> dict[str, Any]:
    """An entry of speed.json."""
    return dict(vars(found))


def main(results: Path) -> None:
    entries = [as_json(speeds(results / name)) for name in SPEED_FILES]
    for name, content in (("speed.json", entries), ("accuracy.json", losses(results / "quantize"))):
        (FOLDER / name).write_text(json.dumps(content, indent=1) + "\n")
