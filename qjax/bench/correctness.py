"""Whether the kernels of this device are right: small cases against float64 numpy."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels import dispatch, platform
from pallas_kernels.kv_update import api as kv_update
from pallas_kernels.kv_update import pages
from pallas_kernels.matmul import api as matmul
from pallas_kernels.matmul.spec import WeightArrays, decode
from pallas_kernels.matmul_grouped import api as matmul_grouped
from pallas_kernels.paged_attention import AttentionSpec
from pallas_kernels.paged_attention import api as paged_attention
from pallas_kernels.quantize import api as quantize
from qjax import ops
from qjax.bench import cases
from qjax.bench.weights import KINDS, draw
from qjax.ops import activations
from qjax.ops.linear import ACTIVATION_DTYPES
from qjax.qarray import QArray

# Largest error of a row, relative to the row.
TOLERANCES = {"exact": 1e-5, "bfloat16": 5e-3, "attention": 1e-2, "codes": 2e-3}
# What rounding does to normally distributed keys, and some more.
TOLERANCES |= {"cached bfloat16": 4e-3, "cached fp8_e4m3": 0.04, "cached fp8_e5m2": 0.08}
TOLERANCES |= {"cached int8": 0.02, "cached int4": 0.2}
ROWS = (1, 8, 40)
SHAPE = (256, 512)
EXPERTS = 4
# Sequences of so many tokens, and then one more.
LENGTH = 37
HEADS = AttentionSpec(4, 2, 64, 64, 0.125)


@dataclass(frozen=True)
class Check:
    """One implementation on one small case.

    Attributes:
      numerics: how activations may be rounded.
      error: of the worst row; None where it does not take the case, and `reason` says why.
    """

    op: str
    kind: str
    implementation: str
    rows: int
    numerics: str
    error: float | None
    reason: str = ""

    @property
    def passed(self) -> bool:
        return self.error is None or self.error <= self.tolerance

    @property
    def tolerance(self) -> float:
        how = self.numerics
        return TOLERANCES[f"cached {self.kind}" if how == "cached" else how]

    def __str__(self) -> str:
        what = f"{self.op} {self.kind}, {self.rows} rows, {self.numerics}, {self.implementation}"
        if self.error is None:
            return f"{what}: refused: {self.reason}"
        return f"{what}: error {self.error:.1e}, allowed {self.tolerance:.0e}"


def known(op: str) -> list[str]:
    """Implementations of an op by name; none of whole decode steps, which take many ops."""
    op = "paged_attention" if op == "prefill_attention" else op
    return _CHECKED[op][1] if op in _CHECKED else []


def checks(op: str, kinds: Sequence[str], implementation: str | None = None) -> list[Check]:
    """All of an op: of the kinds named, by the implementation named or else by every one that would
    not be interpreted here. An implementation that the op does not have is not checked.
    """
    names = [n for n in known(op) if n == implementation]
    if implementation is None:
        names = cases.implementations(known(op))
    if not names or op not in _CHECKED:
        return []
    run, _, numerics = _CHECKED[op]
    numerics = numerics[:1] if platform.device_kind() == "cpu" else numerics
    sizes = ROWS if "matmul" in op else ROWS[1:2]
    wanted = product((op,), kinds, names, sizes, numerics, (run,))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda arguments: _checked(*arguments), wanted))


def _checked(
    op: str,
    kind: str,
    name: str,
    rows: int,
    numerics: str,
    run: Callable[[str, int, str], tuple[jax.Array, np.ndarray]],
) -> Check:
    with dispatch.use(name):
        try:
            got, wanted = run(kind, rows, numerics)
        except NotImplementedError as error:
            return Check(op, kind, name, rows, numerics, None, str(error))
    difference = np.linalg.norm(np.asarray(got, np.float64) - wanted, axis=-1)
    # What is not a number is no small error.
    error = np.nan_to_num(difference / np.linalg.norm(wanted, axis=-1), nan=np.inf).max()
    return Check(op, kind, name, rows, numerics, float(error))


def _matmul(kind: str, rows: int, numerics: str) -> tuple[jax.Array, np.ndarray]:
    weight = draw(KINDS[kind], *SHAPE)
    x = cases.inputs(rows, SHAPE[1])
    batch = cases.batch_of(rows, numerics)
    got = jax.jit(lambda x, w: ops.linear(x, w, batch=batch))(x, ops.prepare(weight))
    rounded = np.asarray(activations.inputs(x, weight), np.float64)
    return got, rounded @ _float64(weight).T


def _grouped(kind: str, rows: int, numerics: str) -> tuple[jax.Array, np.ndarray]:
    weight = draw(KINDS[kind], *SHAPE, lead=(EXPERTS,))
    owner = np.sort(np.random.default_rng(1).integers(0, EXPERTS, rows))
    sizes = np.bincount(owner, minlength=EXPERTS).astype(np.int32)
    x, dtype = cases.inputs(rows, SHAPE[1]), ACTIVATION_DTYPES[numerics]

    def grouped(x: jax.Array, w: QArray) -> jax.Array:
        pair = w.spec, w.arrays
        return matmul_grouped.matmul_grouped(x, jnp.asarray(sizes), pair, activation_dtype=dtype)

    got = jax.jit(grouped)(x, ops.prepare(weight))
    x = np.asarray(x, np.float64)
    return got, np.einsum("tk,tnk->tn", x, _float64(weight)[owner])


def _float64(weight: QArray) -> np.ndarray:
    return decode(weight.spec, WeightArrays(*weight.arrays), np).astype(np.float64)


def _attention(dtype: str, rows: int, _: str) -> tuple[jax.Array, np.ndarray]:
    """The outputs of so many sequences' last tokens, the ones before them cached by a call before.

    An implementation may lay pages out as it likes, so only what it makes of its own is looked at.
    """
    heads, narrow, size = HEADS.num_heads, HEADS.num_kv_heads, HEADS.head_dim
    q, k, v = (
        jax.random.normal(jax.random.key(i), (rows, LENGTH + 1, count, size), jnp.float32)
        for i, count in enumerate((heads, narrow, narrow))
    )
    per_sequence = -(-(LENGTH + 1) // cases.PAGE_SIZE)
    table = np.arange(rows * per_sequence, dtype=np.int32).reshape(rows, per_sequence)
    shape = rows * per_sequence, narrow, cases.PAGE_SIZE, size

    @jax.jit
    def outputs(
        q: jax.Array, k: jax.Array, v: jax.Array, k_pages: pages.Pages, v_pages: pages.Pages
    ) -> jax.Array:
        out = q
        for begin, end in ((0, LENGTH), (LENGTH, LENGTH + 1)):
            tokens = rows * (end - begin)
            new_q, new_k, new_v = (a[:, begin:end].reshape(tokens, -1) for a in (q, k, v))
            out, k_pages, v_pages = paged_attention.paged_attention(
                new_q,
                new_k,
                new_v,
                k_pages,
                v_pages,
                spec=HEADS,
                block_table=jnp.asarray(table),
                query_start_loc=jnp.arange(rows + 1, dtype=jnp.int32) * (end - begin),
                seq_lens=jnp.full(rows, end, jnp.int32),
            )
        return out

    got = outputs(q, k, v, pages.empty(shape, dtype), pages.empty(shape, dtype))
    if pages.turns_keys(dtype, None):
        q, k = pages.turned(q), pages.turned(k)
    if pages.turns_values(dtype):
        v = pages.turned(v)
    keys, values = (
        np.repeat(np.asarray(pages.decode(pages.encode(a, dtype)), np.float64), heads // narrow, 2)
        for a in (k, v)
    )
    scores = np.einsum("shd,sthd->sht", np.asarray(q[:, -1], np.float64), keys) * HEADS.scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    wanted = np.einsum("sht,sthd->shd", weights, values)
    if pages.turns_values(dtype):
        wanted = pages.turned(jnp.asarray(wanted, jnp.float32))
    return got, np.asarray(wanted, np.float64).reshape(rows, -1)


def _quantize(kind: str, rows: int, _: str) -> tuple[jax.Array, np.ndarray]:
    act = cases.ACTS[kind]
    x = cases.inputs(rows, SHAPE[1])
    codes, scale, _ = jax.jit(lambda x: quantize.quantize(x, act))(x)
    groups = np.asarray(x, np.float64).reshape(rows, -1, act.group_size or SHAPE[1])
    largest = np.abs(groups).max(-1, keepdims=True)
    if act.dtype == "int8":
        wanted = np.rint(groups / (largest / 127)) * (largest / 127)
    else:
        step = largest / 448 if act.scale == "float32" else 2 ** (np.floor(np.log2(largest)) - 8)
        inside = np.clip(groups / step, -448, 448).astype(np.float32)
        wanted = inside.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * step
    got = codes.astype(jnp.float32).reshape(groups.shape) * scale.reshape(rows, -1, 1)
    return got.reshape(rows, -1), wanted.reshape(rows, -1)


def _kv_update(dtype: str, rows: int, _: str) -> tuple[jax.Array, np.ndarray]:
    """Keys as they can be read from the cache, beside the keys themselves."""
    narrow, size = HEADS.num_kv_heads, HEADS.head_dim
    shape = rows, narrow, cases.PAGE_SIZE, size
    k = cases.inputs(rows, narrow * size)
    # Each sequence in a page of its own, from the last page on, and one further in it.
    table, lengths = np.arange(rows, dtype=np.int32)[::-1, None], np.arange(rows) % 16 + 1

    @jax.jit
    def update(k: jax.Array, empty: pages.Pages) -> pages.Pages:
        return kv_update.kv_update(
            k,
            k,
            empty,
            empty,
            block_table=jnp.asarray(table),
            query_start_loc=jnp.arange(rows + 1, dtype=jnp.int32),
            seq_lens=jnp.asarray(lengths, jnp.int32),
        )[0]

    held = pages.decode(update(k, pages.empty(shape, dtype)))[table[:, 0], :, lengths - 1]
    heads = k.reshape(rows, narrow, size)
    wanted = pages.turned(heads) if pages.turns_keys(dtype, None) else heads
    return held, np.asarray(wanted, np.float64)


def _names(implementations: dispatch.Implementations) -> list[str]:
    return [name for name, _ in implementations]


_CHECKED = {
    "matmul": (_matmul, _names(matmul.IMPLEMENTATIONS), ("exact", "bfloat16")),
    "matmul_grouped": (_grouped, _names(matmul_grouped.IMPLEMENTATIONS), ("exact", "bfloat16")),
    "paged_attention": (_attention, _names(paged_attention.IMPLEMENTATIONS), ("attention",)),
    "quantize": (_quantize, _names(quantize.IMPLEMENTATIONS), ("codes",)),
    "kv_update": (_kv_update, _names(kv_update.IMPLEMENTATIONS), ("cached",)),
}
