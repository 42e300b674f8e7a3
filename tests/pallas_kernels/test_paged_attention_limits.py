"""Paged attention where blocks, tiles and pages end, and calls that it must refuse or pass on.

The oracle is jax's own attention on whole sequences.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, native
from pallas_kernels.paged_attention import AttentionSpec, Pages, paged_attention

DIM = 64


@pytest.fixture(params=["native", "xla"])
def compiled(request):
    library, reason = native.library()
    if request.param == "native" and library is None:
        pytest.skip(reason)
    return request.param


def call(length, heads=4, kv_heads=2, dim=DIM, page_size=16) -> dict[str, Any]:
    """The keyword arguments of one prompt of random numbers, whose pages lie in reverse."""
    random = np.random.default_rng(length)
    pages = -(-length // page_size)
    shape = (pages, kv_heads, page_size, dim)
    widths = {"q": heads * dim, "k": kv_heads * dim, "v": kv_heads * dim}
    return {
        **{
            name: jnp.asarray(random.standard_normal((length, width)), jnp.float32)
            for name, width in widths.items()
        },
        # What is left of an earlier use of a page must not be seen.
        "k_pages": Pages(jnp.full(shape, 50.0)),
        "v_pages": Pages(jnp.full(shape, 50.0)),
        "spec": AttentionSpec(heads, kv_heads, dim, dim, dim**-0.5),
        "block_table": jnp.arange(pages, dtype=jnp.int32)[None, ::-1],
        "query_start_loc": jnp.array([0, length], jnp.int32),
        "seq_lens": jnp.array([length], jnp.int32),
    }


def oracle(arguments, window=None):
    """What each token sees, float32 [T, heads * dim]."""
    spec = arguments["spec"]
    q, k, v = (arguments[name].reshape(1, -1, n, spec.head_dim) for name, n in (
        ("q", spec.num_heads), ("k", spec.num_kv_heads), ("v", spec.num_kv_heads)
    ))  # fmt: skip
    back = None if window is None else (window - 1, 0)
    with jax.default_matmul_precision("float32"):
        out = jax.nn.dot_product_attention(
            q, k, v, scale=spec.scale, is_causal=True, local_window_size=back
        )
    return out.reshape(q.shape[1], -1)


@pytest.mark.parametrize(
    ("sizes", "window", "chunks"),
    [
        # Longer than a block of keys or a tile of queries.
        pytest.param({"length": 452, "page_size": 32}, None, (300, 150, 1, 1), id="long"),
        pytest.param({"length": 452, "page_size": 32}, 140, (300, 150, 1, 1), id="long window"),
        pytest.param({"length": 171, "page_size": 128}, None, (170, 1), id="large pages"),
        pytest.param({"length": 131, "page_size": 48}, None, (130, 1), id="odd pages"),
        # More query heads to a kv head than a tile of queries holds.
        pytest.param({"length": 10, "heads": 71, "kv_heads": 1}, None, (9, 1), id="multi-query"),
        pytest.param({"length": 33, "dim": 16}, 1, (16, 16, 1), id="window of one"),
    ],
)
def test_sizes(compiled, sizes, window, chunks):
    whole = call(**sizes)
    spec = whole["spec"]
    spec = AttentionSpec(
        spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.rotary_dim, spec.scale, window
    )
    attend = jax.jit(partial(paged_attention, spec=spec, implementation=compiled))
    pages, start, outs = (whole["k_pages"], whole["v_pages"]), 0, []
    for count in chunks:
        new = slice(start, start + count)
        start += count
        out, *pages = attend(
            *(whole[name][new] for name in ("q", "k", "v")),
            *pages,
            block_table=whole["block_table"],
            query_start_loc=jnp.array([0, count], jnp.int32),
            seq_lens=jnp.array([start], jnp.int32),
        )
        outs.append(out)
    np.testing.assert_allclose(np.concatenate(outs), oracle(whole, window), atol=2e-5)


def test_odd_sizes_go_to_an_implementation_that_takes_them():
    arguments = call(5, dim=20, page_size=10)
    out, _, _ = paged_attention(**arguments)
    assert dispatch.chosen()["paged_attention"][0] == "xla"
    np.testing.assert_allclose(out, oracle(arguments), atol=2e-5)
    with pytest.raises(NotImplementedError, match="native"):
        paged_attention(**arguments, implementation="native")


def test_vmap(compiled):
    """A batch of calls, each with a cache of its own."""
    arguments = call(5)
    q = jnp.stack([arguments["q"], -2 * arguments.pop("q")])
    attend = partial(paged_attention, **arguments, implementation=compiled)
    outs, k_pages, _ = jax.jit(jax.vmap(lambda q: attend(q)))(q)
    assert k_pages.values.shape == (2, *arguments["k_pages"].values.shape)
    for out, row in zip(outs, q, strict=True):
        np.testing.assert_allclose(out, oracle(arguments | {"q": row}), atol=2e-5)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "message"),
    [
        ("q", (5, 3 * DIM), "float32", "q is"),
        ("k", (5, 2 * DIM), "float16", "k is"),
        ("v", (4, 2 * DIM), "float32", "v is"),
        ("q_norm", (32,), "float32", "q_norm is"),
        ("k_pages", (1, 2, 16, 32), "float32", "values of k_pages is"),
        ("k_pages", (1, 2, 16, DIM), "int8", "scale of k_pages is None"),
        ("query_start_loc", (3,), "int32", "query_start_loc"),
        ("block_table", (2, 1), "int32", "block_table"),
    ],
)
def test_arguments_that_contradict_each_other(name, shape, dtype, message):
    arguments = call(5)
    array = jnp.zeros(shape, dtype)
    arguments[name] = Pages(array) if name.endswith("pages") else array
    with pytest.raises(ValueError, match=message):
        paged_attention(**arguments)


def test_rope_tables_of_another_width():
    table = jnp.zeros((5, 16))
    with pytest.raises(ValueError, match="cos is"):
        paged_attention(**call(5), rope=(table, table))
