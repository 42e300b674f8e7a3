"""The kernel for Hopper GPUs, which no other table of cases has, as it wants outputs by the 64.

Values are those of jax's interpreter, which simulates its memories and barriers, but multiplies no
operand in registers: these products it makes of copies in shared memory.
"""

import importlib.util
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, measurements, platform, tuning
from pallas_kernels.inputs import ActSpec
from pallas_kernels.matmul import api, matmul, mosaic_gpu, planes, prepare
from pallas_kernels.matmul.mosaic_gpu_plan import plan_of
from pallas_kernels.matmul.spec import WeightSpec
from pallas_kernels.matmul_grouped import matmul_grouped
from pallas_kernels.matmul_grouped import mosaic_gpu as grouped
from tests.pallas_kernels import crosscompile, mosaic_programs
from tests.pallas_kernels.coded import Coded, coded_inputs, laid_out
from tests.pallas_kernels.products import TOLERANCES, error, least_error

N, K = 64, 256
H100 = "NVIDIA H100 80GB HBM3"
EXACT = 2e-6  # where nothing but x is rounded

ready = partial(laid_out, layout=planes.PLANES)


@pytest.fixture(autouse=True)
def named():
    with dispatch.use("mosaic_gpu"):
        yield


def shaped(*args, shape=(N, K), **kwargs):
    return Coded(*args, **kwargs, shape=shape)


def inputs(rows, k=K):
    return np.random.default_rng(rows).standard_normal((rows, k)).astype(np.float32)


def run(kind, rows):
    """The product, and what it is in float64 of inputs that were rounded."""
    spec, arrays, decoded = ready(kind)
    x = jnp.asarray(inputs(rows, kind.shape[1]), jnp.bfloat16)
    y = jax.jit(lambda x, arrays: mosaic_gpu.product(x, spec, arrays))(x, arrays)
    assert y.shape == (rows, kind.shape[0])
    return y, np.asarray(x, np.float64) @ decoded.T


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        # Sums of groups are scaled.
        (shaped("uint4b8", (1, 128), "bfloat16", shape=(N, 768)), EXACT),
        (shaped("uint4", (1, 64), "float16", "uint8"), EXACT),
        (shaped("uint8", (1, 128), "float32", "uint8"), EXACT),
        (shaped("uint2", (1, 64), "float16", "uint8"), EXACT),
        (shaped("uint8b128", (1, 512), "bfloat16", shape=(N, 1024)), EXACT),
        (shaped("fp8_e4m3", (128, 128), shape=(192, 256)), EXACT),
        # Whole sums are.
        (shaped("int8", (1, 1280), shape=(N, 1280)), EXACT),
        (shaped("uint4b8", (16, K), "float16"), EXACT),
        (shaped("uint3", (1, K), "float16", "uint8"), EXACT),
        (shaped("uint4", (1, K), "bfloat16", "bfloat16", additive=True), EXACT),
        (shaped("uint4", (1, K), "float16", "float16"), EXACT),
        (shaped("fp8_e5m2", (N, K), has_global_scale=True), EXACT),
        # Weights are, and rounded, if their scales are not powers of two.
        (shaped("uint4b8", (1, 32), "float16"), TOLERANCES["bfloat16"]),
        (shaped("uint4", (1, 64), "float16", "float16"), TOLERANCES["bfloat16"]),
        (shaped("uint4", (1, 32), "bfloat16", "bfloat16", additive=True), TOLERANCES["bfloat16"]),
        (shaped("uint3b4", (1, 16), "float16"), TOLERANCES["bfloat16"]),
        (shaped("uint1", (1, 128), "float16", "uint8"), TOLERANCES["bfloat16"]),
        (shaped("uint7b64", (1, 128), "float16"), TOLERANCES["bfloat16"]),
        (shaped("fp6_e3m2", (1, 32), "float8_e8m0fnu"), EXACT),
        (shaped("fp4_e2m1", (1, 32), "float8_e8m0fnu"), EXACT),
        (shaped("fp4_e2m1", (1, 16), "float8_e4m3fn", has_global_scale=True), EXACT),
        (shaped("lookup4", (1, 64)), TOLERANCES["bfloat16"]),
        # K is filled up, and groups are longer than a block.
        (shaped("uint4b8", (1, 32), "float16", shape=(N, 96)), TOLERANCES["bfloat16"]),
        (shaped("uint4", (1, 128), "float16", "uint8", shape=(N, 192)), TOLERANCES["bfloat16"]),
        (shaped("int8", (1, 128), shape=(N, 320)), EXACT),
    ],
    ids=str,
)
def test_few_rows(kind, tolerance):
    y, wanted = run(kind, 3)
    assert error(y, wanted) <= tolerance


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        (shaped("uint4b8", (1, 128), "bfloat16", shape=(128, 256)), TOLERANCES["bfloat16"]),
        (shaped("uint4", (1, 64), "float16", "uint8", shape=(N, 128)), TOLERANCES["bfloat16"]),
        (shaped("int8", (1, 256), shape=(N, 256)), EXACT),
    ],
    ids=str,
)
def test_many_rows(kind, tolerance):
    """Two tiles of rows; two warpgroups that compute, or one where there are 64 outputs."""
    y, wanted = run(kind, 130)
    assert error(y, wanted) <= tolerance


@pytest.mark.parametrize(
    ("dtype", "groups", "kind", "dot"),
    [
        ("int8", 1, shaped("int8", (1, K)), "int8"),
        ("int8", 4, shaped("int8", (1, 512), shape=(N, 512)), "int8"),
        ("int8", 1, shaped("uint4b8", (1, 128), "float16"), "int8"),
        ("int8", 1, shaped("uint4", (1, K), "float16", "uint8"), "int8"),
        ("int8", 1, shaped("uint8", (1, K), "float32", "uint8"), "bfloat16"),
        ("int8", 8, shaped("uint4", (1, 64), "float16", "uint8"), "bfloat16"),
        ("int8", 1, shaped("uint3b4", (1, 128), "float16"), "bfloat16"),
        ("bfloat16", 2, shaped("uint8", (1, K), "float32", "float32"), "bfloat16"),
        ("float8_e4m3fn", 1, shaped("fp8_e4m3", (1, K)), "float8_e4m3fn"),
        ("float8_e4m3fn", 2, shaped("fp8_e4m3", (64, 128)), "float8_e4m3fn"),
        ("float8_e4m3fn", 1, shaped("uint4b8", (1, 128), "bfloat16"), "bfloat16"),
        ("float8_e4m3fn", 8, shaped("fp4_e2m1", (1, 32), "float8_e8m0fnu"), "bfloat16"),
        ("float8_e4m3fn", 3, shaped("fp8_e4m3", (64, 128), shape=(N, 384)), "float8_e4m3fn"),
        ("float8_e5m2", 1, shaped("fp8_e4m3", (1, K)), "bfloat16"),
    ],
    ids=str,
)
def test_inputs_of_codes(dtype, groups, kind, dot):
    """Nothing is rounded but sums, where matrix units add floats of 8 bits with fewer bits."""
    spec, arrays, decoded = ready(kind)
    x, scale, wide = coded_inputs(5, kind.shape[1], dtype, groups)
    y = jax.jit(lambda x, scale, arrays: mosaic_gpu.product(x, spec, arrays, x_scale=scale))(
        x, scale, arrays
    )
    short = "float8" in dot and platform.device_kind() == "gpu"
    assert error(y, wide @ decoded.T) <= (1e-3 if short else EXACT)
    x_group = kind.shape[1] // groups if groups > 1 else None
    assert plan_of(spec, 5, x.dtype, exact_codes=True, x_group=x_group).dot == dot


def test_quantized_inputs():
    spec, arrays, decoded = ready(shaped("int8", (1, K)))
    x = inputs(3)
    act = ActSpec("int8", "token", True)
    (y,) = jax.jit(lambda x, arrays: matmul(x, [(spec, arrays)], act=act))(x, arrays)
    assert dispatch.chosen()["matmul int8 int8"] == ("mosaic_gpu", {})
    scale = np.abs(x).max(1, keepdims=True).astype(np.float64) / 127
    assert error(y, np.rint(x / scale) * scale @ decoded.T) <= TOLERANCES["float32"]


# Scales of one level and of two, with zero points, groups of 16, a codebook; all are compiled.
@pytest.mark.parametrize("qtype", ["q8_0", "q4_1", "q4_k", "q6_k", "iq4_xs"])
def test_blocks_of_gguf(golden_weight, qtype):
    raw, values = golden_weight(qtype, N, 256)
    spec, arrays = prepare(WeightSpec(qtype, (N, 256)), raw)
    x = inputs(3, 256)
    (y,) = jax.jit(lambda x, arrays: matmul(x, [(spec, arrays)], activation_dtype="bfloat16"))(
        x, jax.tree.map(jnp.asarray, arrays)
    )
    wide = x.astype(np.float64), values.astype(np.float64)
    assert least_error(y, *wide, "bfloat16") <= TOLERANCES["bfloat16"]


def test_around_products():
    """Two weights under one norm, activation, and rows of padding."""
    kinds = [shaped("uint4b8", (1, 128), "bfloat16"), shaped("int8", (1, K))]
    (gate, of_gate, gate64), (up, of_up, up64) = (
        ready(kind, seed=i) for i, kind in enumerate(kinds)
    )
    x, norm = inputs(4), np.random.default_rng(0).uniform(0.5, 1, K).astype(np.float32)

    @jax.jit
    def call(x, of_gate, of_up):
        return matmul(
            x,
            [(gate, of_gate), (up, of_up)],
            norm=jnp.asarray(norm),
            norm_eps=1e-6,
            activation="silu",
            activation_dtype="bfloat16",
            num_rows=jnp.full((1,), 3, jnp.int32),
        )

    (y,) = call(x, of_gate, of_up)
    assert dispatch.chosen()["matmul uint4b8+int8"] == ("mosaic_gpu", {})
    wide = x.astype(np.float64)
    wide = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * norm
    g = wide @ gate64.T
    wanted = g / (1 + np.exp(-g)) * (wide @ up64.T)
    assert error(y[:3], wanted[:3]) <= 2 * TOLERANCES["bfloat16"]


def test_block_sizes_that_were_measured():
    spec, arrays, decoded = ready(shaped("uint4b8", (1, 64), "float16", shape=(128, 1024)))
    x = jnp.asarray(inputs(5, 1024), jnp.bfloat16)
    # No multiple of 3 splits 4 blocks; no chunk is wider than a group.
    sizes = {"rows": 16, "columns": 128, "warpgroups": 2, "splits": 3, "stages": 3}
    wanted = {"rows": 16, "columns": 64, "warpgroups": 2, "splits": 1, "stages": 3}
    with tuning.trying(sizes):
        assert vars(plan_of(spec, 5).blocks) == wanted
    with tuning.trying(sizes | {"splits": 2}):
        y = mosaic_gpu.product(x, spec, arrays)
    assert error(y, np.asarray(x, np.float64) @ decoded.T) <= EXACT
    sizes = {tuple(each.items()) for each in mosaic_gpu.candidates(spec.kind, 4, 4096, 4096)}
    assert len(sizes) > 10


def test_rows_do_not_depend_on_each_other():
    spec, arrays, _ = ready(shaped("uint4b8", (1, 64), "float16"))
    x = jnp.asarray(inputs(8), jnp.bfloat16)
    # (A tile of more rows is summed otherwise where this is interpreted, but not on a GPU.)
    beside, alone = (mosaic_gpu.product(x[:rows], spec, arrays) for rows in (8, 1))
    np.testing.assert_array_equal(alone, beside[:1])
    large = replace(spec, shape=(4096, 4096), group=(1, 128))
    plans = [plan_of(large, rows) for rows in range(1, 65)]
    alike = {replace(each, blocks=replace(each.blocks, rows=0)) for each in plans}
    assert len(alike) == 1
    assert plans[0].blocks.splits > 1


def refused(kind, reason, spec=None, x=jnp.bfloat16):
    made, arrays, _ = ready(kind)
    x = jnp.zeros((4, kind.shape[1]), x)
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_gpu.product(x, spec or made, arrays)


def test_what_is_refused(monkeypatch):
    kind = shaped("uint4b8", (1, 64), "float16")
    refused(
        shaped("uint4b8", (1, 64), "float16", shape=(40, K)), "40 outputs, not a multiple of 64"
    )
    refused(shaped("uint4b8", (1, 24), "float16"), "groups of 24 columns in blocks of 256")
    refused(shaped("uint4b8", (1, 8), "float16"), "groups of 8 columns")
    refused(shaped("uint2", (1, 32), "float16", shape=(N, 64)), "runs of 16 columns")
    added = shaped("uint4", (1, 64), zero_point="float32", additive=True, has_global_scale=True)
    refused(added, "a global scale beside zero points that are added")
    refused(kind, "layout 'canonical', not 'planes'", kind.spec)
    refused(kind, "inputs of bfloat16, not float32", x=jnp.float32)
    for each in mosaic_programs.REFUSED:
        spec = replace(each, shape=(N, 4096)).spec
        with pytest.raises(NotImplementedError, match=r"groups of 24|a codebook of 256 entries"):
            plan_of(spec, 1)
    for kind_of_codes, reason in (
        (shaped("uint4", (1, 64), "float16", "float16"), "zero points that are no integers"),
        (shaped("fp4_e2m1", (1, 16), "float8_e4m3fn"), "groups of 16 columns"),
        (shaped("lookup4", (1, 64)), "a codebook of 16 entries"),
    ):
        refused(kind_of_codes, reason, x=jnp.int8)
    spec, arrays, _ = ready(kind)
    with pytest.raises(ValueError, match=r"x_scale \(4, 3\) of x \(4, 256\)"):
        mosaic_gpu.product(jnp.zeros((4, K), jnp.int8), spec, arrays, x_scale=jnp.ones((4, 3)))
    with dispatch.use(None), platform.assume("cpu"):
        refused(kind, "a kernel for a gpu, and this is a cpu")
    with platform.assume("gpu", "NVIDIA A100-SXM4-80GB"):
        refused(kind, "a kernel for Hopper GPUs, and this is NVIDIA A100")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(kind, "jax needs the package absl-py")


SIZES = [0, 3, 19, 1]


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [
        (shaped("uint4b8", (1, 128), "bfloat16", shape=(N, 512)), "bfloat16", EXACT),
        (shaped("fp4_e2m1", (1, 16), "float8_e4m3fn", has_global_scale=True), "bfloat16", EXACT),
        (shaped("uint4", (1, K), "float16", "uint8"), "bfloat16", EXACT),
        (shaped("lookup4", (1, 64)), "bfloat16", TOLERANCES["bfloat16"]),
        (shaped("int8", (1, K)), "int8", EXACT),
        (shaped("fp8_e4m3", (64, 128)), "float8_e4m3fn", EXACT),
    ],
    ids=str,
)
def test_experts(kind, dtype, tolerance):
    """Groups of rows that begin anywhere, are empty, or take several tiles; rows left over."""
    drawn = [ready(kind, seed=seed) for seed in range(len(SIZES))]
    spec, arrays = drawn[0][0], jax.tree.map(lambda *a: jnp.stack(a), *(each[1] for each in drawn))
    rows, k = sum(SIZES) + 2, kind.shape[1]
    short = "float8" in dtype and platform.device_kind() == "gpu"  # sums of matrix units
    scale, x = None, jnp.asarray(inputs(rows, k), jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    if dtype != "bfloat16":
        x, scale, wide = coded_inputs(rows, k, dtype, 2)
    y = jax.jit(
        lambda x, scale, sizes, arrays: grouped.product(x, sizes, spec, arrays, x_scale=scale)
    )(x, scale, jnp.array(SIZES, jnp.int32), arrays)
    assert y.shape == (rows, N)
    start = 0
    for size, (_, _, decoded) in zip(SIZES, drawn, strict=True):
        if size:
            wanted = wide[start : start + size] @ decoded.T
            assert error(y[start : start + size], wanted) <= (1e-3 if short else tolerance)
        start += size


def test_experts_of_a_layer():
    """By name, and with a bias for each."""
    kind, sizes = shaped("uint4b8", (1, 128), "bfloat16"), jnp.array([2, 1], jnp.int32)
    drawn = [ready(kind, seed=seed) for seed in range(2)]
    arrays = jax.tree.map(lambda *a: jnp.stack(a), *(each[1] for each in drawn))
    x, bias = inputs(3), np.random.default_rng(9).standard_normal((2, N)).astype(np.float32)
    given = jnp.asarray(x), sizes, (drawn[0][0], arrays)
    y = matmul_grouped(*given, bias=jnp.asarray(bias), activation_dtype="bfloat16")
    assert dispatch.chosen()["matmul_grouped uint4b8"][0] == "mosaic_gpu"
    rounded = x.astype(jnp.bfloat16).astype(np.float64)
    wanted = [rounded[t] @ drawn[e][2].T + bias[e] for t, e in enumerate((0, 0, 1))]
    assert error(y, np.stack(wanted)) <= EXACT
    with pytest.raises(NotImplementedError, match="inputs of bfloat16, not float32"):
        matmul_grouped(*given)


@pytest.mark.parametrize("dtype", ["float32", "int16", "int8"])
def test_other_roundings_of_inputs_are_refused(dtype):
    spec, arrays, _ = ready(shaped("int8", (1, K)))
    with pytest.raises(NotImplementedError, match=f"inputs of bfloat16, not {dtype}"):
        matmul(jnp.zeros((4, K)), [(spec, arrays)], activation_dtype=dtype)


def test_it_runs_where_it_was_measured_to_be_the_fastest(tmp_path, monkeypatch):
    monkeypatch.setenv("QJAX_CACHE", str(tmp_path))
    spec, arrays, _ = ready(shaped("uint4b8", (1, 128), "bfloat16"))
    entry = measurements.Measurement(
        "matmul", spec.kind, N, K, 16, "mosaic_gpu", {"splits": 1}, 10.0, "0.10.2"
    )

    def ran():
        x = jax.ShapeDtypeStruct((4, K), jnp.float32)
        jax.eval_shape(lambda x: matmul(x, [(spec, arrays)], activation_dtype="bfloat16"), x)
        return dispatch.chosen()["matmul uint4b8"][0]

    with dispatch.use(None), platform.assume("gpu", H100):
        assert ran() == "triton"
        path = tmp_path / "tuning" / measurements.file_name(H100)
        measurements.write(path, H100, [entry])
        assert ran() == "mosaic_gpu"
    assert [name for name, _ in api.IMPLEMENTATIONS].index("mosaic_gpu") == 2


@pytest.mark.parametrize(
    "program",
    [each for each in mosaic_programs.programs((1,)) if "g128" in each.name or "q4_k" in each.name],
    ids=lambda each: each.name,
)
def test_lowers_for_a_gpu(program):
    text = crosscompile.lowered("h100", program.function, *program.arguments)
    assert "mosaic_gpu" in text


@pytest.mark.crosscompile
def test_compiles_for_an_h100():
    crosscompile.check_all("h100", mosaic_programs)
