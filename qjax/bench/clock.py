"""The time of one call, as it is inside a model: compiled, operands not in a cache, no dispatch.

Calls go round in a loop of one compiled program, through several copies of what they read: a model
reads each of its weights once a step, when the ones before have pushed it out of the caches. Each
round's input depends on the outputs of the round before, and all outputs are kept, so that no call
can be left out, merged, moved out of the loop or cut down to the part that somebody reads.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import platform

MAX_ROUNDS = 1000
TOGETHER = 16  # programs that are compiled side by side, before any is measured


@dataclass(frozen=True)
class Timing:
    """How long to measure.

    Attributes:
      repeats: of which the median is taken.
      sample_seconds: what one repeat lasts at least, as far as can be foretold.
      limit_seconds: no further repeat begins after so long.
      spread_bytes: how much copies take together, well beyond the caches.
      most_copies: each takes its time to compile.
      now: the clock.
    """

    repeats: int = 5
    sample_seconds: float = 0.02
    limit_seconds: float = 1.5
    spread_bytes: int = 200_000_000
    most_copies: int = 8
    now: Callable[[], float] = time.perf_counter

    def copies(self, nbytes: int) -> int:
        """How many copies of operands of so many bytes are gone through."""
        return min(self.most_copies, max(1, math.ceil(self.spread_bytes / max(nbytes, 1))))


ON_CPU = Timing(most_copies=24)  # whose last cache may be shared, and larger than it says
QUICK = Timing(repeats=3, sample_seconds=0.002, limit_seconds=0.3, spread_bytes=1)

# (x, operands that stay, operands that change) -> (outputs, the latter changed)
Call = Callable[[jax.Array, Any, Any], tuple[Any, Any]]


@dataclass(frozen=True)
class Program:
    """Calls in a loop, compiled: `rounds` times through all copies; `y`, shapes of the outputs."""

    run: jax.stages.Compiled
    rounds: int
    y: Any


def program(
    call: Call,
    x: Any,
    fixed: Sequence[Any],
    states: Sequence[Any],
    estimate: float,
    timing: Timing,
) -> Program:
    """Compiles what `seconds` runs.

    Args:
      call: what is measured; traceable.
      x: its input.
      fixed, states: copies of its other operands, a pytree each, equally many. All may be shapes.
      estimate: seconds that a call may take, for the number of rounds.
    """
    rounds = math.ceil(timing.sample_seconds / (estimate * len(fixed)))
    rounds = min(MAX_ROUNDS, max(1, rounds))
    call = jax.jit(call)  # traced once for all copies
    y = jax.eval_shape(call, x, fixed[0], states[0])[0]
    carry = x, [y for _ in fixed], list(states)
    zero = jax.ShapeDtypeStruct((), jnp.float32)
    run = jax.jit(_rounds(call, rounds), donate_argnums=0).lower(carry, list(fixed), zero)
    return Program(run.compile(), rounds, y)


def seconds(
    program: Program, x: jax.Array, fixed: Sequence[Any], states: Sequence[Any], timing: Timing
) -> float:
    """Median time of one call.

    Args:
      x, fixed, states: as for `program`, arrays now; `states` are donated.
    """
    ys = [jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), program.y) for _ in fixed]
    carry = jnp.array(x), ys, list(states)  # a copy, since it is donated
    # Known only when it runs, or a compiler would know that x does not change.
    zero, fixed = jnp.float32(0), list(fixed)
    carry = jax.block_until_ready(program.run(carry, fixed, zero))
    begin, samples = timing.now(), []
    while not samples or (
        len(samples) < timing.repeats and timing.now() - begin < timing.limit_seconds
    ):
        start = timing.now()
        carry = jax.block_until_ready(program.run(carry, fixed, zero))
        samples.append(timing.now() - start)
    return statistics.median(samples) / program.rounds / len(fixed)


def _rounds(call: Call, rounds: int) -> Callable[..., Any]:
    # A CPU would run calls side by side. Accelerators run one kernel after the other, but XLA would
    # make one product of several with one x, and round that x only once.
    on_cpu = platform.device_kind() == "cpu"

    def after(x: jax.Array, ys: Any, zero: jax.Array) -> jax.Array:
        """x as it is, but not before there are outputs."""
        firsts = [y[(0,) * y.ndim].astype(jnp.float32) for y in jax.tree.leaves(ys)]
        if not firsts:
            return x
        return x.at[(0,) * x.ndim].add((zero * jnp.stack(firsts).sum()).astype(x.dtype))

    def run(carry: Any, fixed: list[Any], zero: jax.Array) -> Any:
        def one_round(_: Any, carry: Any) -> Any:
            x, ys, states = carry
            x = after(x, ys, zero)
            new_ys, new_states = [], []
            for operands, state in zip(fixed, states, strict=True):
                y, state = call(x, operands, state)
                new_ys.append(y)
                new_states.append(state)
                x = after(x, y, zero) if on_cpu else lax.optimization_barrier((x, y))[0]
            return x, new_ys, new_states

        return lax.fori_loop(0, rounds, one_round, carry)

    return run
