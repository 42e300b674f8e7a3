"""New tokens into pages, by every implementation: what is stored where, and what stays."""

from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.kv_update import kv_update
from pallas_kernels.paged_attention import CACHE_DTYPES, Basis, empty
from tests.pallas_kernels import crosscompile
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

HEADS, DIM, PAGE = 3, 80, 16
IMPLEMENTATIONS = ("triton", "tpu", "xla", "ref")
TABLE = np.array([[4, 1], [2, 0], [3, 5]], np.int32)
# The first sequence goes over the end of a page, the second has nothing new, and two tokens pad.
STARTS, LENGTHS, TOKENS = np.array([0, 5, 5, 12], np.int32), np.array([18, 3, 7], np.int32), 14


def numbers(pages, scale):
    """What stored bits stand for, float64 [P, H, page, D]."""
    if pages.dtype == "int4":
        codes = np.concatenate([pages.values & 15, pages.values >> 4], -1).astype(float)
        codes = codes - 7.5 + np.asarray(pages.zero, float)[..., None] / 16
        return codes * np.asarray(pages.scale, float)[..., None]
    x = np.asarray(pages.values).astype(float)
    if pages.dtype == "int8":
        return x * np.asarray(pages.scale, float)[..., None]
    return x * scale[:, None, None] if pages.dtype.startswith("fp8") else x


def arguments(dtype, basis=False) -> tuple[Any, dict[str, Any]]:
    random = np.random.default_rng(0)
    k, v = random.standard_normal((2, TOKENS, HEADS * DIM)).astype(np.float32)
    k[STARTS[-1] :] = v[STARTS[-1] :] = np.nan
    angles = random.uniform(0, 6, (TOKENS, DIM // 2)).astype(np.float32)
    # What is there before: a number that nothing else gives.
    pages = jax.tree.map(
        lambda a: jnp.full(a.shape, 3, a.dtype), empty((7, HEADS, PAGE, DIM), dtype)
    )
    scales = {}
    if basis:
        scales = {"basis": Basis(*basis_of(random, HEADS, DIM))}
    elif dtype.startswith("fp8"):
        scales = {"k_scale": jnp.array([0.01, 0.02, 0.005]), "v_scale": jnp.array([0.01])}
    return (k, v, pages, pages), scales | {
        "block_table": jnp.asarray(TABLE),
        "query_start_loc": jnp.asarray(STARTS),
        "seq_lens": jnp.asarray(LENGTHS),
        "rope": (np.cos(angles), np.sin(angles)),
        "k_norm": random.standard_normal(DIM).astype(np.float32),
    }


@pytest.mark.parametrize(
    ("dtype", "basis"),
    [*((dtype, False) for dtype in CACHE_DTYPES), ("fp8_e4m3", True), ("int4", True)],
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_new_tokens(implementation, dtype, basis):
    (k, v, *pages), rest = arguments(dtype, basis)
    update = partial(kv_update, norm_eps=EPS, implementation=implementation)
    if implementation != "ref":
        options = None if implementation == "xla" else QUICKLY
        update = jax.jit(update, compiler_options=options)
    out = update(k, v, *pages, **rest)

    keys, values = (x.reshape(TOKENS, HEADS, DIM).astype(float) for x in (k, v))
    keys = turned(keys, rest["k_norm"], *rest["rope"])
    if basis:
        keys = in_basis(keys, rest["basis"].keys)
    elif spreads_keys(dtype, rest.get("k_scale")):
        keys = spread(keys)
    values = spread(values) if dtype == "int4" else values
    for x, new, name in zip((keys, values), out, ("k_scale", "v_scale"), strict=True):
        scale = np.broadcast_to(rest.get(name, np.ones(1)), HEADS)
        found, touched = numbers(new, scale), np.zeros(new.values.shape[0::2][:2], bool)
        for sequence, (start, end) in enumerate(pairwise(STARTS)):
            for token in range(start, end):
                position = LENGTHS[sequence] - (end - token)
                at = TABLE[sequence, position // PAGE], position % PAGE
                touched[at] = True
                wanted = cached(x[token : token + 1], dtype, scale)[0]
                np.testing.assert_allclose(found[at[0], :, at[1]], wanted, rtol=1e-5, atol=1e-6)
        for before, after in zip(pages[0], new, strict=True):
            if before is not None:
                old, kept = (np.asarray(a, float).swapaxes(1, 2)[~touched] for a in (before, after))
                np.testing.assert_array_equal(kept, old)


def test_arguments_that_contradict_each_other():
    (k, v, *pages), rest = arguments("float32")
    with pytest.raises(ValueError, match="v is float32"):
        kv_update(k, v[:, :DIM], *pages, **rest)


def test_arrays_that_triton_cannot_address():
    pages = empty((3 << 18, 8, 16, 32), "int8", jax.ShapeDtypeStruct)
    _, rest = arguments("float32")
    k, v = jnp.zeros((2, TOKENS, 8 * 32))
    update = partial(
        kv_update, k, v, implementation="triton", **rest | {"rope": None, "k_norm": None}
    )
    with pytest.raises(NotImplementedError, match="3221225472 bytes in one array"):
        jax.eval_shape(update, pages, pages)


@pytest.mark.parametrize(
    ("target", "platform_name", "implementation"),
    [("h100", "cuda", "triton"), ("v6e", "tpu", "tpu")],
)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # from jax 0.11 on
def test_pages_are_written_in_place(target, platform_name, implementation):
    """As the kernel is lowered for its device."""
    (k, v, *pages), rest = arguments("int4")
    update = jax.jit(partial(kv_update, norm_eps=EPS), donate_argnums=(2, 3))
    pages = [jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), p) for p in pages]
    with crosscompile.assumed(target):
        lowered = update.trace(k, v, *pages, **rest).lower(lowering_platforms=(platform_name,))
    assert dispatch.chosen()["kv_update"][0] == implementation
    assert lowered.as_text().count("output_operand_alias<") == 6
