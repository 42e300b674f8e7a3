"""What was measured on this device: the best block sizes, and which implementation is fastest.

Tables come with the package (`tables/`), and from the user's own `qjax tune`, whose entries hold
where both have one. They are read while tracing. Without a table, block sizes are the defaults of
each kernel and implementations are tried in their built-in order.

An entry is found by op, kind, rows, n and k:

| op | kind | rows | n, k |
| --- | --- | --- | --- |
| matmul | `product_kind` | rows of x | shape of the weight |
| matmul_grouped | `product_kind` | rows of x | shape of an expert |
| paged_attention | `attention_kind` | tokens | kv heads; slots of a sequence |

The nearest measured shape answers, if neither side differs by more than a factor of two; there, the
entries for the least number of rows that is not below what is asked, or else for the largest.
Implementation and block sizes may thus change with the number of rows, so that the last bits of a
sequence's numbers, which its batch does not change otherwise, depend on what runs beside it.

A kernel that has block sizes takes those that it can use for the call at hand from `blocks`, and
keeps its defaults for the others; its module may have a function `candidates(kind, rows, n, k)`
that lists block sizes worth measuring, each a dict by the names that `blocks` returns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pallas_kernels import measurements, platform
from pallas_kernels.measurements import Measurement
from pallas_kernels.user_cache import cache_folder

MAX_RATIO = 2.0  # by which n or k of an entry may differ from what is asked

_trying: ContextVar[Mapping[str, int] | None] = ContextVar("blocks_on_trial", default=None)


def blocks(
    op: str, implementation: str, kind: str, rows: int, n: int, k: int
) -> dict[str, int] | None:
    """Block sizes measured best for an implementation, by its own names; None where there are none.

    Raises:
      TableError: a table of this device is damaged.
    """
    if (trial := _trying.get()) is not None:
        return dict(trial)
    found = _nearest(
        [e for e in _of_device() if e.implementation == implementation], op, kind, rows, n, k
    )
    return dict(found.blocks) if found is not None and found.blocks else None


def preferred(op: str, kind: str, rows: int, n: int, k: int) -> str | None:
    """The implementation measured fastest; None where nothing was measured.

    Raises:
      TableError: a table of this device is damaged.
    """
    found = _nearest(_of_device(), op, kind, rows, n, k)
    return None if found is None else found.implementation


def product_kind(weight: str, x_dtype: Any) -> str:
    """`WeightSpec.kind`, and the dtype of x where x are codes of a byte: "int8 channel float32 by
    int8"."""
    dtype = np.dtype(x_dtype)
    return weight if dtype.itemsize > 1 else f"{weight} by {dtype.name}"


def attention_kind(cache_dtype: str, head_dim: int) -> str:
    """What attentions of one speed have in common: "int8 d128"."""
    return f"{cache_dtype} d{head_dim}"


@contextmanager
def trying(block_sizes: Mapping[str, int]) -> Iterator[None]:
    """Has `blocks` answer these for whatever is traced inside: to measure them."""
    token = _trying.set(block_sizes)
    try:
        yield
    finally:
        _trying.reset(token)


def user_table(device: str) -> Path:
    """Where `qjax tune` puts what it measures on a device."""
    return cache_folder() / "tuning" / measurements.file_name(device)


def tables(device: str) -> list[Path]:
    """Files with measurements of a device that are there, the one that holds last."""
    if not device:
        return []
    packaged = Path(__file__).parent / "tables" / measurements.file_name(device)
    return [path for path in (packaged, user_table(device)) if path.is_file()]


def version() -> str:
    """Changes whenever a table of this device does: part of the key of whatever was traced."""
    return repr(_stamps(platform.device().name))


def _of_device() -> tuple[Measurement, ...]:
    device = platform.device().name
    return _read(device, _stamps(device))


def _stamps(device: str) -> tuple[tuple[str, int, int], ...]:
    stats = ((path, path.stat()) for path in tables(device))
    return tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats)


@lru_cache(maxsize=8)
def _read(device: str, stamps: tuple[tuple[str, int, int], ...]) -> tuple[Measurement, ...]:
    entries = [e for path, _, _ in stamps for e in measurements.read(Path(path), device)]
    return tuple({entry.key: entry for entry in entries}.values())


def _nearest(
    entries: Iterable[Measurement], op: str, kind: str, rows: int, n: int, k: int
) -> Measurement | None:
    """The fastest of those for the nearest shape and number of rows."""

    def distance(entry: Measurement) -> float:
        return abs(math.log(entry.n / n)) + abs(math.log(entry.k / k))

    def near(size: int, wanted: int) -> bool:
        return 1 / MAX_RATIO <= size / wanted <= MAX_RATIO

    fitting = [e for e in entries if (e.op, e.kind) == (op, kind) and near(e.n, n) and near(e.k, k)]
    if not fitting:
        return None
    closest = min(fitting, key=lambda e: (distance(e), e.n))
    at_shape = [e for e in fitting if (e.n, e.k) == (closest.n, closest.k)]
    bound = min((e.rows for e in at_shape if e.rows >= rows), default=max(e.rows for e in at_shape))
    return min((e for e in at_shape if e.rows == bound), key=lambda e: e.microseconds)
