"""Codes and scales of activations, by every implementation, against numpy and ml_dtypes."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.inputs import ActSpec, Inputs
from pallas_kernels.quantize import quantize, tpu, triton
from tests.pallas_kernels import activation_programs, crosscompile

# name -> (type of the tool that rounds, its largest number, exponent of that, bits of mantissa)
FLOATS = {
    "fp8_e4m3": (ml_dtypes.float8_e4m3fn, 448.0, 8, 3),
    "fp8_e5m2": (ml_dtypes.float8_e5m2, 57344.0, 15, 2),
    "fp6_e2m3": (ml_dtypes.float6_e2m3fn, 7.5, 2, 3),
    "fp6_e3m2": (ml_dtypes.float6_e3m2fn, 28.0, 4, 2),
    "fp4_e2m1": (ml_dtypes.float4_e2m1fn, 6.0, 2, 1),
}
SCALE, WHOLE = 0.017, 0.003

TOKEN = {
    "int8": ActSpec("int8", "token", True),
    "int8, another divisor": ActSpec("int8", "token", True, divisor=127.5),
    "int8, bfloat16 scale": ActSpec("int8", "token", True, scale="bfloat16"),
    "int8 asymmetric": ActSpec("int8", "token", True, symmetric=False),
    "int4": ActSpec("int4", "token", True),
    "fp8": ActSpec("fp8_e4m3", "token", True),
    "fp8, bounded": ActSpec("fp8_e4m3", "token", True, upper_bound=1.5),
    "e5m2": ActSpec("fp8_e5m2", "token", True),
}
GROUP = {
    "fp8 1x128": ActSpec("fp8_e4m3", "group", True, group_size=128),
    "int8 1x128": ActSpec("int8", "group", True, group_size=128),
    "int8 1x64 asymmetric": ActSpec("int8", "group", True, symmetric=False, group_size=64),
    "fp8 1x32, ceil": ActSpec("fp8_e4m3", "group", True, group_size=32, scale="e8m0_ceil"),
    "mxfp8": ActSpec("fp8_e4m3", "group", True, group_size=32, scale="e8m0"),
    "mxfp8 even4": ActSpec("fp8_e4m3", "group", True, group_size=32, scale="e8m0_even4"),
    "mxfp6": ActSpec("fp6_e2m3", "group", True, group_size=32, scale="e8m0"),
    "mxfp6 e3m2": ActSpec("fp6_e3m2", "group", True, group_size=32, scale="e8m0"),
    "mxfp4": ActSpec("fp4_e2m1", "group", True, group_size=32, scale="e8m0"),
    "mxfp4 even": ActSpec("fp4_e2m1", "group", True, group_size=32, scale="e8m0_even"),
    "nvfp4": ActSpec("fp4_e2m1", "group", True, group_size=16, scale="fp8_e4m3"),
}
TENSOR = {
    "int8 static": ActSpec("int8", "tensor", False),
    "int8 static asymmetric": ActSpec("int8", "tensor", False, symmetric=False),
    "fp8 static": ActSpec("fp8_e4m3", "tensor", False),
    "int8 tensor": ActSpec("int8", "tensor", True),
    "fp8 tensor": ActSpec("fp8_e4m3", "tensor", True),
}
CASES = TOKEN | GROUP | TENSOR


@pytest.fixture(params=["triton", "tpu", "xla", "ref"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    with dispatch.use(request.param):
        yield request.param


def numbers(k, seed=0):
    """Rows of every kind: normal, halves and quarters (ties), tiny, huge, one outlier, zeros."""
    x = np.random.default_rng(seed).normal(size=(8, k)).astype(np.float32)
    x[1] = np.arange(k) / 4 - 16
    x[1, 0] = 127
    x[2] *= 1e-6
    x[3] *= 1e4
    x[4, 3] = 1000
    x[5] = np.abs(x[5])
    x[6] = 0
    return x


def inputs_of(act):
    scale = None if act.dynamic else np.full((1, 1), SCALE, np.float32)
    zero = np.full((1, 1), 3, np.int8) if scale is not None and not act.symmetric else None
    whole = np.full((1, 1), WHOLE, np.float32) if act.scale == "fp8_e4m3" else None
    return Inputs(scale=scale, zero_point=zero, global_scale=whole)


def limits(act):
    if act.dtype in FLOATS:
        return -FLOATS[act.dtype][1], FLOATS[act.dtype][1]
    half = 2 ** (int(act.dtype[3:]) - 1)
    return -half, half - 1


def scale_of(groups, act):
    """float32 scale and zero point of groups [T, G, size], by the words of `ActSpec`."""
    bottom, top = limits(act)
    axis = None if act.strategy == "tensor" else -1
    single = np.float32
    if not act.dynamic:
        return np.full((1, 1, 1), SCALE, single), None if act.symmetric else single(3)
    if not act.symmetric:
        low = np.minimum(groups.min(axis, keepdims=True), 0)
        high = np.maximum(groups.max(axis, keepdims=True), 0)
        scale = (high - low) / single(top - bottom)
        scale[scale == 0] = np.finfo(single).eps
        return scale, np.clip(np.rint(bottom - low / scale), bottom, top)
    largest = np.abs(groups).max(axis, keepdims=True)
    if act.upper_bound:
        largest = np.minimum(largest, single(act.upper_bound))
    if act.scale in ("e8m0", "e8m0_even", "e8m0_even4"):
        _, _, most, mantissa = FLOATS[act.dtype]
        part, exponent = np.frexp(largest)  # part in [0.5, 1)
        if act.scale != "e8m0":
            kept = 2.0 ** (1 + (1 if act.scale == "e8m0_even4" else mantissa))
            exponent += np.floor(part * kept + 0.5) >= kept
        exponent = np.where(largest > 0, exponent - 1 - most, -126)
        return np.exp2(np.maximum(exponent, -126)).astype(single), None
    scale = largest / single(act.divisor or top)
    if act.scale == "e8m0_ceil":
        part, exponent = np.frexp(np.maximum(scale, single(1e-38)))
        return np.exp2(np.where(part == 0.5, exponent - 1, exponent)).astype(single), None
    if act.scale == "fp8_e4m3":
        local = np.clip(scale / single(WHOLE), 2.0**-9, 448)
        return local.astype(ml_dtypes.float8_e4m3fn).astype(single) * single(WHOLE), None
    return scale.astype(jnp.dtype(act.scale)).astype(single), None


def expected(x, act):
    """(codes, scale, zero point) in numpy."""
    rows, k = x.shape
    size = act.group_size or k
    groups = np.pad(x, ((0, 0), (0, -k % size))).reshape(rows, -1, size)
    scale, zero = scale_of(groups, act)
    q = groups / np.where(scale == 0, 1, scale).astype(np.float32)
    bottom, top = limits(act)
    if act.dtype in FLOATS:
        q = np.clip(q, bottom, top).astype(FLOATS[act.dtype][0]).astype(np.float32)
    else:
        q = np.clip(np.rint(q if zero is None else q + zero), bottom, top)
    zero = None if zero is None else np.broadcast_to(zero, scale.shape)[..., 0]
    return q.reshape(rows, -1)[:, :k], scale[..., 0], zero


def stored_as(act):
    if act.dtype not in FLOATS:
        return jnp.int8
    return jnp.float8_e5m2 if act.dtype == "fp8_e5m2" else jnp.float8_e4m3fn


def check(got, wanted, act, name):
    assert got.codes.dtype == stored_as(act)
    np.testing.assert_array_equal(got.scale, wanted[1], name)
    np.testing.assert_array_equal(got.codes.astype(jnp.float32), wanted[0], name)
    if act.symmetric:
        assert got.zero_point is None
    else:
        np.testing.assert_array_equal(got.zero_point, wanted[2], name)


@pytest.mark.parametrize("cases", [TOKEN, GROUP, TENSOR], ids=["token", "group", "tensor"])
def test_codes_and_scales(cases, implementation):
    if cases is TENSOR and implementation in ("triton", "tpu"):
        with pytest.raises(NotImplementedError, match="a scale that all rows share"):
            quantize(jnp.zeros((2, 64)), CASES["fp8 tensor"])
        return
    x = numbers(128)
    run = jax.jit(lambda x, inputs: {n: quantize(x, CASES[n], i) for n, i in inputs.items()})
    found = run(x, {name: inputs_of(act) for name, act in cases.items()})
    for name, act in cases.items():
        check(found[name], expected(x, act), act, name)


def test_bfloat16_inputs_and_a_group_cut_short(implementation):
    x = jnp.asarray(numbers(200), jnp.bfloat16)
    wide = np.asarray(x.astype(jnp.float32))
    for act in CASES["int8"], CASES["fp8 1x128"]:
        if implementation == "tpu" and act.group_size:
            with pytest.raises(NotImplementedError, match="groups of 128 of 200 columns"):
                quantize(x, act)
            continue
        got = jax.jit(lambda x, act=act: quantize(x, act))(x)
        check(got, expected(wide, act), act, act)


@pytest.mark.parametrize("implementation", ["triton", "tpu"], indirect=True)
def test_several_programs(implementation, monkeypatch):
    """Tiles that end beyond the last row or column, and groups that lie in several tiles."""
    monkeypatch.setattr(triton, "ELEMENTS", 512)
    monkeypatch.setattr(tpu, "MOST_BYTES", 0)
    x = np.concatenate([numbers(2304, seed) for seed in range(5)])
    acts = {name: CASES[name] for name in ("int8 asymmetric", "nvfp4")}
    acts["int8 1x256"] = ActSpec("int8", "group", True, group_size=256)
    for name, act in acts.items():
        got = jax.jit(lambda x, act=act: quantize(x, act, inputs_of(act)))(x)
        check(got, expected(x, act), act, name)


@pytest.mark.parametrize(
    ("target", "platforms", "call"),
    [("h100", "cuda", "__gpu$xla.gpu.triton"), ("v6e", "tpu", "tpu_custom_call")],
)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # from jax 0.11 on
def test_kernels_lower(target, platforms, call):
    """For the device itself, where they are preferred to XLA's loops."""
    for k, cases in (256, TOKEN | GROUP), (28672, {"nvfp4": CASES["nvfp4"]}):
        x = jax.ShapeDtypeStruct((100, k), jnp.bfloat16)
        with crosscompile.assumed(target):
            for name, act in cases.items():
                traced = jax.jit(lambda x, act=act: quantize(x, act, inputs_of(act))).trace(x)
                text = traced.lower(lowering_platforms=(platforms,)).as_text()
                assert call in text, name


@pytest.mark.crosscompile
@pytest.mark.parametrize("target", ["h100", "v5e", "v6e", "tpu7x"])
def test_compiles(target):
    crosscompile.check_all(target, activation_programs)


@pytest.mark.parametrize("implementation", ["xla", "ref"], indirect=True)
def test_rows_of_padding_move_no_scale(implementation):
    x = numbers(64)
    padded = np.concatenate([x, np.full((2, 64), 1e6, np.float32)])
    act = CASES["int8 tensor"]
    got = quantize(jnp.asarray(padded), act, num_rows=jnp.array([8], jnp.int32))
    codes, scale, _ = expected(x, act)
    np.testing.assert_array_equal(got.scale, scale)
    np.testing.assert_array_equal(got.codes[:8], codes)


def test_what_has_no_codes_is_refused():
    x = jnp.zeros((2, 64))
    with pytest.raises(ValueError, match="outliers stay as they are have no codes"):
        quantize(x, ActSpec("int8", "token", True, outliers=6.0))
    with pytest.raises(ValueError, match=r"scale is None, expected \(1, 1\)"):
        quantize(x, CASES["int8 static"])
    with pytest.raises(ValueError, match="x is int32"):
        quantize(jnp.zeros((2, 64), jnp.int32), CASES["int8"])
