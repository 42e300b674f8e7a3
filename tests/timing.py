"""How long something takes, on machines and in processes where much else is going on."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def within_a_second() -> Iterator[None]:
    """Asserts that the body takes less than a second of the processor, however it ends.

    A garbage collection of all that a long test run left behind would be counted too: none is made.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    start = time.process_time()
    try:
        yield
    finally:
        elapsed = time.process_time() - start
        if was_enabled:
            gc.enable()
    assert elapsed < 1
