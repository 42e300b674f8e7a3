"""What only the kernel for GPUs has: inputs of codes, block sizes, experts, and how it lowers."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, platform, tuning
from pallas_kernels.matmul import planes, triton
from pallas_kernels.matmul.triton_plan import plan_of
from pallas_kernels.matmul_grouped import triton as grouped
from pallas_kernels.matmul_grouped.tile_table import tile_table
from tests.pallas_kernels import crosscompile, triton_programs
from tests.pallas_kernels.cached import QUICKLY
from tests.pallas_kernels.coded import Coded, coded_inputs, laid_out
from tests.pallas_kernels.products import TOLERANCES, error, least_error

N, K = 72, 512


@pytest.fixture(autouse=True)
def interpreted():
    with dispatch.use("triton"):
        yield


compiled = partial(jax.jit, compiler_options=QUICKLY)
ready = partial(laid_out, layout=planes.PLANES)


def shaped(*args, **kwargs):
    return Coded(*args, **kwargs, shape=(N, K))


@pytest.mark.parametrize(
    ("dtype", "groups", "kind"),
    [
        ("int8", 1, shaped("int8", (1, K))),
        ("int8", 1, shaped("uint8b128", (1, 128), "bfloat16")),
        ("int8", 1, shaped("uint8", (1, K), "float32", "uint8")),
        ("int8", 4, shaped("int8", (1, K))),
        ("int8", 1, shaped("uint4b8", (1, 128), "float16")),
        ("int8", 16, shaped("uint4", (1, 64), "float16", "uint8")),
        ("int8", 1, shaped("uint4", (1, 32), "bfloat16", "bfloat16", additive=True)),
        ("int8", 1, shaped("uint3b4", (1, 128), "float16")),
        ("int8", 1, shaped("fp8_e4m3", (1, K))),
        ("int8", 1, shaped("lookup4", (1, 64))),
        ("int8", 1, shaped("uint4b8", (1, 24), "float16")),
        ("bfloat16", 1, shaped("uint8", (1, K), "float32", "float32")),
        ("float8_e4m3fn", 1, shaped("fp8_e4m3", (1, K))),
        ("float8_e4m3fn", 1, shaped("fp8_e4m3", (N, K))),
        ("float8_e4m3fn", 4, shaped("fp8_e4m3", (64, 128))),
        ("float8_e4m3fn", 1, shaped("uint4b8", (1, 128), "bfloat16")),
        ("float8_e4m3fn", 16, shaped("fp4_e2m1", (1, 32), "float8_e8m0fnu")),
        ("float8_e5m2", 1, shaped("fp8_e5m2", (1, K))),
        ("float8_e5m2", 1, shaped("fp8_e4m3", (1, K))),
    ],
    ids=str,
)
def test_inputs_of_codes(dtype, groups, kind):
    """Nothing is rounded but sums."""
    spec, arrays, decoded = ready(kind)
    x, scale, wide = coded_inputs(5, K, dtype, groups)
    y = compiled(lambda x, scale, arrays: triton.product(x, spec, arrays, x_scale=scale))(
        x, scale, arrays
    )
    assert error(y, wide @ decoded.T) <= 2e-6


@pytest.mark.parametrize(
    "kind",
    [
        shaped("uint4b8", (1, 128), "bfloat16"),
        shaped("uint4", (1, 32), "float16", "float16"),
        shaped("uint3", (1, 64), "bfloat16", "bfloat16", additive=True),
        shaped("int8", (1, K)),
        shaped("fp8_e4m3", (64, 128)),
        shaped("fp4_e2m1", (1, 16), "float8_e4m3fn", has_global_scale=True),
        Coded("uint4b8", (1, 16), "float16", shape=(N, 96)),
    ],
    ids=str,
)
def test_many_rows(kind):
    """Weights of groups are scaled before the product."""
    spec, arrays, decoded = ready(kind)
    x = np.random.default_rng(0).standard_normal((130, kind.shape[1])).astype(np.float32)
    y = compiled(lambda x, arrays: triton.product(x.astype(jnp.bfloat16), spec, arrays))(x, arrays)
    assert least_error(y, x.astype(np.float64), decoded, "bfloat16") <= TOLERANCES["bfloat16"]


@pytest.mark.parametrize("counted", [None, 19])
def test_block_sizes_that_were_measured(counted):
    """Parts of the columns that are no multiple of the steps, tiles that are cut off."""
    spec, arrays, decoded = ready(shaped("uint4b8", (1, 64), "float16"))
    x = np.random.default_rng(0).standard_normal((37, K)).astype(np.float32)
    sizes = {"rows": 16, "outputs": 32, "columns": 64, "splits": 3, "warps": 8, "stages": 2}
    count = None if counted is None else jnp.full((1,), counted, jnp.int32)
    with tuning.trying(sizes):
        y = triton.product(jnp.asarray(x), spec, arrays, num_rows=count)
    assert y.shape == (37, N)
    assert error(y[:counted], (x.astype(np.float64) @ decoded.T)[:counted]) <= 1e-6
    sizes = {tuple(each.items()) for each in triton.candidates(spec.kind, 4, 4096, 4096)}
    assert len(sizes) > 10


def test_rows_do_not_depend_on_each_other():
    """One tile gives them alike, and all tiles of few rows sum the same parts in the same order.

    (Wider tiles are products that sum otherwise where this is interpreted, but not on a GPU.)
    """
    spec, arrays, _ = ready(shaped("uint4b8", (1, 64), "float16"))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((16, K)), jnp.float32)
    with tuning.trying({"splits": 2}):
        beside, *fewer = (triton.product(x[:rows], spec, arrays) for rows in (16, 1, 5))
    for alone in fewer:
        np.testing.assert_array_equal(alone, beside[: len(alone)])
    large = replace(spec, shape=(4096, 4096), group=(1, 128))
    blocks = [plan_of(large, rows, jnp.bfloat16).blocks for rows in range(1, 65)]
    assert {replace(each, rows=0) for each in blocks} == {replace(blocks[0], rows=0)}
    assert blocks[0].splits > 1


SIZES = [0, 3, 40, 1, 0, 17]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (shaped("uint4b8", (1, 128), "bfloat16"), "bfloat16"),
        (shaped("fp4_e2m1", (1, 16), "float8_e4m3fn", has_global_scale=True), "bfloat16"),
        (shaped("fp4_e2m1", (1, 32), "float8_e8m0fnu"), "bfloat16"),
        (shaped("uint4", (1, 64), "float16", "uint8"), "float32"),
        (shaped("lookup4", (1, 64)), "float32"),
        (shaped("fp8_e4m3", (64, 128)), "float8_e4m3fn"),
        (shaped("int8", (1, K)), "int8"),
    ],
    ids=str,
)
def test_experts(kind, dtype):
    """Groups of rows that begin anywhere, are empty, or take several tiles; rows left over."""
    drawn = [ready(kind, seed=seed) for seed in range(len(SIZES))]
    spec = drawn[0][0]
    arrays = jax.tree.map(lambda *each: jnp.stack(each), *(arrays for _, arrays, _ in drawn))
    rows = sum(SIZES) + 2
    if dtype in ("bfloat16", "float32"):
        scale, wide = None, np.random.default_rng(0).standard_normal((rows, K))
        x = jnp.asarray(wide, dtype)
        wide = np.asarray(x, np.float64)
    else:
        x, scale, wide = coded_inputs(rows, K, dtype, 4)
    y = compiled(
        lambda x, scale, sizes, arrays: grouped.product(x, sizes, spec, arrays, x_scale=scale)
    )(x, scale, jnp.array(SIZES, jnp.int32), arrays)
    assert y.shape == (rows, N)
    start = 0
    for size, (_, _, decoded) in zip(SIZES, drawn, strict=True):
        if size:
            wanted = wide[start : start + size] @ decoded.T
            assert error(y[start : start + size], wanted) <= 2e-6
        start += size


def test_tiles_of_experts():
    table = tile_table(jnp.array([0, 3, 40, 1, 0, 17], jnp.int32), 63, 16)
    found = np.stack([table[name] for name in ("expert", "start", "end")], 1).tolist()
    wanted = [[1, 0, 3], [2, 3, 43], [2, 19, 43], [2, 35, 43], [3, 43, 44], [5, 44, 61]]
    assert found[:7] == [*wanted, [5, 60, 61]]
    assert all(start == end == 0 for _, start, end in found[7:])
    assert len(found) == 63 // 16 + 6


def test_what_is_refused():
    spec, arrays, _ = ready(shaped("uint4b8", (1, 64), "float16"))
    x = jnp.zeros((4, K), jnp.int8)
    with pytest.raises(ValueError, match=r"x_scale \(4, 3\) of x \(4, 512\)"):
        triton.product(x, spec, arrays, x_scale=jnp.ones((4, 3)))
    with pytest.raises(NotImplementedError, match="a scale for each 8 columns"):
        triton.product(x, spec, arrays, x_scale=jnp.ones((4, 64)))
    canonical = shaped("uint4b8", (1, 64), "float16").spec
    with pytest.raises(NotImplementedError, match="layout 'canonical', not 'planes'"):
        triton.product(x, canonical, arrays)
    elsewhere = dispatch.use(None), platform.assume("tpu", "TPU v6 lite")
    refused = pytest.raises(NotImplementedError, match="a kernel for a gpu, and this is a tpu")
    with elsewhere[0], elsewhere[1], refused:
        triton.product(x, spec, arrays)


@pytest.mark.parametrize(
    "program", list(triton_programs.programs((1,))), ids=lambda each: each.name
)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # from jax 0.11 on
def test_lowers_for_a_gpu(program):
    text = crosscompile.lowered("h100", program.function, *program.arguments)
    assert "__gpu$xla.gpu.triton" in text


@pytest.mark.crosscompile
def test_compiles_for_an_h100():
    crosscompile.check_all("h100", triton_programs)
