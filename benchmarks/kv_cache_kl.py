"""How far a quantized cache leads from one of bfloat16: mean KL divergence on a text.

    python benchmarks/kv_cache_kl.py smollm2-135m text.txt

All else is exact: activations are float32, weights are as they are stored. Beside each type stand
the bytes that a token takes, against bfloat16.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from kl_divergence import table_line, windows

import qjax
from qjax.errors import QjaxError
from qjax.evaluate.divergence import row_divergence
from qjax.evaluate.logits import rounded_reader
from qjax.kv_cache import bytes_per_token

DTYPES = ("float32", "int8", "fp8_e4m3", "fp8_e5m2", "int4")


def main() -> None:
    parser = argparse.ArgumentParser(description="KL divergence of quantized caches")
    parser.add_argument("model", help="anything that qjax.load takes")
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--windows", type=int, default=4, help="how many, from the start")
    options = parser.parse_args()

    params = qjax.load(options.model)
    ids = windows(params, options.text.read_text(), options.window, options.windows)
    plain = rounded_reader(params, "exact", "bfloat16")
    others = {dtype: rounded_reader(params, "exact", dtype) for dtype in DTYPES}
    found: dict[str, list] = {dtype: [] for dtype in DTYPES}
    for window in ids:
        rows = list(plain(window))
        for dtype, logits in others.items():
            found[dtype] += [
                row_divergence(a, b) for a, b in zip(rows, logits(window), strict=True)
            ]

    print(f"{len(ids)} windows of {ids.shape[1]} tokens; KL in nats from a bfloat16 cache\n")
    print("| cache (bytes) | mean ± standard error | median | 99 % quantile | same top token |")
    print("| --- | ---: | ---: | ---: | ---: |")
    whole = bytes_per_token(params.config, "bfloat16")
    for dtype, parts in found.items():
        divergence, equal = (np.concatenate(part) for part in zip(*parts, strict=True))
        ratio = bytes_per_token(params.config, dtype) / whole
        print(table_line(f"{dtype} ({ratio:.2f})", divergence, equal))


if __name__ == "__main__":
    try:
        main()
    except (QjaxError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
