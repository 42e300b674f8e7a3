"""Which implementation of an operation runs.

Every operation lists its implementations in order of preference. One that cannot take a call says
so while it is traced, by raising `NotImplementedError` with the reason, and the next one is tried.
Somebody who names an implementation gets that one or an error, never another; several names, with
commas between them, are tried in their order.

Where a table says which is fastest (`tuning`), that one is tried first.

The choice is made when a call is traced: a function that is already compiled keeps the
implementation it was compiled with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

ENVIRONMENT_VARIABLE = "QJAX_IMPLEMENTATION"

Implementations = Sequence[tuple[str, Callable[..., Any]]]

_named: ContextVar[str | None] = ContextVar("implementation", default=None)
Choice = tuple[str, dict[str, str]]
_chosen: dict[str, Choice] = {}
_watching: ContextVar[dict[str, Choice] | None] = ContextVar("watched_choices", default=None)


def named() -> str | None:
    """The implementation asked for by `use` or the environment, or None for the first that fits."""
    return _named.get() or os.environ.get(ENVIRONMENT_VARIABLE) or None


def is_wanted(implementation: str) -> bool:
    """Whether this one may run: it was named, or nothing was."""
    names = named()
    return names is None or implementation in names.split(",")


@contextmanager
def use(implementation: str | None) -> Iterator[None]:
    """Names the implementation of all operations traced inside the block; None lifts a naming."""
    token = _named.set(implementation)
    try:
        yield
    finally:
        _named.reset(token)


def chosen() -> dict[str, Choice]:
    """What ran so far: operation -> (implementation, {implementation that refused: its reason})."""
    return dict(_chosen)


@contextmanager
def watch() -> Iterator[dict[str, Choice]]:
    """What is chosen inside the block, as `chosen` has it, in the order in which calls end."""
    found: dict[str, Choice] = {}
    token = _watching.set(found)
    try:
        yield found
    finally:
        _watching.reset(token)


def call(
    op: str,
    implementations: Implementations,
    *args: Any,
    implementation: str | None = None,
    preferred: str | None = None,
    **kwargs: Any,
) -> Any:
    """Calls the first implementation that takes these arguments.

    Args:
      op: name under which the choice is recorded, see `chosen`.
      implementations: (name, function) pairs, the preferred one first.
      implementation: run this one (or these) only; else what `named` says; else try all in order.
      preferred: where none is named, the one to try first: what was measured to be the fastest.

    Raises:
      NotImplementedError: none fits (all reasons are listed), or the named one refuses.
      ValueError: the operation has no implementation of that name.
    """
    wanted = implementation or named()
    if wanted is not None:
        names = wanted.split(",")
        asked_for = [pair for name in names for pair in implementations if pair[0] == name]
        implementations = asked_for or _unknown(op, wanted, implementations)
    else:
        implementations = sorted(implementations, key=lambda pair: pair[0] != preferred)
    refused: dict[str, str] = {}
    for name, function in implementations:
        try:
            # What it calls in turn is named with it.
            with use(wanted):
                result = function(*args, **kwargs)
        except NotImplementedError as error:
            refused[name] = str(error)
            continue
        _chosen[op] = (name, refused)
        if (watching := _watching.get()) is not None:
            watching.pop(op, None)
            watching[op] = (name, refused)
        return result
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    raise NotImplementedError(f"{op}: no implementation takes this call ({reasons})")


def _unknown(op: str, wanted: str, implementations: Implementations) -> Implementations:
    names = ", ".join(name for name, _ in implementations)
    raise ValueError(f"{op}: no implementation named {wanted!r}; there are: {names}")
