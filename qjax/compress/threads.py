"""Work in two threads: this hides what runs on one core; each has more work for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

From = TypeVar("From")
To = TypeVar("To")

_AT_ONCE = 2


def side_by_side(function: Callable[[From], To], items: Sequence[From]) -> Iterator[To]:
    """function(item) of each, in order, two at a time."""
    with ThreadPoolExecutor(_AT_ONCE, "qjax-quantize") as pool:
        # Each in a context of its own: `dispatch.use` holds in the pool's threads too.
        contexts = [copy_context() for _ in items]
        yield from pool.map(lambda own, item: own.run(function, item), contexts, items)
