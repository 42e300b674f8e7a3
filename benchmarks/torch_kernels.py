"""PyTorch's own quantized products on an NVIDIA GPU, for `python -m qjax.bench kernels --peer`.

    python benchmarks/torch_kernels.py --shape 4096x14336 --rows 1 --rows 1024

Prints JSON: {"library": ..., "device": ..., "rows": [{"kind", "n", "k", "rows", "microseconds"}]}.
Kinds: "bfloat16" (torch.matmul), "int8" (torch._int_mm, codes alone), "fp8_e4m3" (torch._scaled_mm
with a scale for each row of x and of the weight), "int4" (tinygemm, groups of 128). Copies of the
weight that together outgrow the cache are gone through in one CUDA graph. What PyTorch refuses
(some need more than 16 rows) is left out.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

SPREAD_BYTES = 200_000_000
REPEATS = 5
GROUP = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", action="append", required=True, help="N x K, as 4096x14336")
    parser.add_argument("--rows", action="append", type=int, required=True)
    options = parser.parse_args()
    try:
        import torch
    except ImportError:
        sys.exit("torch is not installed here")
    if not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device")
    found = []
    for shape in options.shape:
        n, k = map(int, shape.split("x"))
        for rows in options.rows:
            for kind, make in KINDS.items():
                try:
                    microseconds = measured(torch, make, n, k, rows)
                except (RuntimeError, ValueError) as error:
                    print(f"{kind} {shape}, {rows} rows: {error}", file=sys.stderr)
                    continue
                size = {"kind": kind, "n": n, "k": k, "rows": rows}
                found.append(size | {"microseconds": float(f"{microseconds:.4g}")})
    device = torch.cuda.get_device_name()
    print(json.dumps({"library": f"torch {torch.__version__}", "device": device, "rows": found}))


def measured(torch: Any, make: Callable[..., Any], n: int, k: int, rows: int) -> float:
    """Median microseconds of one product."""
    one, nbytes = make(torch, n, k, rows)
    copies = min(8, max(1, -(-SPREAD_BYTES // nbytes)))
    products = [one, *(make(torch, n, k, rows)[0] for _ in range(copies - 1))]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for product in products:  # what is chosen or compiled at the first call
            product()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in products:
            product()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(replays: int) -> float:
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    replays = max(1, int(0.02 / max(seconds(1), 1e-6)))
    samples = [seconds(replays) for _ in range(REPEATS)]
    return statistics.median(samples) / replays / copies * 1e6


def bfloat16(torch: Any, n: int, k: int, rows: int) -> tuple[Callable[[], Any], int]:
    x = torch.randn(rows, k, dtype=torch.bfloat16, device="cuda")
    w = torch.randn(n, k, dtype=torch.bfloat16, device="cuda")
    return lambda: torch.matmul(x, w.t()), w.nbytes


def int8(torch: Any, n: int, k: int, rows: int) -> tuple[Callable[[], Any], int]:
    x = torch.randint(-127, 128, (rows, k), dtype=torch.int8, device="cuda")
    w = torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda")
    return lambda: torch._int_mm(x, w.t()), w.nbytes


def fp8(torch: Any, n: int, k: int, rows: int) -> tuple[Callable[[], Any], int]:
    x = torch.randn(rows, k, device="cuda").to(torch.float8_e4m3fn)
    w = torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn)
    scale_x = torch.ones(rows, 1, device="cuda")
    scale_w = torch.ones(1, n, device="cuda")

    def product() -> Any:
        return torch._scaled_mm(
            x, w.t(), scale_a=scale_x, scale_b=scale_w, out_dtype=torch.bfloat16
        )

    return product, w.nbytes


def int4(torch: Any, n: int, k: int, rows: int) -> tuple[Callable[[], Any], int]:
    x = torch.randn(rows, k, dtype=torch.bfloat16, device="cuda")
    pairs = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    w = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    scales = torch.ones(k // GROUP, n, 2, dtype=torch.bfloat16, device="cuda")
    return lambda: torch.ops.aten._weight_int4pack_mm(x, w, GROUP, scales), w.nbytes


KINDS = {"bfloat16": bfloat16, "int8": int8, "fp8_e4m3": fp8, "int4": int4}

if __name__ == "__main__":
    main()
