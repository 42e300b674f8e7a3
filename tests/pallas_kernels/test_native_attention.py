"""Native attention over quantized pages: the arithmetic and long contexts."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import CACHE_DTYPES, AttentionSpec, empty, paged_attention
from tests.pallas_kernels.conftest import not_built

SPEC = AttentionSpec(6, 2, 48, 48, 48**-0.5)
PAGE = 32


@pytest.fixture(autouse=True)
def built():
    if reason := not_built("native"):
        pytest.skip(reason)


def decode(implementation, dtype, lengths, exact=True):
    """One new token of each sequence after a prompt, float32 [S, heads * head_dim], by a cache that
    this implementation filled."""
    spec = replace(SPEC, exact=exact)
    call = jax.jit(partial(paged_attention, spec=spec, implementation=implementation))
    blocks = -(-max(lengths) // PAGE)
    pages = empty((blocks * len(lengths), SPEC.num_kv_heads, PAGE, SPEC.head_dim), dtype)
    table = jnp.arange(blocks * len(lengths), dtype=jnp.int32).reshape(len(lengths), -1)
    k_pages = v_pages = pages
    draws = [np.random.default_rng(n).standard_normal((n, 10 * SPEC.head_dim)) for n in lengths]
    for new in ([x[:-1] for x in draws], [x[-1:] for x in draws]):
        q, k, v = np.split(np.concatenate(new).astype(np.float32), [288, 384], axis=1)
        ends = np.array(lengths) - (1 if len(new[0]) > 1 else 0)
        starts = np.cumsum([0, *map(len, new)])
        out, k_pages, v_pages = call(
            *map(jnp.asarray, (q, k, v)),
            k_pages,
            v_pages,
            block_table=table,
            query_start_loc=jnp.asarray(starts, jnp.int32),
            seq_lens=jnp.asarray(ends, jnp.int32),
        )
    return np.asarray(out)


def error(found, right):
    return np.linalg.norm(found - right) / np.linalg.norm(right)


LENGTHS = (1, 700)  # one in two segments of keys


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_arithmetic(dtype):
    """Exact arithmetic is that of float32; codes meet 16 bits of queries and weights elsewhere."""
    lengths = [n + 1 for n in LENGTHS]
    right = decode("xla", dtype, lengths)
    assert error(decode("native", dtype, lengths), right) <= 2e-6
    rounding = 1e-4 if dtype in ("float32", "int8", "int4") else 4e-3
    assert error(decode("native", dtype, lengths, exact=False), right) <= rounding


@pytest.mark.parametrize("dtype", ["bfloat16", "int4"])
def test_nothing_else_in_the_batch_counts(dtype):
    together = decode("native", dtype, [1300, 600, 40], exact=False)
    np.testing.assert_array_equal(together[:1], decode("native", dtype, [1300], exact=False))
