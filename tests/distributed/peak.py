"""A program that loads a process's part of a model, and prints how much memory that took.

python -m tests.distributed.peak ADDRESS COUNT NUMBER MODEL
"""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

import qjax
from qjax import distributed


def memory(kind: str) -> int:
    """Bytes that are resident ("VmRSS"), or were at most ("VmHWM")."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main(address: str, count: str, number: str, model: str) -> None:
    with distributed.initialize(address, int(count), int(number), initialization_timeout=60):
        jnp.zeros(1).block_until_ready()
        before = memory("VmRSS")
        params = qjax.load(model, tensor_parallel_size=int(count))
        peak = memory("VmHWM")
        leaves = jax.tree.leaves(params.tree)
        own = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
        print(json.dumps({"before": before, "peak": peak, "own": own, "whole": params.nbytes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
