"""Products of quantized inputs with weights in planes: exact products of rounded inputs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, platform
from pallas_kernels.inputs import ActSpec, Inputs
from pallas_kernels.matmul import api, matmul, planes
from pallas_kernels.matmul_grouped import matmul_grouped, takes_inputs
from pallas_kernels.quantize import quantize
from tests.pallas_kernels.coded import Coded, draw
from tests.pallas_kernels.products import TOLERANCES, error

SHAPE = (40, 320)
ACTS = {
    "int8": ActSpec("int8", "token", True),
    "int8 asymmetric": ActSpec("int8", "token", True, symmetric=False),
    "int8 tensor": ActSpec("int8", "tensor", True),
    "int8 static": ActSpec("int8", "tensor", False),
    "int4": ActSpec("int4", "token", True),
    "int8 1x64": ActSpec("int8", "group", True, group_size=64),
    "fp8": ActSpec("fp8_e4m3", "token", True),
    "fp8 static": ActSpec("fp8_e4m3", "tensor", False),
    "fp8 1x64": ActSpec("fp8_e4m3", "group", True, group_size=64),
    "e5m2": ActSpec("fp8_e5m2", "token", True),
    "mxfp4": ActSpec("fp4_e2m1", "group", True, group_size=32, scale="e8m0"),
}
# (inputs, weight, whether XLA multiplies the codes as they are)
CASES = [
    ("int8", Coded("int8", (1, 320)), True),
    ("int8 asymmetric", Coded("int8", (1, 320), "bfloat16"), True),
    ("int8 tensor", Coded("uint8b128", (16, 320), "float16"), True),
    ("int8 static", Coded("int8", (40, 320)), True),
    ("int4", Coded("int8", (1, 320), shape=(40, 272)), True),  # K is filled up
    ("fp8", Coded("fp8_e4m3", (1, 320)), True),
    ("fp8 static", Coded("fp8_e4m3", (40, 320), has_global_scale=True), True),
    ("e5m2", Coded("fp8_e4m3", (1, 320)), True),
    ("fp8", Coded("fp8_e5m2", (1, 320)), True),
    ("int8", Coded("uint4b8", (1, 64), "float16"), False),
    ("int8", Coded("uint8", (1, 320), "float16", "uint8"), False),
    ("int8 1x64", Coded("int8", (1, 320)), False),
    ("fp8 1x64", Coded("fp8_e4m3", (64, 64)), False),
    ("mxfp4", Coded("fp4_e2m1", (1, 32), "float8_e8m0fnu"), False),
    # The last group of columns is cut short, which no kernel is told.
    ("int8 1x64", Coded("int8", (1, 288), shape=(40, 288)), False),
]


def named(case):
    act, weight, _ = case
    return f"{act}-{weight.qtype}-{weight.group[0]}x{weight.group[1]}"


def inputs_of(act, k, rng):
    """With scales of columns and another order of them, where scales are not those of groups."""
    perm = rng.permutation(k).astype(np.int32)[None] if act.strategy != "group" else None
    return Inputs(
        pre_scale=rng.uniform(0.5, 2, (1, k)).astype(np.float32),
        scale=None if act.dynamic else np.full((1, 1), 0.02, np.float32),
        perm=perm,
    )


def values(x, act, inputs):
    """What inputs become, float64, from codes and scales that have tests of their own."""
    codes, scale, zero = jax.tree.map(
        lambda a: np.asarray(a.astype(jnp.float32), np.float64),
        quantize(jnp.asarray(x * inputs.pre_scale), act, inputs),
    )
    size = act.group_size or x.shape[1]

    def spread(array):
        return np.repeat(array, size, axis=1)[:, : x.shape[1]]

    rounded = (codes - (0 if zero is None else spread(zero))) * spread(scale)
    return rounded if inputs.perm is None else rounded[:, inputs.perm[0]]


@pytest.mark.parametrize("layout", planes.LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=named)
def test_against_float64(case, layout):
    name, kind, by_codes = case
    act, rng = ACTS[name], np.random.default_rng(0)
    arrays, decoded = draw(kind)
    spec, laid_out = planes.prepare(kind.spec, arrays, layout)
    x = rng.normal(size=(5, kind.shape[1])).astype(np.float32)
    x[2] *= 5
    inputs = inputs_of(act, kind.shape[1], rng)
    assert api.takes_inputs([spec], act)

    def product(x, arrays, inputs):
        return matmul(x, [(spec, arrays)], act=act, inputs=[inputs])[0]

    y = jax.jit(product)(x, laid_out, inputs)
    assert error(y, values(x, act, inputs) @ decoded.T) < TOLERANCES["float32"]
    assert (operands(product, x, laid_out, inputs) != {"float32"}) == by_codes


@pytest.mark.parametrize(
    ("implementation", "layout", "case"),
    [
        (implementation, layout, CASES[i])
        for implementation, layout, chosen in (
            ("triton", planes.PLANES, (0, 1, 5, 9, 10, 11, 12, 13)),
            ("tpu", planes.TRANSPOSED, (0, 1, 5, 9, 11)),
        )
        for i in chosen
    ],
    ids=lambda each: named(each) if isinstance(each, tuple) else each,
)
def test_kernels_against_float64(implementation, layout, case):
    """In a kernel that is interpreted here: sums of integers, or float32 ones of exact products."""
    name, kind, _ = case
    act, rng = ACTS[name], np.random.default_rng(0)
    arrays, decoded = draw(kind)
    spec, laid_out = planes.prepare(kind.spec, arrays, layout)
    x = rng.normal(size=(5, kind.shape[1])).astype(np.float32)
    inputs = inputs_of(act, kind.shape[1], rng)
    op = f"matmul {act.dtype} {kind.qtype}"

    def product(x, arrays, inputs):
        weight = (spec, arrays)
        return matmul(x, [weight], act=act, inputs=[inputs], implementation=implementation)[0]

    y = jax.jit(product)(x, laid_out, inputs)
    assert dispatch.chosen()[op][0] == implementation
    assert error(y, values(x, act, inputs) @ decoded.T) < TOLERANCES["float32"]


def operands(function, *args):
    """Dtypes of what XLA multiplies on a GPU."""
    with platform.assume("gpu"), dispatch.use("xla"):
        equations = jax.make_jaxpr(lambda *args: function(*args))(*args).eqns  # traced anew
    dots = [each for each in equations if each.primitive.name == "dot_general"]
    return {var.aval.dtype.name for dot in dots for var in dot.invars}


@pytest.mark.parametrize("implementation", ["triton", "tpu", "xla"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fp8 1x64", Coded("fp8_e4m3", (64, 64))),
        ("int8 asymmetric", Coded("uint4b8", (1, 64), "float16")),
    ],
)
def test_experts_against_float64(name, kind, implementation):
    """Rows of three experts, of which one has none; XLA multiplies rounded inputs."""
    act, sizes = ACTS[name], np.array([3, 0, 4], np.int32)
    drawn = [draw(kind, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *a: np.stack(a), *(arrays for arrays, _ in drawn))
    layout = planes.TRANSPOSED if implementation == "tpu" else planes.PLANES
    spec, laid_out = planes.prepare(kind.spec, stacked, layout)
    assert takes_inputs(spec, act)
    rng = np.random.default_rng(0)
    x, bias = (rng.normal(size=s).astype(np.float32) for s in ((7, 320), (3, 40)))
    with dispatch.use(implementation):
        y = jax.jit(
            lambda x, arrays: matmul_grouped(
                x, jnp.asarray(sizes), (spec, arrays), bias=jnp.asarray(bias), act=act
            )
        )(x, laid_out)
    wide = values(x, act, Inputs(pre_scale=np.ones((1, 320), np.float32)))
    owner = np.repeat(np.arange(3), sizes)
    wanted = [row @ drawn[e][1].T + bias[e] for row, e in zip(wide, owner, strict=True)]
    assert error(y, np.stack(wanted)) < TOLERANCES["float32"]
    if implementation != "xla":
        op = f"matmul_grouped {act.dtype} {kind.qtype}"
        assert dispatch.chosen()[op][0] == implementation


def test_matrix_units_get_codes_of_8_bits():
    """Integers are summed as int32; 8-bit floats meet as such where inputs may be rounded."""
    for kind, name, dtype, taken in (
        (Coded("int8", (1, 320)), "int8", "float32", "int8"),
        (Coded("fp8_e4m3", (1, 320)), "fp8", "bfloat16", "float8_e4m3fn"),
        (Coded("fp8_e4m3", (1, 320)), "fp8", "float32", "bfloat16"),
        (Coded("int8", (1, 320)), "int8 asymmetric", "float32", "bfloat16"),
    ):
        arrays, decoded = draw(kind)
        spec, laid_out = planes.prepare(kind.spec, arrays, planes.PLANES)

        def product(x, spec=spec, laid_out=laid_out, name=name, dtype=dtype):
            return matmul(x, [(spec, laid_out)], act=ACTS[name], activation_dtype=dtype)[0]

        x = np.random.default_rng(1).normal(size=(3, 320)).astype(np.float32)
        assert operands(product, x) == {taken}
        inputs = Inputs(pre_scale=np.ones((1, 320), np.float32))
        wanted = values(x, ACTS[name], inputs) @ decoded.T
        assert error(jax.jit(product)(x), wanted) < TOLERANCES["float32"]


def test_weights_that_are_rounded_once_scaled_meet_plain_inputs():
    kind = Coded("int8", (1, 320))
    arrays, decoded = draw(kind)
    spec, laid_out = planes.prepare(replace(kind.spec, rounded="bfloat16"), arrays, planes.PLANES)
    x = np.random.default_rng(1).normal(size=(3, 320)).astype(np.float32)
    (y,) = matmul(jnp.asarray(x), [(spec, jax.tree.map(jnp.asarray, laid_out))], act=ACTS["int8"])
    inputs = Inputs(pre_scale=np.ones((1, 320), np.float32))
    narrow = decoded.astype(jnp.bfloat16).astype(np.float64)
    assert error(y, values(x, ACTS["int8"], inputs) @ narrow.T) < TOLERANCES["float32"]
