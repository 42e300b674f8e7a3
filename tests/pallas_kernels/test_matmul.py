"""One set of cases for every implementation of the quantized matrix product.

The oracle is numpy in float64 on weights that the `gguf` package decoded.
"""

from dataclasses import dataclass, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, unpack
from pallas_kernels.matmul import WeightSpec, api, matmul, prepare, unprepare, xla
from tests.pallas_kernels.cached import QUICKLY
from tests.pallas_kernels.products import (
    COMPILED,
    EVERY_TYPE,
    INTERPRETED,
    PRODUCTS,
    TOLERANCES,
    allowed,
    error,
    rounded,
)

EPS = 1e-5


@cache
def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@dataclass(frozen=True)
class Case:
    """A call: weights as (qtype, N), and which optional arguments it has."""

    weights: tuple[tuple[str, int], ...]
    rows: int = 3
    k: int = 512
    norm: bool = False
    biases: tuple[bool, ...] | None = None
    activation: str | None = None
    residual: bool = False
    post_norm: bool = False
    activation_dtype: str = "float32"

    @property
    def arguments(self):
        """x and the float arguments, as numpy arrays."""
        n = self.weights[0][1]
        biases = self.biases and tuple(
            numbers(7 + i, n) if has else None
            for i, ((_, n), has) in enumerate(zip(self.weights, self.biases, strict=True))
        )
        return numbers(1, self.rows, self.k), {
            "norm": numbers(2, self.k) if self.norm else None,
            "biases": biases,
            "residual": numbers(3, self.rows, n) if self.residual else None,
            "post_norm": numbers(4, n) if self.post_norm else None,
        }

    @property
    def static(self):
        return {
            "activation": self.activation,
            "activation_dtype": self.activation_dtype,
            "norm_eps": EPS,
        }


def oracle(case, decoded):
    x, arrays = case.arguments

    def rms(v, weight):
        return v / np.sqrt((v**2).mean(-1, keepdims=True) + EPS) * weight

    x = x.astype(np.float64)
    if case.norm:
        x = rms(x, arrays["norm"])
    x = rounded(x, case.activation_dtype)
    ys = [x @ w.T for w in decoded]
    if arrays["biases"]:
        ys = [y if b is None else y + b for y, b in zip(ys, arrays["biases"], strict=True)]
    if case.activation == "silu":
        ys = [ys[0] / (1 + np.exp(-ys[0])) * ys[1]]
    elif case.activation == "gelu_tanh":
        inner = np.sqrt(2 / np.pi) * (ys[0] + 0.044715 * ys[0] ** 3)
        ys = [ys[0] / 2 * (1 + np.tanh(inner)) * ys[1]]
    if case.post_norm:
        ys = [rms(ys[0], arrays["post_norm"])]
    if case.residual:
        ys = [arrays["residual"] + ys[0]]
    return ys


def prepared(qtype, raw, k):
    spec, arrays = prepare(WeightSpec(qtype, (len(raw), k)), raw)
    return spec, jax.tree.map(jnp.asarray, arrays)


def run(cases, golden_weight, num_rows=None):
    """(outputs, the lists of outputs that are right) of each case, all in one compiled function."""
    statics, inputs, wanted = [], [], []
    for case in cases:
        weights = [golden_weight(qtype, n, case.k) for qtype, n in case.weights]
        ready = [
            prepared(qtype, raw, case.k)
            for (qtype, _), (raw, _) in zip(case.weights, weights, strict=True)
        ]
        statics.append(([spec for spec, _ in ready], case.static))
        inputs.append((*case.arguments, [arrays for _, arrays in ready]))
        wanted.append(
            [
                oracle(
                    replace(case, activation_dtype=of_x),
                    [rounded(decoded.astype(np.float64), of_w) for _, decoded in weights],
                )
                for of_x, of_w in allowed(case.activation_dtype)
            ]
        )

    def call(inputs, num_rows):
        return [
            matmul(x, list(zip(specs, weights, strict=True)), num_rows=num_rows, **arrays, **static)
            for (x, arrays, weights), (specs, static) in zip(inputs, statics, strict=True)
        ]

    options = QUICKLY if dispatch.named() in INTERPRETED else None
    return zip(jax.jit(call, compiler_options=options)(inputs, num_rows), wanted, strict=True)


def check(cases, golden_weight):
    for case, (outputs, wanted) in zip(cases, run(cases, golden_weight), strict=True):
        assert all(y.dtype == jnp.float32 for y in outputs)
        assert [y.shape for y in outputs] == [y.shape for y in wanted[0]]
        worst = min(
            max(error(y, want) for y, want in zip(outputs, right, strict=True)) for right in wanted
        )
        assert worst <= TOLERANCES[case.activation_dtype], case


@EVERY_TYPE
def test_every_type(implementation, golden_weight, qtype):
    """Few and many rows, 40 outputs (no multiple of 16), one block wide, rounded activations."""
    case = Case(((qtype, 40),))
    one_block = max(32, unpack.BLOCKS[qtype][0])
    cases = [replace(case, rows=rows) for rows in (1, 3, 8, 17, 33)]
    cases += [replace(case, k=one_block)]
    cases += [replace(case, activation_dtype=dtype) for dtype in ("int16", "int8")]
    if implementation in ("xla", "ref"):  # which decode weights whatever x is; of XLA 1 row differs
        cases = [replace(case, rows=1), replace(case, k=one_block)]
    elif implementation in INTERPRETED:
        cases = [case, replace(case, k=one_block, activation_dtype="bfloat16")]
    check(cases, golden_weight)


MIXED = (("q4_k", 40), ("q6_k", 24), ("q8_0", 7))
GATE = (("q4_1", 40), ("q4_1", 40))
MIXED_GATE = (("q4_k", 48), ("q6_k", 48))


FUSIONS = [
    Case((("q4_1", 40),), norm=True),
    Case(MIXED, norm=True, biases=(True, False, True)),
    Case(GATE, rows=1, norm=True, activation="silu"),
    Case(MIXED_GATE, rows=17, activation="gelu_tanh", biases=(True, False)),
    Case((("q6_k", 40),), norm=True, residual=True, biases=(True,)),
    Case((("q5_0", 40),), k=64, rows=8, residual=True, post_norm=True),
    Case((("q8_0", 40),), k=64, rows=1, post_norm=True),
    Case(MIXED_GATE, norm=True, activation="silu", residual=True, post_norm=True),
]
# Kernels that are a product alone share what is around it with the XLA form: two cases in which
# each argument gets there once.
PASSED_ON = [FUSIONS[1], FUSIONS[-1]]


@pytest.mark.parametrize(
    ("implementation", "case"),
    [
        (name, case)
        for name in ("native", "triton", "tpu", "xla", "ref")
        for case in (PASSED_ON if name in INTERPRETED else FUSIONS)
    ],
    indirect=["implementation"],
    ids=lambda each: each if isinstance(each, str) else "+".join(kind for kind, _ in each.weights),
)
def test_fusions(implementation, golden_weight, case):
    dtypes = api.ACTIVATION_DTYPES
    if implementation in INTERPRETED:
        dtypes = ("bfloat16",)
    elif implementation == "ref":  # how it rounds, test_several_weights_in_one_call sees
        dtypes = ("float32",)
    check([replace(case, activation_dtype=dtype) for dtype in dtypes], golden_weight)


@pytest.mark.parametrize(
    "case",
    [
        Case((("q4_k", 40), ("iq3_s", 24), ("q8_0", 7)), norm=True, biases=(True, True, False)),
        Case((("iq2_xs", 40), ("q2_k", 40)), norm=True, activation="silu", residual=True),
        Case((("q2_k", 40), ("tq1_0", 40)), activation="gelu_tanh", post_norm=True),
    ],
    ids=lambda case: "+".join(qtype for qtype, _ in case.weights),
)
def test_weights_of_several_implementations(golden_weight, case):
    """One call may take weights that no single implementation takes."""
    check([case, replace(case, rows=1)], golden_weight)


@pytest.mark.parametrize("activation_dtype", api.ACTIVATION_DTYPES)
def test_activations_of_zeros(implementation, golden_weight, activation_dtype):
    """A block of zeros has no scale to divide by."""
    raw, _ = golden_weight("q4_1", 40, 64)
    x = jnp.zeros((2, 64), jnp.float32)
    (y,) = matmul(x, [prepared("q4_1", raw, 64)], activation_dtype=activation_dtype)
    np.testing.assert_array_equal(y, np.zeros((2, 40)))


@PRODUCTS
@pytest.mark.parametrize("valid", [1, 5, 8])
def test_padding_rows(implementation, golden_weight, valid):
    case = Case(GATE, rows=8, norm=True, activation="silu")
    num_rows = np.array([valid], np.int32)
    (((y,), ((wanted,), *_)),) = run([case], golden_weight, num_rows)
    assert y.shape == wanted.shape
    assert error(y[:valid], wanted[:valid]) <= TOLERANCES["float32"]


@PRODUCTS
def test_vmap(implementation, golden_weight):
    raw, decoded = golden_weight("q4_k", 40, 256)
    weight = prepared("q4_k", raw, 256)
    x = numbers(9, 2, 3, 256)
    y = jax.jit(jax.vmap(lambda x: matmul(x, [weight])[0]))(x)
    assert error(y, x.astype(np.float64) @ decoded.T) <= TOLERANCES["float32"]


@EVERY_TYPE
def test_prepare_is_undone_exactly(implementation, golden_weight, qtype):
    raw, _ = golden_weight(qtype, 40, 512)
    spec = WeightSpec(qtype, (40, 512))
    back, arrays = unprepare(*prepare(spec, raw))
    assert back == spec
    np.testing.assert_array_equal(arrays.qvalue, raw)


@COMPILED
def test_rows_do_not_depend_on_each_other(implementation, golden_weight):
    """What a row gives is the same, bit for bit, alone and beside others."""
    raw, _ = golden_weight("q4_1", 40, 512)
    weight = prepared("q4_1", raw, 512)
    x = jnp.asarray(numbers(5, 8, 512))
    (alone,), (beside,) = matmul(x[:1], [weight]), matmul(x, [weight])
    np.testing.assert_array_equal(alone, beside[:1])


@pytest.mark.parametrize("n", [40, 33, 17, 16])
def test_large_weights_in_blocks_of_rows(golden_weight, monkeypatch, n):
    """Blocks of 16 rows, the last of which is whole, partly repeated, or alone."""
    monkeypatch.setattr(xla, "BLOCK_ELEMENTS", 16 * 64)
    with dispatch.use("xla"):
        check([Case((("q5_1", n),), k=64)], golden_weight)


@pytest.mark.parametrize("name", ["xla", "ref"])
def test_private_layout_is_refused(name):
    spec = WeightSpec("q4_1", (16, 32), layout="tile16")
    weight = (spec, jnp.zeros((1, 320), jnp.uint8))
    with pytest.raises(NotImplementedError, match="private layout 'tile16'"):
        matmul(jnp.zeros((1, 32)), [weight], implementation=name)


X = np.zeros((2, 32), np.float32)
W = (WeightSpec("q4_1", (16, 32)), np.zeros((16, 20), np.uint8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": []}, "0 weights with 0 biases"),
        ({"biases": [None, None]}, "1 weights with 2 biases"),
        ({"x": X[0]}, r"x has shape \(32,\)"),
        ({"x": X.astype(np.float16)}, "x is float16"),
        ({"x": np.zeros((2, 64), np.float32)}, "K differs"),
        ({"weights": [(W[0], W[1].astype(np.int8))]}, "raw blocks are uint8, got int8"),
        ({"weights": [(W[0], W[1][:, :18])]}, r"bytes have shape \(16, 18\), expected \(16, 20\)"),
        ({"biases": [X[0]]}, r"bias is float32 \(32,\), expected float32 \(16,\)"),
        ({"norm": X}, r"norm is float32 \(2, 32\), expected float32 \(32,\)"),
        ({"activation": "relu"}, "'relu' is none of"),
        ({"activation": "silu"}, "two weights, gate and up, of equal N"),
        ({"weights": [W, W], "residual": np.zeros((2, 16), np.float32)}, "need one output"),
        ({"residual": X}, r"residual is float32 \(2, 32\)"),
        ({"activation_dtype": "fp8"}, "activation_dtype 'fp8' is none of"),
        ({"num_rows": np.array(2)}, r"num_rows is .* expected int32 \(1,\)"),
    ],
)
def test_contradictions_are_told(arguments, message):
    arguments = {"x": X, "weights": [W], **arguments}
    with pytest.raises(ValueError, match=message):
        matmul(**arguments)
