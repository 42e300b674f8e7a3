"""Compiles a grammar in a process of its own, where it can neither stall nor crash an engine.

llguidance counts most of its work, but not all: some grammars take it minutes or gigabytes, or
recurse past its stack. This process has half a second of processor time, a small stack and little
memory, and dies of all these. It is run as a script, and needs nothing of qjax.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# Counted by llguidance, the same everywhere. Its own limits allow steps of seconds, and a gigabyte.
LIMITS = {
    "initial_lexer_fuel": 100_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_items_in_row": 500,  # four for each optional property of an object
    "max_grammar_size": 100_000,
    "max_lexer_states": 5_000,
    "verbose_errors": False,
}
_SECONDS = 0.5
_STACK = 1 << 21  # bytes; threads elsewhere have four times as much
_MEMORY = 1 << 30
_STEPS = 4  # tried after compiling
_PATIENCE = 60  # seconds until a process that gets no processor time is given up


def check(grammar: str) -> str | None:
    """What is wrong with a grammar in llguidance's notation, or None."""
    import llguidance

    packages = Path(llguidance.__file__).parent.parent
    command = [sys.executable, "-P", __file__, str(packages)]
    try:
        done = subprocess.run(
            command, input=grammar.encode(), capture_output=True, timeout=_PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        return "it takes too long to compile"
    if done.returncode != 0:  # of a signal, as it comes to the limits
        return "it takes too much time or memory to compile"
    return done.stdout.decode("utf-8", "replace") or None


def _main(packages: str) -> None:
    import contextlib
    import resource
    import signal
    import threading

    with contextlib.suppress(ValueError, OSError):  # not everywhere
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.path.append(packages)
    grammar = sys.stdin.buffer.read().decode()

    def compile_it() -> None:
        sys.stdout.write(_compile(grammar))

    signal.setitimer(signal.ITIMER_PROF, _SECONDS)
    threading.stack_size(_STACK)
    thread = threading.Thread(target=compile_it)
    thread.start()
    thread.join()


def _compile(grammar: str) -> str:
    """What is wrong with the grammar, or nothing."""
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=LLParserLimits(**LIMITS))
    for _ in range(_STEPS):
        if matcher.is_error() or matcher.is_stopped():
            break
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if mask:
            matcher.consume_token((mask & -mask).bit_length() - 1)
    return matcher.get_error()


if __name__ == "__main__":
    _main(sys.argv[1])
