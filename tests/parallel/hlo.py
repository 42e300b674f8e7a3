"""What devices tell each other, in the text of a compiled program."""

from __future__ import annotations

import math
import re
from collections import Counter

# A result type, or a tuple of them, and the operation: "f32[4,128]{1,0} all-reduce(".
_OPERATION = re.compile(
    r"= (\(?[^=]*?\)?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)
_TYPE = re.compile(r"\w+\[([\d,]*)\]")


def collectives(text: str) -> tuple[Counter[str], int]:
    """How many there are of each kind, and the numbers of the largest all-gather.

    Sums that XLA sends together count as they were asked for: each array of the tuple is one.
    """
    found: Counter[str] = Counter()
    largest = 0
    for types, kind in _OPERATION.findall(text):
        found[kind] += len(_TYPE.findall(types)) if kind == "all-reduce" else 1
        if kind == "all-gather":
            sizes = [math.prod(map(int, dims.split(","))) for dims in _TYPE.findall(types) if dims]
            largest = max(largest, *sizes)
    return found, largest
