"""What only the kernel for TPUs has: inputs of codes, block sizes, experts, and how it lowers."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from pallas_kernels import dispatch, platform, tuning
from pallas_kernels.matmul import planes, tpu, tpu_plan
from tests.pallas_kernels import crosscompile, tpu_programs
from tests.pallas_kernels.coded import Coded, coded_inputs, laid_out
from tests.pallas_kernels.products import TOLERANCES, error

N, K = 72, 512


@pytest.fixture(autouse=True)
def interpreted():
    with dispatch.use("tpu"):
        yield


ready = partial(laid_out, layout=planes.TRANSPOSED)


def shaped(*args, **kwargs):
    return Coded(*args, **kwargs, shape=(N, K))


@pytest.mark.parametrize(
    ("dtype", "groups", "kind", "dot"),
    [
        ("int8", 1, shaped("int8", (1, K)), "int8"),
        ("int8", 1, shaped("uint8", (1, K), "float32", "uint8"), "int8"),
        ("int8", 4, shaped("uint8b128", (1, 128), "bfloat16"), "int8"),
        ("int8", 4, shaped("uint4", (1, 256), "float16", "uint8"), "int8"),
        ("int8", 2, shaped("uint4", (1, 128), "bfloat16", "bfloat16", additive=True), "int8"),
        ("int8", 4, shaped("uint3b4", (1, 32), "float16"), "float32"),
        ("int8", 16, shaped("int8", (1, K)), "float32"),
        ("int8", 1, shaped("fp8_e4m3", (1, K)), "bfloat16"),
        ("int8", 1, shaped("lookup4", (1, 64)), "float32"),
        ("bfloat16", 1, shaped("uint8", (1, K), "float32", "float32"), "bfloat16"),
        ("float8_e4m3fn", 4, shaped("fp8_e4m3", (64, 128)), "bfloat16"),
        ("float8_e4m3fn", 16, shaped("fp4_e2m1", (1, 32), "float8_e8m0fnu"), "float32"),
    ],
    ids=str,
)
def test_inputs_of_codes(dtype, groups, kind, dot):
    """Nothing is rounded but sums."""
    spec, arrays, decoded = ready(kind)
    x, scale, wide = coded_inputs(5, K, dtype, groups)

    def product(x, scale, arrays):
        return tpu.product(x, spec, arrays, x_scale=scale)

    assert operands(product, x, scale, arrays) == {dot}
    assert error(jax.jit(product)(x, scale, arrays), wide @ decoded.T) <= 2e-6


def operands(function, *args):
    """Dtypes of what is multiplied inside the kernel."""
    (call,) = (e for e in jax.make_jaxpr(function)(*args).eqns if e.primitive.name == "pallas_call")

    def dots(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield equation
            for inner in jaxprs_in_params(equation.params):
                yield from dots(inner)

    return {var.aval.dtype.name for dot in dots(call.params["jaxpr"]) for var in dot.invars}


def test_floats_of_8_bits_meet_as_such_where_units_take_them():
    spec, arrays, decoded = ready(shaped("fp8_e4m3", (1, K)))
    x, scale, wide = coded_inputs(5, K, "float8_e4m3fn", 1)
    with platform.assume("tpu", "TPU7x"):
        assert tpu_plan.plan_of(spec, 5, x.dtype).dot == "float8_e4m3fn"
    assert tpu_plan.plan_of(spec, 5, x.dtype).dot == "bfloat16"
    taken = partial(tpu_plan._dot, device="TPU7x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu_plan, "_dot", lambda *args: taken(*args[:3]))
        y = jax.jit(lambda x, a: tpu.product(x, spec, a, x_scale=scale))(x, arrays)
    assert error(y, wide @ decoded.T) <= 2e-6


@pytest.mark.parametrize("counted", [None, 19])
def test_block_sizes_that_were_measured(counted):
    """Several tiles of everything, cut off at the ends; those behind the last row are left out."""
    spec, arrays, decoded = ready(Coded("uint3b4", (1, 128), "float16", shape=(300, 1024)))
    x = np.random.default_rng(0).standard_normal((37, 1024)).astype(np.float32)
    count = None if counted is None else jnp.full((1,), counted, jnp.int32)
    with tuning.trying({"rows": 16, "outputs": 128, "units": 2}):
        y = jax.jit(lambda x, a, count: tpu.product(x, spec, a, num_rows=count))(x, arrays, count)
    assert y.shape == (37, 300)
    assert error(y[:counted], (x.astype(np.float64) @ decoded.T)[:counted]) <= 1e-6
    sizes = {tuple(each.items()) for each in tpu.candidates(spec.kind, 4, 4096, 4096)}
    assert len(sizes) > 4


def test_many_rows():
    spec, arrays, decoded = ready(shaped("fp4_e2m1", (1, 16), "float8_e4m3fn"))
    x = np.random.default_rng(0).standard_normal((530, K)).astype(np.float32)
    y = jax.jit(lambda x, a: tpu.product(x.astype(jnp.bfloat16), spec, a))(x, arrays)
    assert error(y, x.astype(np.float64) @ decoded.T) <= TOLERANCES["bfloat16"]


@pytest.mark.parametrize("device", ["TPU v4", "TPU v5 lite", "TPU v6 lite", "TPU7x"])
def test_block_sizes(device):
    """They fit VMEM, and what is summed in which order does not hang on the number of rows."""
    kinds = [
        (Coded("uint4b8", (1, 128), "bfloat16"), (14336, 4096), 256),
        (Coded("uint4b8", (1, 128), "bfloat16"), (4096, 11008), 256),
        (Coded("fp8_e4m3", (128, 128)), (4096, 14336), 256),
        (Coded("fp4_e2m1", (1, 32), "float8_e8m0fnu"), (5760, 2880), 192),
        (Coded("uint4b8", (1, 64), "float16"), (896, 896), 128),
        (Coded("uint4b8", (1, 48), "float16"), (40, 768), 768),
    ]
    for kind, shape, unit in kinds:
        spec = replace(kind, shape=shape).spec
        with platform.assume("tpu", device):
            plans = [tpu_plan.plan_of(spec, rows, "bfloat16") for rows in (1, 7, 16, 300, 4096)]
        for plan in plans:
            assert plan.unit == unit
            assert plan.planes.k % plan.step == 0
            assert plan.blocks.rows % 16 == 0
            assert plan.blocks.outputs % 128 == 0 or plan.blocks.outputs == shape[0]
            copies = 2 * plan.step * plan.blocks.outputs * plan.planes.bits // 8
            copies += 4 * plan.step * plan.blocks.rows + 12 * plan.blocks.rows * plan.blocks.outputs
            assert copies <= plan.vmem <= tpu_plan.vmem(device)
        assert len({replace(plan, blocks=plans[0].blocks) for plan in plans}) == 1


SIZES = [0, 3, 40, 1, 0, 17]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (shaped("fp4_e2m1", (1, 16), "float8_e4m3fn", has_global_scale=True), "bfloat16"),
        (shaped("uint4", (1, 64), "float16", "uint8"), "float32"),
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
    if dtype == "int8":
        x, scale, wide = coded_inputs(rows, K, dtype, 4)
    else:
        scale, wide = None, np.random.default_rng(0).standard_normal((rows, K))
        x = jnp.asarray(wide, dtype)
        wide = np.asarray(x, np.float64)
    with tuning.trying({"rows": 32, "units": 1}):
        y = jax.jit(
            lambda x, scale, sizes, arrays: tpu.product(
                x, spec, arrays, x_scale=scale, group_sizes=sizes
            )
        )(x, scale, jnp.array(SIZES, jnp.int32), arrays)
    assert y.shape == (rows, N)
    start = 0
    for size, (_, _, decoded) in zip(SIZES, drawn, strict=True):
        if size:
            wanted = wide[start : start + size] @ decoded.T
            limit = TOLERANCES["bfloat16"] if dtype == "bfloat16" else 2e-6
            assert error(y[start : start + size], wanted) <= limit
        start += size


def test_visits_of_experts():
    visits = jax.jit(tpu.visits, static_argnums=(1, 2))
    table = visits(jnp.array([0, 3, 40, 1, 0, 17], jnp.int32), 63, 16)
    found = np.stack([table[name] for name in ("tile", "expert", "start", "end")], 1).tolist()
    wanted = [[0, 1, 0, 3], [0, 2, 3, 16], [1, 2, 16, 32], [2, 2, 32, 43], [2, 3, 43, 44]]
    wanted += [[2, 5, 44, 48], [3, 5, 48, 61]]
    assert found[:7] == wanted
    assert found[7:] == [[3, 5, 48, 48]] * (4 + 6 - 1 - 7)
    nobody = visits(jnp.zeros(3, jnp.int32), 20, 16)
    assert (nobody["start"] == nobody["end"]).all()


def test_what_is_refused():
    spec, arrays, _ = ready(shaped("uint4b8", (1, 64), "float16"))
    x = jnp.zeros((4, K), jnp.int8)
    with pytest.raises(ValueError, match=r"x_scale \(4, 3\) of x \(4, 512\)"):
        tpu.product(x, spec, arrays, x_scale=jnp.ones((4, 3)))
    canonical = shaped("uint4b8", (1, 64), "float16").spec
    with pytest.raises(NotImplementedError, match="layout 'canonical', not 'planes_t'"):
        tpu.product(x, canonical, arrays)
    odd = replace(shaped("uint4b8", (1, 12), "float16").spec, layout=planes.TRANSPOSED)
    with pytest.raises(NotImplementedError, match="a scale for each 12 columns"):
        tpu.product(x, odd, arrays)
    books = shaped("lookup8", (1, 64)).spec
    with pytest.raises(NotImplementedError, match="codebooks of 256 entries"):
        tpu_plan.plan_of(books, 4, "bfloat16", entries=256)
    with dispatch.use(None), pytest.raises(NotImplementedError, match="kernel for a tpu"):
        tpu.product(x, spec, arrays)


@pytest.mark.parametrize("program", list(tpu_programs.kinds()), ids=lambda each: each.name)
def test_lowers_for_a_tpu(program):
    text = crosscompile.lowered("v6e", program.function, *program.arguments)
    assert "tpu_custom_call" in text


@pytest.mark.crosscompile
@pytest.mark.parametrize("target", ["v5e", "v6e", "tpu7x"])
def test_compiles(target):
    crosscompile.check_all(target, tpu_programs)
