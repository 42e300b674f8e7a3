"""One set of cases for every implementation of paged attention, against numpy in float64.

What the oracle attends to is what a cache of each dtype holds, by formulas of its own.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.paged_attention import AttentionSpec, Basis, empty, paged_attention
from tests.pallas_kernels.cached import (
    EPS,
    QUICKLY,
    basis_of,
    cached,
    in_basis,
    spread,
    spreads_keys,
    turned,
)

PAGE = 16
ALL_DTYPES = ("float32", "bfloat16", "fp8_e4m3", "fp8_e5m2", "int8", "int4")
# What the pages of each implementation may be.
DTYPES = {
    "native": ALL_DTYPES,
    "triton": ALL_DTYPES,
    "tpu": ALL_DTYPES,
    "xla": ALL_DTYPES,
    "ref": ALL_DTYPES,
}
# What of the arithmetic may be rounded to bfloat16 (q and the softmax): nothing with pages of
# float32, where a case is exact, and in some implementations. Codes may still round otherwise.
FLOAT32, UNROUNDED, ROUNDED = 1e-5, 2e-5, 4e-3
ALWAYS_EXACT = ("xla", "ref")


@dataclass(frozen=True)
class Case:
    """`chunks`: for each sequence the sizes of the chunks that its tokens arrive in, one a call."""

    chunks: tuple[tuple[int, ...], ...] = ((5, 1), (9, 13))
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    rotary_dim: int = 64
    window: int | None = None
    soft_cap: float | None = None
    norms: bool = False
    rope: bool = True
    padding: int = 0
    sinks: bool = False
    scale_per_head: bool = False
    exact: bool = False
    basis: bool = False

    @property
    def spec(self):
        scale = self.head_dim**-0.5
        return AttentionSpec(
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.rotary_dim,
            scale,
            self.window,
            self.soft_cap,
            self.exact,
        )


CASES = {
    "mixed": Case(chunks=((5, 1), (20, 13))),
    "one head": Case(heads=1, kv_heads=1),
    "no rope": Case(rope=False),
    "padding": Case(padding=7),
    "window": Case(window=9),
    "window of a page": Case(window=16, chunks=((70, 1),)),
    "soft cap": Case(soft_cap=2.0),
    "sinks": Case(sinks=True),
    "all at once": Case(padding=2, window=9, soft_cap=2.0, sinks=True),
    "norms": Case(norms=True, scale_per_head=True),
    "partial rotary": Case(rotary_dim=32),
    "head_dim 80": Case(head_dim=80, rotary_dim=80, chunks=((3, 1), (1, 3))),
    "head_dim 96": Case(head_dim=96, rotary_dim=96, chunks=((3, 1), (1, 3))),
    "head_dim 128": Case(head_dim=128, rotary_dim=128, chunks=((3, 1), (1, 3))),
    "head_dim 256": Case(
        head_dim=256, rotary_dim=256, heads=4, kv_heads=1, chunks=((3, 1), (1, 3))
    ),
    "several blocks of keys": Case(chunks=((300, 1),), heads=2),
    "basis": Case(basis=True, norms=True, head_dim=80, rotary_dim=32),
    "exact": Case(exact=True, heads=2, chunks=((9, 1),)),
}


# Every case in float32, which is exact anyway, and in other dtypes those where these matter.
FULL = {"float32": tuple(name for name in CASES if name not in ("basis", "exact"))}
FULL |= dict.fromkeys(ALL_DTYPES[1:], ("norms", "head_dim 80", "several blocks of keys", "exact"))
# Whatever the pages, these know no blocks of keys and round nothing.
WHOLE = FULL | dict.fromkeys(ALL_DTYPES[1:], ("norms", "head_dim 80"))
for names in (FULL, WHOLE):
    names |= {dtype: (*names[dtype], "basis") for dtype in ("fp8_e4m3", "fp8_e5m2", "int8", "int4")}
# Interpreted kernels take seconds to compile, and share norms and rope with the XLA form.
INTERPRETED = {
    "float32": ("all at once", "head_dim 256", "several blocks of keys"),
    "bfloat16": ("several blocks of keys",),
    "fp8_e4m3": ("norms",),
    "fp8_e5m2": ("norms",),
    "int8": ("norms",),
    "int4": ("head_dim 80", "basis", "exact"),
}
NAMES = {"native": FULL, "triton": INTERPRETED, "tpu": INTERPRETED, "xla": WHOLE, "ref": WHOLE}
RUNS = [
    (implementation, name, dtype)
    for implementation, dtypes in DTYPES.items()
    for dtype in dtypes
    for name in NAMES[implementation][dtype]
]


def oracle(case, dtype, scales, q, k, v, weights, tables, sinks, basis):
    """Attention of one whole sequence: q [T, Hq, D], k and v [T, Hkv, D], all float64."""
    q, k = turned(q, weights[0], *tables), turned(k, weights[1], *tables)
    if basis is not None:
        q, k = in_basis(q, basis.queries), in_basis(k, basis.keys)
    elif spreads_keys(dtype, scales[0]):
        q, k = spread(q), spread(k)
    v = spread(v) if dtype == "int4" else v
    ones = np.ones(1)
    k, v = (
        cached(x, dtype, ones if scale is None else scale)
        for x, scale in zip((k, v), scales, strict=True)
    )
    group = case.heads // case.kv_heads
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = np.einsum("qhd,khd->hqk", q, k) * case.spec.scale
    if case.soft_cap:
        scores = case.soft_cap * np.tanh(scores / case.soft_cap)
    distance = np.arange(len(q))[:, None] - np.arange(len(q))
    visible = (distance >= 0) & (distance < (case.window or len(q)))
    scores = np.where(visible, scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    scores = np.exp(scores - top)
    total = scores.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks[:, None, None] - top)
    out = np.einsum("hqk,khd->qhd", scores / total, v)
    return spread(out) if dtype == "int4" else out


@pytest.mark.parametrize(("implementation", "name", "dtype"), RUNS, indirect=["implementation"])
def test_chunks_equal_whole_sequences(implementation, name, dtype):
    case = CASES[name]
    random = np.random.default_rng(0)
    lengths = [sum(chunks) for chunks in case.chunks]
    blocks = -(-max(lengths) // PAGE)
    table = random.permutation(len(lengths) * blocks).reshape(len(lengths), blocks).astype(np.int32)
    shape = (table.size, case.kv_heads, PAGE, case.head_dim)
    k_pages = v_pages = empty(shape, dtype)

    def draw(tokens, heads):
        return random.standard_normal((tokens, heads, case.head_dim)).astype(np.float32)

    sequences = [
        (draw(n, case.heads), draw(n, case.kv_heads), draw(n, case.kv_heads)) for n in lengths
    ]
    weights = [None, None]
    if case.norms:
        weights = list(random.standard_normal((2, case.head_dim)).astype(np.float32))
    angles = random.uniform(0, 6, (max(lengths), case.rotary_dim // 2)).astype(np.float32)
    tables = (np.cos(angles), np.sin(angles)) if case.rope else (None, None)
    sinks = random.standard_normal(case.heads).astype(np.float32) if case.sinks else None
    scales: list[np.ndarray | None] = [None, None]
    if case.scale_per_head and dtype.startswith("fp8"):
        scales = list(random.uniform(0.004, 0.02, (2, case.kv_heads)).astype(np.float32))

    basis = Basis(*basis_of(random, case.kv_heads, case.head_dim)) if case.basis else None

    wanted = []
    for n, sequence in zip(lengths, sequences, strict=True):
        q, k, v = (x.astype(np.float64) for x in sequence)
        own = [t if t is None else t[:n].astype(np.float64) for t in tables]
        wanted.append(oracle(case, dtype, scales, q, k, v, weights, own, sinks, basis))
    given = dict(zip(("k_scale", "v_scale"), scales, strict=True), basis=basis)
    call = partial(paged_attention, spec=case.spec, norm_eps=EPS, sinks=sinks, **given)
    if implementation != "ref":
        interpreted = implementation in ("triton", "tpu")
        call = jax.jit(call, compiler_options=QUICKLY if interpreted else None)
    done = [0] * len(lengths)
    for step in range(max(map(len, case.chunks))):
        counts = [chunks[step] if step < len(chunks) else 0 for chunks in case.chunks]
        spans = [slice(d, d + c) for d, c in zip(done, counts, strict=True)]
        done = [d + c for d, c in zip(done, counts, strict=True)]

        def flat(arrays, spans=spans):
            rows = np.concatenate([a[span] for a, span in zip(arrays, spans, strict=True)])
            rows = rows.reshape(len(rows), -1)
            return jnp.asarray(np.pad(rows, ((0, case.padding), (0, 0)), constant_values=np.nan))

        q, k, v = (flat([sequence[i] for sequence in sequences]) for i in range(3))
        cos, sin = (flat([t] * len(lengths)) for t in tables) if case.rope else (None, None)
        out, k_pages, v_pages = call(
            q,
            k,
            v,
            k_pages,
            v_pages,
            block_table=jnp.asarray(table),
            query_start_loc=jnp.asarray(np.cumsum([0, *counts]), jnp.int32),
            seq_lens=jnp.asarray(done, jnp.int32),
            rope=None if cos is None or sin is None else (cos, sin),
            q_norm=weights[0],
            k_norm=weights[1],
        )
        assert out.shape == q.shape
        right = np.concatenate([w[span] for w, span in zip(wanted, spans, strict=True)])
        right = right.reshape(len(right), -1)
        error = np.linalg.norm(out[: len(right)] - right) / np.linalg.norm(right)
        exact = case.exact or implementation in ALWAYS_EXACT
        tolerance = FLOAT32 if dtype == "float32" else UNROUNDED if exact else ROUNDED
        assert error <= tolerance, step


def test_bfloat16_pages_are_bfloat16(implementation):
    """What is attended to is the rounded value, as a cache of half the size holds it."""
    spec = AttentionSpec(1, 1, 64, 64, 1.0)
    value = np.random.default_rng(1).standard_normal((1, 64)).astype(np.float32)
    out, _, v_pages = paged_attention(
        jnp.ones((1, 64)),
        jnp.ones((1, 64)),
        jnp.asarray(value),
        empty((1, 1, PAGE, 64), "bfloat16"),
        empty((1, 1, PAGE, 64), "bfloat16"),
        spec=spec,
        block_table=jnp.zeros((1, 1), jnp.int32),
        query_start_loc=jnp.asarray([0, 1], jnp.int32),
        seq_lens=jnp.asarray([1], jnp.int32),
    )
    assert v_pages.dtype == "bfloat16"
    np.testing.assert_array_equal(out, value.astype(ml_dtypes.bfloat16).astype(np.float32))
