"""Measures block sizes and implementations on this device, for the tables that kernels read.

An implementation that has block sizes lists those worth measuring (`candidates` of its module). On
a CPU none has: there it is only measured which implementation is the fastest.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from threading import Lock
from typing import Any

import jax
import numpy as np

from pallas_kernels import dispatch, measurements, platform, tuning
from pallas_kernels.matmul import api as matmul
from pallas_kernels.matmul import coded
from pallas_kernels.matmul_grouped import api as matmul_grouped
from pallas_kernels.measurements import Measurement
from pallas_kernels.paged_attention import AttentionSpec
from pallas_kernels.paged_attention import api as paged_attention
from pallas_kernels.quantize.spec import code_dtype
from qjax import ops
from qjax.bench import cases
from qjax.bench.cases import Case, Measured, Ready
from qjax.bench.clock import TOGETHER, Timing
from qjax.bench.weights import KINDS, draw, on_device
from qjax.errors import QjaxError
from qjax.params import Params
from qjax.qarray import QArray

ROWS = (1, 8, 32, 128, 1024)
ROWS_OF_A_KIND = 128  # no group of rows is larger
CONTEXTS = (2048, 8192)
SEQUENCES = (1, 8, 32)
CACHE_DTYPES = ("bfloat16", "fp8_e4m3", "int8")
TIMING = Timing(repeats=3, sample_seconds=0.005, limit_seconds=0.5)
# Of what the fastest block sizes compute, relative to what XLA does.
LARGEST_ERROR = 1e-2

_IMPLEMENTATIONS = {
    "matmul": matmul.IMPLEMENTATIONS,
    "matmul_grouped": matmul_grouped.IMPLEMENTATIONS,
    "paged_attention": paged_attention.IMPLEMENTATIONS,
}


class NothingToTune(QjaxError):
    """There is no weight whose product could be measured."""


def of_model(params: Params, rows: Sequence[int] = ROWS) -> list[Case]:
    """The products of a model, each kind and shape once, and its attention on an accelerator."""
    config, tree = params.config, params.tree
    embedding = tree["model"]["embed_tokens"]["weight"]
    found: dict[tuple[str, str, int, int], QArray] = {}
    for leaf in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, QArray)):
        if isinstance(leaf, QArray) and (leaf is not embedding or "lm_head" not in tree):
            op = "matmul_grouped" if leaf.qvalue.ndim > 2 else "matmul"
            found.setdefault((op, _kind(leaf), *leaf.shape), leaf)
    products = []
    for (op, kind, n, k), leaf in found.items():
        weight = _once(partial(_relaid, leaf))
        products += [Case(op, kind, n, k, count, weight) for count in rows]
    heads = config.num_kv_heads
    spec = AttentionSpec(
        config.num_heads, heads, config.head_dim, config.head_dim, config.query_scale
    )
    return products + _attention(heads, spec)


def of_shapes(
    kinds: Sequence[str], shapes: Sequence[tuple[int, int]], rows: Sequence[int] = ROWS
) -> list[Case]:
    """Products with weights of kinds in `weights.KINDS` and of these shapes (n, k)."""

    found = []
    for name in kinds:
        for n, k in shapes:
            kind = _kind(ops.prepare(draw(KINDS[name], ROWS_OF_A_KIND, k)))
            weight = _once(partial(on_device, KINDS[name], n, k))
            found += [Case("matmul", kind, n, k, count, weight) for count in rows]
    return found


def _kind(weight: QArray) -> str:
    """Under which kind tables have the product of a weight that is laid out for this device."""
    act, kind = weight.act, weight.spec.kind
    if act is None or not act.symmetric or not coded.takes_inputs([weight.spec], act):
        return kind
    return tuning.product_kind(kind, code_dtype(act.dtype))


def _attention(heads: int, spec: AttentionSpec) -> list[Case]:
    if platform.device_kind() == "cpu":
        return []
    return [
        Case("paged_attention", dtype, heads, context, count, attention=spec)
        for dtype in CACHE_DTYPES
        for context in CONTEXTS
        for count in SEQUENCES
    ]


def _relaid(weight: QArray) -> QArray:
    """A weight of a model as the implementation that is named wants it."""
    host = jax.tree.map(np.asarray, weight)
    canonical = host if weight.layout == "canonical" else ops.unprepare(host)
    return jax.device_put(ops.prepare(canonical))


def _once(make: Callable[[], QArray]) -> Callable[[], QArray]:
    """Makes a weight once a layout: on an accelerator all implementations read that of models, on a
    CPU each its own.
    """
    made: dict[str | None, QArray] = {}
    lock = Lock()

    def weight() -> QArray:
        named = dispatch.named() if platform.device_kind() == "cpu" else None
        with lock, dispatch.use(named):
            if named not in made:
                made.clear()
                made[named] = make()
            return made[named]

    return weight


def run(
    wanted: Iterable[Case],
    *,
    implementations: Sequence[str] = (),
    timing: Timing = TIMING,
    budget_seconds: float | None = None,
    prepare: Callable[..., Ready | Measured] = cases.prepare,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> list[Measurement]:
    """Measures cases and enters the best of each implementation into the user's table.

    Args:
      wanted: see `of_model` and `of_shapes`.
      implementations: by name; none for all that are not interpreted here.
      budget_seconds: after so long no further case begins.
      prepare: compiles a case, see `cases.prepare`.

    Returns:
      What was entered. The table is written after each case.

    Raises:
      TableError: the user's table is damaged.
      NothingToTune: nothing is wanted, or nothing takes any of it.
    """
    device, begin = platform.device().name, time.monotonic()
    path, entered = tuning.user_table(device), []
    before = measurements.read(path, device) if path.is_file() else []
    if platform.device_kind() == "cpu":
        say("on a CPU there are no block sizes to tune; measuring which implementation is fastest")
    for case in wanted:
        if budget_seconds and time.monotonic() - begin > budget_seconds:
            say("out of time")
            break
        found = list(_best(case, implementations, timing, prepare, say))
        if not found:
            continue
        entered += found
        measurements.write(path, device, [*before, *entered])
        first = min(found, key=lambda entry: entry.microseconds)
        others = ", ".join(f"{e.implementation} {e.microseconds:.1f} us" for e in found)
        say(f"{case.op} {first.kind} {case.n}x{case.k}, {case.rows} rows: {others}")
    if not entered:
        raise NothingToTune("nothing was measured: no weight, or none that is taken here")
    return entered


def _best(
    case: Case,
    implementations: Sequence[str],
    timing: Timing,
    prepare: Callable[..., Ready | Measured],
    say: Callable[[str], None],
) -> Iterator[Measurement]:
    """The fastest block sizes of each implementation whose values are right."""
    known = dict(_IMPLEMENTATIONS[case.op])
    kind = case.kind
    if case.op == "paged_attention":
        spec = case.attention or cases.ATTENTION
        kind = tuning.attention_kind(case.kind, spec.head_dim)
    for name in implementations or cases.implementations(list(known)):
        if name not in known:
            raise QjaxError(f"{case.op} has no implementation {name!r}: {', '.join(known)}")
        timed: list[tuple[float, Mapping[str, int]]] = []
        candidates = _candidates(known[name], kind, case)
        for blocks, ready in _prepared(candidates, partial(prepare, case, timing, name)):
            try:
                seconds = cases.timed(ready.result(), timing).seconds
            except Exception as error:  # a compiler's: the other block sizes are still wanted
                say(f"{name} {dict(blocks)}: {type(error).__name__}: {str(error)[:200]}")
                continue
            if seconds is not None:
                timed.append((seconds, blocks))
        for seconds, blocks in sorted(timed, key=lambda pair: pair[0]):
            if name != "xla" and not _is_right(case, name, blocks):
                say(f"{name} {dict(blocks)}: wrong values")
                continue
            size = case.n, case.k, case.rows
            time_us = float(f"{seconds * 1e6:.4g}")
            yield Measurement(case.op, kind, *size, name, dict(blocks), time_us, jax.__version__)
            break


def _prepared(
    candidates: Iterable[Mapping[str, int]], prepare: Callable[[], Ready | Measured]
) -> Iterator[tuple[Mapping[str, int], Future[Ready | Measured]]]:
    """A case with all block sizes, compiled side by side, some at a time."""

    def compiled(blocks: Mapping[str, int]) -> Ready | Measured:
        with tuning.trying(blocks):
            return prepare()

    left = list(candidates)
    while left:
        some, left = left[:TOGETHER], left[TOGETHER:]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            futures = [pool.submit(compiled, blocks) for blocks in some]
        yield from zip(some, futures, strict=True)


def _candidates(function: Any, kind: str, case: Case) -> Iterator[Mapping[str, int]]:
    """The defaults, and what the module of an implementation lists."""
    yield {}
    listed = getattr(sys.modules[function.__module__], "candidates", None)
    if listed is not None:
        yield from listed(kind, case.rows, case.n, case.k)


def _is_right(case: Case, name: str, blocks: Mapping[str, int]) -> bool:
    """Whether an implementation computes with these block sizes what XLA does."""
    with tuning.trying(blocks):
        found = cases.values(case, name)
    wanted = cases.values(case, "xla")
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    return bool(error <= LARGEST_ERROR)
