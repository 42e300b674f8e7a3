"""How far sums that devices send rounded lead from the exact model: mean KL divergence on a text.

    XLA_FLAGS=--xla_force_host_platform_device_count=3 \\
        python benchmarks/all_reduce_kl.py smollm2-135m text.txt --tensor-parallel-size 3

All else is exact: activations and cache are float32, weights are as they are stored.
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
from qjax.sharding import ALL_REDUCE


def main() -> None:
    parser = argparse.ArgumentParser(description="KL divergence of rounded sums")
    parser.add_argument("model", help="anything that qjax.load takes")
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, required=True)
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--windows", type=int, default=4, help="how many, from the start")
    options = parser.parse_args()

    params = qjax.load(options.model)
    ids = windows(params, options.text.read_text(), options.window, options.windows)
    exact = rounded_reader(params, "exact", "float32")
    count = options.tensor_parallel_size
    print(f"{len(ids)} windows of {ids.shape[1]} tokens, {count} devices; KL in nats from one\n")
    print("| sent as | mean ± standard error | median | 99 % quantile | same top token |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for sent in ALL_REDUCE:
        split = qjax.load(options.model, tensor_parallel_size=count, all_reduce=sent)
        other = rounded_reader(split, "exact", "float32")
        rows = [
            row_divergence(np.asarray(a), np.asarray(b))
            for window in ids
            for a, b in zip(exact(window), other(window), strict=True)
        ]
        divergence, equal = (np.concatenate(part) for part in zip(*rows, strict=True))
        print(table_line(sent, divergence, equal), flush=True)


if __name__ == "__main__":
    try:
        main()
    except (QjaxError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
