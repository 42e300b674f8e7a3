"""What is measured: operations at the sizes of models, each as a call that a clock can time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch, platform
from pallas_kernels.kv_update import kv_update, pages
from pallas_kernels.matmul_grouped import matmul_grouped
from pallas_kernels.paged_attention import AttentionSpec, paged_attention
from pallas_kernels.quantize import quantize
from qjax import ops
from qjax.bench import clock
from qjax.bench.clock import Timing
from qjax.bench.weights import KINDS, on_device
from qjax.engine.batch import DECODE_ROWS
from qjax.engine.runner import numerics_for
from qjax.kv_cache import Batch
from qjax.ops.linear import ACTIVATION_DTYPES
from qjax.qarray import ActSpec, QArray

EXPERTS = 8
PAGE_SIZE = 16
ACTS = {
    "int8 token": ActSpec("int8", "token", dynamic=True),
    "fp8_e4m3 token": ActSpec("fp8_e4m3", "token", dynamic=True),
    "fp8_e4m3 g128": ActSpec("fp8_e4m3", "group", dynamic=True, group_size=128),
    "mxfp8": ActSpec("fp8_e4m3", "group", dynamic=True, group_size=32, scale="e8m0"),
}
# What inputs are rounded to -> arithmetic that matrix units do faster than that of bfloat16.
PEAKS = {"int8": "int8", "fp8_e4m3": "fp8_e4m3"}
# Attention of Llama-3-8B.
ATTENTION = AttentionSpec(32, 8, 128, 128, 128**-0.5)


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    Attributes:
      op, kind, n, k, rows: for "matmul" and "matmul_grouped" a name in `KINDS` and the shape of a
        weight; for "quantize" one in `ACTS`, rows of k; for attention the dtype of the pages, n kv
        heads, k positions, and as many sequences, or new tokens of one sequence, as there are rows.
      weight: makes the weight of a product as the implementation that will run wants it, where
        `kind` does not tell.
      attention: of the heads, where they are not those of Llama-3-8B.
    """

    op: str
    kind: str
    n: int
    k: int
    rows: int
    weight: Callable[[], QArray] | None = field(default=None, compare=False)
    attention: AttentionSpec | None = None


@dataclass(frozen=True)
class Operands:
    """A case, ready to be run.

    Attributes:
      call, x, fixed, states: for `clock.seconds`; functions that make a copy of the operands.
      nbytes: that one call moves. copied: of them, what a copy holds.
      flops: of one call, multiplications and additions.
      peak: the numeric type whose arithmetic it is held against.
    """

    call: clock.Call
    x: jax.Array
    nbytes: int
    flops: int
    fixed: Callable[[], Any] = lambda: None
    state: Callable[[], Any] = lambda: None
    copied: int = 0
    peak: str = "bfloat16"


@dataclass(frozen=True)
class Measured:
    """How a case went.

    Attributes:
      implementation: that ran. refused: those before it, and why.
      seconds: of a call; None where nothing took it (`refused` says why).
    """

    case: Case
    implementation: str = ""
    refused: dict[str, str] = field(default_factory=dict)
    seconds: float | None = None
    nbytes: int = 0
    flops: int = 0
    peak: str = "bfloat16"


@dataclass(frozen=True)
class Ready:
    """A case, compiled: with how many copies of its operands, and which implementation."""

    case: Case
    operands: Operands
    program: clock.Program
    copies: int
    implementation: str
    refused: dict[str, str]


def prepare(
    case: Case,
    timing: Timing,
    implementation: str | None = None,
    bandwidth: float = 1e12,
    peak: float = 1e15,
    most_bytes: int = 1 << 33,
) -> Ready | Measured:
    """Compiles a case, with one implementation or the one that is chosen without naming any.

    Args:
      bandwidth, peak: what the device may reach, for how often a call is repeated.
      most_bytes: that copies of operands may take together.

    Returns:
      The case, ready for `timed`, or refused.
    """
    with dispatch.use(implementation), dispatch.watch() as seen:
        try:
            operands = _OPS[case.op](case)
            fits = most_bytes // max(operands.copied, 1)
            copies = max(1, min(timing.copies(operands.copied), fits))
            estimate = max(operands.nbytes / bandwidth, operands.flops / peak) + 3e-6
            fixed, state = jax.eval_shape(operands.fixed), jax.eval_shape(operands.state)
            program = clock.program(
                operands.call, operands.x, [fixed] * copies, [state] * copies, estimate, timing
            )
        except NotImplementedError as error:
            return Measured(case, implementation or "", {implementation or "all": str(error)})
    op = "paged_attention" if case.op == "prefill_attention" else case.op
    # The product itself comes last; what XLA does with a plain dot is nobody's choice.
    choices = [choice for name, choice in seen.items() if name.split()[0] == op]
    return Ready(case, operands, program, copies, *(choices[-1] if choices else ("xla", {})))


def timed(ready: Ready | Measured, timing: Timing) -> Measured:
    """Takes the time of a case that was prepared."""
    if isinstance(ready, Measured):
        return ready
    operands, many = ready.operands, range(ready.copies)
    fixed, states = [operands.fixed() for _ in many], [operands.state() for _ in many]
    seconds = clock.seconds(ready.program, operands.x, fixed, states, timing)
    rest = operands.nbytes, operands.flops, operands.peak
    return Measured(ready.case, ready.implementation, ready.refused, seconds, *rest)


def measure(case: Case, timing: Timing, implementation: str | None = None) -> Measured:
    """`prepare` and `timed`."""
    return timed(prepare(case, timing, implementation), timing)


def values(case: Case, implementation: str) -> np.ndarray:
    """What a case computes, as float64."""
    with dispatch.use(implementation):
        operands = _OPS[case.op](case)
        y, _ = jax.jit(operands.call)(operands.x, operands.fixed(), operands.state())
    return np.asarray(y, np.float64)


def fast_numerics(rows: int) -> str:
    """What "fast" comes to for products of so many rows: `Batch.numerics`."""
    numerics = numerics_for("fast", rows)
    return numerics.decode if rows <= DECODE_ROWS[-1] else numerics.prefill


def batch_of(rows: int, numerics: str) -> Batch:
    """A batch of one new token for each of so many sequences, for products alone."""
    positions, starts = np.zeros(rows, np.int32), np.arange(rows + 1, dtype=np.int32)
    table = np.zeros((rows, 1), np.int32)
    return Batch(positions, starts, np.ones(rows, np.int32), table, numerics=numerics)


def inputs(rows: int, k: int) -> jax.Array:
    """float32 [rows, k], standard normal."""
    return jax.random.normal(jax.random.key(0), (rows, k), jnp.float32)


def _matmul(case: Case) -> Operands:
    weight = case.weight() if case.weight else on_device(KINDS[case.kind], case.n, case.k)
    batch = batch_of(case.rows, fast_numerics(case.rows))

    def call(x: jax.Array, w: QArray, state: None) -> tuple[jax.Array, None]:
        return ops.linear(x, w, batch=batch), state

    return Operands(
        call,
        inputs(case.rows, case.k),
        weight.nbytes + 4 * case.rows * (case.k + case.n),
        2 * case.rows * case.n * case.k,
        _copier(weight),
        copied=weight.nbytes,
        peak=_peak(weight, batch.numerics),
    )


def _peak(weight: QArray, numerics: str) -> str:
    """Whose arithmetic could serve: of what inputs are rounded to, by the weight or by us."""
    if numerics == "int8":
        return "int8"
    return "bfloat16" if weight.act is None else PEAKS.get(weight.act.dtype, "bfloat16")


def _matmul_grouped(case: Case) -> Operands:
    if case.weight:
        weight = case.weight()
    else:
        weight = on_device(KINDS[case.kind], case.n, case.k, EXPERTS)
    experts = weight.qvalue.shape[0]
    # As evenly as rows go; few rows meet few experts.
    sizes = np.bincount(np.arange(case.rows) % experts, minlength=experts).astype(np.int32)
    used = weight.nbytes * int((sizes > 0).sum()) // experts
    activation_dtype = ACTIVATION_DTYPES[fast_numerics(case.rows)]

    def call(x: jax.Array, w: QArray, state: None) -> tuple[jax.Array, None]:
        pair = w.spec, w.arrays
        y = matmul_grouped(x, jnp.asarray(sizes), pair, activation_dtype=activation_dtype)
        return y, state

    return Operands(
        call,
        inputs(case.rows, case.k),
        used + 4 * case.rows * (case.k + case.n),
        2 * case.rows * case.n * case.k,
        _copier(weight),
        copied=weight.nbytes,
    )


def _bfloat16(case: Case) -> Operands:
    """The product of bfloat16 with bfloat16 as XLA has it: what the others are held against."""
    key = jax.random.key(1)

    def weight() -> jax.Array:
        return jax.random.normal(key, (case.n, case.k), jnp.bfloat16)

    def call(x: jax.Array, w: jax.Array, state: None) -> tuple[jax.Array, None]:
        dot = jax.lax.dot_general(
            x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        return dot, state

    nbytes = 2 * case.n * case.k
    return Operands(
        call,
        inputs(case.rows, case.k).astype(jnp.bfloat16),
        nbytes + 2 * case.rows * case.k + 4 * case.rows * case.n,
        2 * case.rows * case.n * case.k,
        weight,
        copied=nbytes,
    )


def _quantize(case: Case) -> Operands:
    act = ACTS[case.kind]

    def call(x: jax.Array, fixed: None, state: None) -> tuple[Any, None]:
        return quantize(x, act), state

    # float32 is read, codes of a byte are written; what scales take hardly counts.
    return Operands(
        call,
        inputs(case.rows, case.k),
        5 * case.rows * case.k,
        4 * case.rows * case.k,
    )


def _kv_update(case: Case) -> Operands:
    """One new token for each of so many sequences, the first of a page of its own."""
    batch = batch_of(case.rows, "exact")
    head_dim = ATTENTION.head_dim
    cos = jnp.ones((case.rows, head_dim // 2), jnp.float32)
    shape = (case.rows, case.n, PAGE_SIZE, head_dim)

    def call(k: jax.Array, fixed: None, cache: Any) -> tuple[Any, Any]:
        cache = kv_update(
            k,
            k,
            *cache,
            block_table=jnp.arange(case.rows, dtype=jnp.int32)[:, None],
            query_start_loc=jnp.asarray(batch.query_start_loc),
            seq_lens=jnp.asarray(batch.seq_lens),
            rope=(cos, 0 * cos),
        )
        return (), cache

    cached = _held(shape, case.kind)
    return Operands(
        call,
        inputs(case.rows, case.n * head_dim),
        8 * case.rows * case.n * head_dim + cached // PAGE_SIZE,
        8 * case.rows * case.n * head_dim,
        state=lambda: (_filled(shape, case.kind), _filled(shape, case.kind)),
        copied=cached,
    )


def _attention(case: Case, sequences: int, context: int, spec: AttentionSpec) -> Operands:
    """`case.rows` new tokens, shared evenly among sequences that have `context` tokens by then."""
    new, per_sequence = case.rows // sequences, -(-context // PAGE_SIZE)
    count = sequences * per_sequence
    table = np.arange(count, dtype=np.int32).reshape(sequences, per_sequence)
    starts = np.arange(sequences + 1, dtype=np.int32) * new
    lengths = np.full(sequences, context, np.int32)
    wide, narrow = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    cos = jnp.ones((case.rows, spec.rotary_dim // 2), jnp.float32)
    key = inputs(case.rows, narrow)

    def call(q: jax.Array, fixed: None, cache: Any) -> tuple[jax.Array, Any]:
        out, *cache = paged_attention(
            q,
            key,
            key,
            *cache,
            spec=spec,
            block_table=jnp.asarray(table),
            query_start_loc=jnp.asarray(starts),
            seq_lens=jnp.asarray(lengths),
            rope=(cos, 0 * cos),
        )
        return out, tuple(cache)

    shape = (count, spec.num_kv_heads, PAGE_SIZE, spec.head_dim)

    cached = _held(shape, case.kind)
    nbytes = cached * context // (per_sequence * PAGE_SIZE)
    seen = sequences * sum(range(context - new + 1, context + 1))
    return Operands(
        call,
        inputs(case.rows, wide),
        nbytes + 4 * case.rows * (2 * wide + 2 * narrow),
        4 * seen * spec.num_heads * spec.head_dim,
        state=lambda: (_filled(shape, case.kind), _filled(shape, case.kind)),
        copied=cached,
    )


def _held(shape: tuple[int, int, int, int], dtype: str) -> int:
    """Bytes of the pages of keys and of values."""
    held = pages.empty(shape, dtype, jax.ShapeDtypeStruct)
    return 2 * sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(held))


def _filled(shape: tuple[int, int, int, int], dtype: str) -> pages.Pages:
    """Pages of numbers; which of them stands where does not matter."""
    drawn = jax.random.normal(jax.random.key(2), (1, *shape[1:]), jnp.float32)
    one = pages.encode(drawn, dtype)
    return jax.tree.map(lambda a: jnp.tile(a, (shape[0], *[1] * (a.ndim - 1))), one)


def _decode_attention(case: Case) -> Operands:
    return _attention(case, case.rows, case.k, _spec(case))


def _prefill_attention(case: Case) -> Operands:
    return _attention(case, 1, case.k, _spec(case))


def _spec(case: Case) -> AttentionSpec:
    if case.attention is not None:
        return case.attention
    heads, own = ATTENTION.num_heads // ATTENTION.num_kv_heads, ATTENTION.head_dim
    return AttentionSpec(case.n * heads, case.n, own, own, ATTENTION.scale)


def _copier(operand: Any) -> Callable[[], Any]:
    return lambda: jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), operand)


_OPS: dict[str, Callable[[Case], Operands]] = {
    "bfloat16": _bfloat16,
    "matmul": _matmul,
    "matmul_grouped": _matmul_grouped,
    "quantize": _quantize,
    "kv_update": _kv_update,
    "paged_attention": _decode_attention,
    "prefill_attention": _prefill_attention,
}
OPS = tuple(_OPS)


def implementations(names: Sequence[str]) -> list[str]:
    """Those of an op that are worth trying here: on a CPU, none that would be interpreted."""
    here = platform.device_kind()
    return [n for n in names if n != "ref" and (here != "cpu" or n in ("native", "xla"))]
