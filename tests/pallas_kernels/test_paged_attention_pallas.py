"""What the Pallas forms of paged attention do beyond the cases that every implementation shares."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import platform, tuning
from pallas_kernels.paged_attention import (
    CACHE_DTYPES,
    AttentionSpec,
    Pages,
    empty,
    paged_attention,
    tpu,
    triton,
)
from pallas_kernels.paged_attention.tiles import tiles, tokens_per_tile
from tests.pallas_kernels import attention_programs, crosscompile
from tests.pallas_kernels.cached import QUICKLY

HEADS, KV_HEADS, DIM, PAGE, KEYS = 4, 2, 64, 16, 208


def decode_step(**spec):
    """One new token for each of two sequences of different lengths, over pages full of numbers."""
    random = np.random.default_rng(0)
    blocks = KEYS // PAGE
    table = random.permutation(2 * blocks).reshape(2, blocks).astype(np.int32)
    q, k, v = (random.standard_normal((2, n * DIM)) for n in (HEADS, KV_HEADS, KV_HEADS))
    shape = (2 * blocks, KV_HEADS, PAGE, DIM)
    pages = [Pages(jnp.float32(x)) for x in random.standard_normal((2, *shape))]
    return {
        **{name: jnp.float32(x) for name, x in zip("qkv", (q, k, v), strict=True)},
        "k_pages": pages[0],
        "v_pages": pages[1],
        "block_table": jnp.asarray(table),
        "query_start_loc": jnp.arange(3, dtype=jnp.int32),
        "seq_lens": jnp.array([KEYS, 70], jnp.int32),
    }, AttentionSpec(HEADS, KV_HEADS, DIM, DIM, DIM**-0.5, **spec)


def compiled(implementation, spec, **more):
    attend = partial(paged_attention, spec=spec, implementation=implementation, **more)
    return jax.jit(attend, compiler_options=QUICKLY if implementation != "xla" else None)


def run(implementation, arguments, spec, **more):
    return np.asarray(compiled(implementation, spec, **more)(**arguments)[0])


def test_segments_of_a_long_context():
    """Segments that run side by side give what one after the other do, also where a sequence has
    nothing in some of them, and a sink counts once."""
    arguments, spec = decode_step()
    sinks = jnp.array([0.5, 1.0, -1.0, 2.0])
    right = run("xla", arguments, spec, sinks=sinks)
    assert triton.segments(2, KEYS, 64) == (4, 64)
    with tuning.trying({"segment": 64}):
        out = run("triton", arguments, spec, sinks=sinks)
    np.testing.assert_allclose(out, right, atol=2e-6)


def test_number_of_segments():
    assert triton.segments(1, 8192, 512) == (16, 512)
    assert triton.segments(1, 300, 512) == (1, 300)
    assert triton.segments(4096, 8192, 512) == (1, 8192)
    count, length = triton.segments(8, 1 << 20, 512)
    assert count <= triton.MAX_SEGMENTS
    assert count * length >= 1 << 20


@pytest.mark.parametrize("implementation", ["triton", "tpu"])
def test_nothing_else_in_the_batch_counts(implementation):
    """Neither another sequence, nor what is left in pages before a window or after the end."""
    arguments, spec = decode_step(sliding_window=40)
    attend = compiled(implementation, spec)
    first = np.asarray(attend(**arguments)[0])
    table, seen = np.asarray(arguments["block_table"]), []
    for pages in ("k_pages", "v_pages"):
        values = np.array(arguments[pages].values)
        values[table[0]] = np.nan
        values[table[1, :1]] = np.nan
        values[table[1, 5:]] = np.nan
        values[table[1, 4], :, 6:] = np.nan
        arguments[pages] = arguments[pages]._replace(values=jnp.asarray(values))
        seen.append(np.isnan(values).mean())
    assert min(seen) > 0.8
    second = np.asarray(attend(**arguments)[0])
    np.testing.assert_array_equal(second[1], first[1])
    np.testing.assert_allclose(first, run("xla", decode_step()[0], spec), atol=2e-6)


def test_pages_of_whole_lanes():
    """A TPU reads scales and zero points from pages of 128 tokens themselves."""
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((150, n * 64)) for n in (HEADS, KV_HEADS, KV_HEADS))
    pages = empty((3, KV_HEADS, 128, 64), "int4")
    arguments = {name: jnp.float32(x) for name, x in zip("qkv", (q, k, v), strict=True)} | {
        "k_pages": pages,
        "v_pages": pages,
        "block_table": jnp.array([[2, 0]], jnp.int32),
        "query_start_loc": jnp.array([0, 150], jnp.int32),
        "seq_lens": jnp.array([150], jnp.int32),
    }
    spec = AttentionSpec(HEADS, KV_HEADS, 64, 64, 0.125)
    out, right = (run(name, arguments, spec) for name in ("tpu", "xla"))
    assert np.linalg.norm(out - right) <= 4e-3 * np.linalg.norm(right)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize(
    ("target", "platform_name", "call"),
    [("h100", "cuda", "xla.gpu.triton"), ("v6e", "tpu", "tpu_custom_call")],
)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # from jax 0.11 on
def test_lowers_for_its_device(target, platform_name, call, dtype):
    program = attention_programs.program(attention_programs.OTHER_HEADS[0], dtype)
    with crosscompile.assumed(target):
        traced = jax.jit(program.function).trace(*program.arguments)
        text = traced.lower(lowering_platforms=(platform_name,)).as_text()
    assert text.count(call) >= 2  # the update of the cache, and attention


@pytest.mark.crosscompile
@pytest.mark.parametrize("target", ["h100", "v5e", "v6e", "tpu7x"])
def test_compiles_for_its_device(target):
    crosscompile.check_all(target, attention_programs)


@pytest.mark.parametrize("implementation", ["triton", "tpu"])
def test_not_on_another_device(implementation):
    arguments, spec = decode_step()
    other = {"triton": "tpu", "tpu": "gpu"}[implementation]
    with platform.assume(other), pytest.raises(NotImplementedError, match=f"this is a {other}"):
        run(implementation, arguments, spec)


@pytest.mark.parametrize(("module", "keys"), [(triton, 16), (tpu, 384)])
def test_measured_block_sizes(module, keys):
    """Those that do not fit the pages at hand are passed over."""
    arguments, spec = decode_step()
    sizes = partial(module._sizes, spec, arguments["k_pages"], 2, KEYS)
    default = sizes()
    with tuning.trying({"keys": keys, "of another kernel": 1}):
        assert sizes().keys == keys
    with tuning.trying({"keys": 24}):
        assert sizes() == default
    for candidate in module.candidates("float32 d64", 2, KV_HEADS, KEYS):
        with tuning.trying(candidate):
            assert sizes().keys == candidate["keys"]


def test_tiles_are_of_one_sequence():
    """7 tokens of three sequences, the second of which has none, in tiles of two."""
    starts, lengths = jnp.array([0, 3, 3, 7]), jnp.array([10, 5, 4])
    found, first = tiles(9, 2, starts, lengths)
    assert [int(n) for n in first] == [0, 2, 2]
    rows = [tuple(int(field[i]) for field in found) for i in range(4)]
    assert rows == [(0, 0, 2, 7), (0, 2, 1, 9), (2, 3, 2, 0), (2, 5, 2, 2)]
    assert not found.count[4:].any()


@pytest.mark.parametrize(
    ("tokens", "sequences", "group", "right"),
    [(32, 32, 4, 1), (33, 32, 4, 2), (512, 1, 4, 16), (512, 1, 3, 16), (5, 2, 71, 1)],
)
def test_tokens_per_tile(tokens, sequences, group, right):
    assert tokens_per_tile(tokens, sequences, group, 64) == right


def test_pages_that_no_tpu_takes():
    _, spec = decode_step()
    with pytest.raises(NotImplementedError, match="pages of 12 tokens, not a multiple of 8"):
        tpu.blocks(spec, 12, 4)
    with pytest.raises(NotImplementedError, match="blocks of 4096 keys"):
        tpu.blocks(spec, 4096, 4)
