"""Products with weights made of codes, held by every implementation against float64 numpy."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.matmul import api, matmul, prepare, unprepare
from tests.pallas_kernels.cached import QUICKLY
from tests.pallas_kernels.coded import Coded, draw
from tests.pallas_kernels.products import (
    COMPILED,
    INTERPRETED,
    PRODUCTS,
    TOLERANCES,
    error,
    least_error,
)

N, K = 40, 320  # neither N nor the groups of 128 columns divide
KINDS = {
    "uint4b8": [
        Coded("uint4b8", (1, 64), "float16"),
        Coded("uint4b8", (1, 128), "bfloat16"),
        Coded("uint4b8", (1, K)),
        Coded("uint4b8", (1, 16), "bfloat16"),
        Coded("uint4b8", (1, 48), "float16"),
        Coded("uint4b8", (16, 32), "float16", has_global_scale=True),
        Coded("uint4b8", (1, 64), "float16", "float32", additive=True),
    ],
    "uint4": [
        Coded("uint4", (1, 32), "float16", "uint8"),
        Coded("uint4", (1, 64), "bfloat16", "int8"),
        Coded("uint4", (1, 64), "float16", "float16"),
        Coded("uint4", (1, 128), "bfloat16", "bfloat16", additive=True),
        Coded("uint4", (N, K), "float32", "float32"),
        Coded("uint4", (1, 64), "float16", "uint8", shape=(24, 104)),
    ],
    "uint2": [Coded("uint2", (1, 64), "float16", "uint8"), Coded("uint2b2", (1, 32), "float16")],
    "uint3": [Coded("uint3", (1, 64), "float16", "uint8"), Coded("uint3b4", (1, 128), "float16")],
    "uint5": [Coded("uint5", (1, 64), "float16", "uint8"), Coded("uint5b16", (1, 32), "float16")],
    "uint6": [Coded("uint6", (1, 64), "float16", "uint8"), Coded("uint6b32", (1, K), "float16")],
    "uint7": [Coded("uint7", (1, 64), "float16", "uint8"), Coded("uint7b64", (1, 32), "float16")],
    "uint8": [
        Coded("uint8", (1, 64), "float16", "uint8"),
        Coded("uint8", (1, K), "float32", "float32"),
        Coded("uint8b128", (1, 128), "float16"),
        Coded("uint8b128", (1, K), shape=(24, 136)),
    ],
    "int8": [
        Coded("int8", (1, K)),
        Coded("int8", (N, K)),
        Coded("int8", (32, 128), "bfloat16"),
        Coded("int8", (1, 64), "float16", "int8"),
    ],
    "fp8_e4m3": [
        Coded("fp8_e4m3", (1, K)),
        Coded("fp8_e4m3", (128, 128), shape=(144, K)),
        Coded("fp8_e4m3", (16, 64), "bfloat16"),
        Coded("fp8_e4m3", (1, 32), "float8_e8m0fnu", shape=(17, 104)),
        Coded("fp8_e4m3", (N, K), has_global_scale=True),
    ],
    "fp8_e5m2": [Coded("fp8_e5m2", (1, K)), Coded("fp8_e5m2", (1, 32), "float8_e8m0fnu")],
    "fp6": [
        Coded("fp6_e2m3", (1, 32), "float8_e8m0fnu"),
        Coded("fp6_e3m2", (1, 32), "float8_e8m0fnu"),
    ],
    "fp4_e2m1": [
        Coded("fp4_e2m1", (1, 16), "float8_e4m3fn", has_global_scale=True),
        Coded("fp4_e2m1", (1, 32), "float8_e8m0fnu"),
        Coded("fp4_e2m1", (1, 64), "float16", shape=(33, 104)),
    ],
    "lookup4": [
        Coded("lookup4", (1, 64)),
        Coded("lookup4", (1, 32), "float16", shape=(24, 136)),
        Coded("lookup4", (N, K), "bfloat16"),
    ],
    "sparse24": [
        Coded("sparse24_uint4b8", (1, 64), "float16"),
        Coded("sparse24_uint8b128", (1, K), "float16"),
    ],
}
# What kernels leave to others.
LEFT = {"native": ("uint7", "fp6", "sparse24"), "triton": ("sparse24",), "tpu": ("sparse24",)}


def ready(kind, seed=0):
    """The weight as the implementation in use wants it, and its float64 values."""
    arrays, decoded = draw(kind, seed)
    spec, arrays = prepare(kind.spec, arrays)
    return spec, jax.tree.map(jnp.asarray, arrays), decoded


def inputs(rows, k):
    return np.random.default_rng(rows).standard_normal((rows, k)).astype(np.float32)


@pytest.mark.parametrize(
    ("implementation", "name"),
    [
        (implementation, name)
        for name in KINDS
        for implementation in ("native", "triton", "tpu", "xla", "ref")
        if name not in LEFT.get(implementation, ())
    ],
    indirect=["implementation"],
)
def test_products(implementation, name):
    """One, few and many rows, rounded activations or not: each weight in every way, in one call."""
    ways = [(1, "float32"), (1, "int16"), (3, "int16"), (8, "float32"), (8, "int8"), (17, "int16")]
    ways += [(33, "float32"), (33, "int8")]
    if implementation in INTERPRETED:
        ways = [(1, "bfloat16"), (3, "float32")]
    elif implementation == "ref":  # which decodes weights whatever x is, of however many rows
        ways = [(3, "float32")]
        if name == "fp4_e2m1":  # of which a row ends within a block of activations
            ways += [(3, "int8")]
    weights = [ready(kind, seed) for seed, kind in enumerate(KINDS[name])]
    if implementation == "native":
        weights = [weight for weight in weights if weight[0].layout != "canonical"]
        assert weights

    def call(xs, arrays):
        return [
            [
                matmul(x[:, : spec.shape[1]], [(spec, own)], activation_dtype=dtype)[0]
                for x, (_, dtype) in zip(xs, ways, strict=True)
            ]
            for own, (spec, _, _) in zip(arrays, weights, strict=True)
        ]

    xs = [inputs(rows, K) for rows, _ in ways]
    quickly = QUICKLY if implementation in INTERPRETED else None
    results = jax.jit(call, compiler_options=quickly)(xs, [arrays for _, arrays, _ in weights])
    for ys, (spec, _, decoded) in zip(results, weights, strict=True):
        for y, x, (rows, dtype) in zip(ys, xs, ways, strict=True):
            x = x[:, : spec.shape[1]].astype(np.float64)
            worst = least_error(y, x, decoded, dtype)
            assert worst <= TOLERANCES[dtype], (spec, rows, dtype, worst)


@PRODUCTS
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", [KINDS["uint4b8"][1], KINDS["int8"][3], KINDS["fp8_e4m3"][0]])
def test_weights_rounded_as_a_tool_rounds_them(implementation, kind, dtype):
    """In exact products. With rounded activations a kernel may leave weights as they are."""
    arrays, unrounded = draw(kind)
    small = np.float32(2**-16)  # so that float16 has subnormal ones
    wanted = (unrounded * small).astype(np.float32).astype(dtype).astype(np.float64)
    spec = replace(kind.spec, has_global_scale=True, rounded=dtype)
    spec, arrays = prepare(spec, arrays._replace(global_scale=small.reshape(1, 1)))
    for rows in (8,) if implementation in INTERPRETED else (1, 8, 33):
        x = inputs(rows, K)
        (y,) = matmul(jnp.asarray(x), [(spec, arrays)])
        assert error(y, x.astype(np.float64) @ wanted.T) <= TOLERANCES["float32"]
        (y,) = matmul(jnp.asarray(x), [(spec, arrays)], activation_dtype="int8")
        assert error(y, x.astype(np.float64) @ wanted.T) <= 0.02


@PRODUCTS
def test_several_weights_in_one_call(implementation):
    """Integers and floats share one input, with everything around the products."""
    kinds = [KINDS[name][0] for name in ("uint4b8", "fp8_e4m3", "uint4", "lookup4")]
    weights = [ready(kind) for kind in kinds]
    x, norm = inputs(9, K), inputs(1, K)[0]
    bias = inputs(2, N)[0]
    interpreted = implementation in INTERPRETED
    for rows in (9,) if interpreted else (1, 9):
        for dtype in ("bfloat16",) if interpreted else api.ACTIVATION_DTYPES:
            ys = matmul(
                jnp.asarray(x[:rows]),
                [(spec, arrays) for spec, arrays, _ in weights],
                norm=jnp.asarray(norm),
                biases=[None, jnp.asarray(bias), None, None],
                activation_dtype=dtype,
            )
            wide = x[:rows].astype(np.float64)
            wide = wide / np.sqrt((wide**2).mean(-1, keepdims=True)) * norm
            for i, (y, (_, _, decoded)) in enumerate(zip(ys, weights, strict=True)):
                add = bias if i == 1 else 0
                assert least_error(y, wide, decoded, dtype, add) <= TOLERANCES[dtype]


@pytest.mark.parametrize("name", ["uint4b8", "uint4", "int8", "fp8_e4m3", "fp4_e2m1", "lookup4"])
@pytest.mark.parametrize("dtype", api.ACTIVATION_DTYPES)
@COMPILED
def test_rows_do_not_depend_on_each_other(implementation, name, dtype):
    spec, arrays, _ = ready(KINDS[name][0])
    x = jnp.asarray(inputs(33, K))
    (beside,) = matmul(x, [(spec, arrays)], activation_dtype=dtype)
    for rows in (1, 5, 8):
        (alone,) = matmul(x[:rows], [(spec, arrays)], activation_dtype=dtype)
        np.testing.assert_array_equal(alone, beside[:rows])


@pytest.mark.parametrize("name", KINDS)
def test_prepare_is_undone_exactly(implementation, name):
    for kind in KINDS[name]:
        arrays, _ = draw(kind)
        spec, tiled = prepare(kind.spec, arrays)
        back, again = unprepare(spec, tiled)
        assert back == kind.spec
        for before, after in zip(arrays, again, strict=True):
            if before is not None:
                np.testing.assert_array_equal(before.view(np.uint8), after.view(np.uint8))


@pytest.mark.parametrize("name", ["uint4b8", "int8", "fp8_e4m3"])
def test_experts_are_tiled_one_by_one(implementation, name):
    kind = KINDS[name][0]
    drawn = [draw(kind, seed)[0] for seed in range(3)]
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *drawn)
    spec, tiled = prepare(kind.spec, stacked)
    back, again = unprepare(spec, tiled)
    assert back == kind.spec
    jax.tree.map(np.testing.assert_array_equal, stacked, again)
    for expert, alone in enumerate(drawn):
        one = jax.tree.map(lambda array, at=expert: array[at], tiled)
        jax.tree.map(np.testing.assert_array_equal, prepare(kind.spec, alone)[1], one)


def test_memory_stays_that_of_the_checkpoint(implementation):
    for kind in (
        Coded("uint4b8", (1, 128), "float16", shape=(256, 512)),
        Coded("uint4", (1, 64), "float16", "uint8", shape=(256, 512)),
        Coded("fp8_e4m3", (128, 128), shape=(256, 512)),
        Coded("fp4_e2m1", (1, 16), "float8_e4m3fn", shape=(256, 512)),
    ):
        arrays, _ = draw(kind)
        _, tiled = prepare(kind.spec, arrays)

        def size(arrays):
            return sum(array.nbytes for array in arrays if array is not None)

        assert size(tiled) <= 1.02 * size(arrays)


@PRODUCTS
def test_codes_that_are_no_numbers_stay_so(implementation):
    """e4m3 with all bits of exponent and mantissa set is NaN; the outputs beside it are numbers."""
    kind = KINDS["fp8_e4m3"][0]
    arrays, _ = draw(kind)
    arrays.qvalue[3, 5] = 0xFF
    spec, tiled = prepare(kind.spec, arrays)
    assert implementation != "native" or spec.layout == "canonical"
    named = "xla" if implementation == "native" else implementation
    (y,) = matmul(jnp.asarray(inputs(1, K)), [(spec, tiled)], implementation=named)
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(y)), [3])
