"""QArray: what it accepts, how it travels as a pytree, what it says of itself."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.matmul import WeightArrays
from qjax.errors import UnsupportedError
from qjax.qarray import ActSpec, QArray


@pytest.fixture
def q4_1(golden):
    """Four rows of one block, and the values that the `gguf` package decodes."""
    with np.load(golden / "gguf_blocks.npz") as file:
        return QArray(file["q4_1/raw"][:4], "q4_1", (4, 32)), file["q4_1/values"][:4]


def test_dequantize(q4_1):
    weight, values = q4_1
    np.testing.assert_array_equal(weight.dequantize(), values)
    experts = QArray(np.stack([weight.qvalue] * 2), "q4_1", (4, 32))
    np.testing.assert_array_equal(experts.dequantize(), np.stack([values] * 2))


def test_size(q4_1):
    weight, _ = q4_1
    assert weight.nbytes == 80
    assert weight.bits_per_weight == 5
    assert QArray(np.stack([weight.qvalue] * 2), "q4_1", (4, 32)).bits_per_weight == 5


@pytest.mark.parametrize(
    ("dtype", "qtype"), [(np.float32, "f32"), (np.float16, "f16"), (ml_dtypes.bfloat16, "bf16")]
)
def test_dense_weights_are_wrapped_without_a_copy(dtype, qtype):
    dense = np.random.default_rng(0).standard_normal((3, 5)).astype(dtype)
    weight = QArray.from_dense(dense)
    assert (weight.qtype, weight.shape) == (qtype, (3, 5))
    assert np.shares_memory(weight.qvalue, dense)
    np.testing.assert_array_equal(weight.dequantize(), dense.astype(np.float32))


def test_dense_weights_of_another_dtype_are_unsupported():
    with pytest.raises(UnsupportedError, match="float64; these work: float32, float16, bfloat16"):
        QArray.from_dense(np.zeros((2, 2)))


def test_pytree(q4_1):
    weight, values = q4_1
    leaves, tree = jax.tree.flatten(weight)
    assert len(leaves) == 1
    back = jax.tree.unflatten(tree, leaves)
    assert (back.qtype, back.shape, back.layout) == ("q4_1", (4, 32), "canonical")
    jitted = jax.jit(lambda weights: weights["w"].dequantize())
    np.testing.assert_array_equal(jitted({"w": weight}), values)
    abstract = jax.eval_shape(lambda w: w, weight)
    assert abstract.qvalue.shape == (4, 20)
    # Placeholders and per-leaf answers pass through.
    assert jax.tree.map(lambda leaf: leaf.nbytes, weight).qvalue == 80
    assert jax.vmap(lambda w: w.dequantize())(
        QArray(jnp.stack([weight.qvalue] * 2), "q4_1", (4, 32))
    ).shape == (2, 4, 32)


def test_static_fields_distinguish_compiled_functions(q4_1):
    weight, _ = q4_1
    other = QArray(weight.qvalue, "q4_1", (4, 32), act=ActSpec("int8", "token", True))
    assert jax.tree.structure(weight) != jax.tree.structure(other)
    assert jax.tree.structure(weight) == jax.tree.structure(QArray(weight.qvalue, "q4_1", (4, 32)))


def test_spec(q4_1):
    weight, _ = q4_1
    spec = weight.spec
    assert (spec.qtype, spec.shape, spec.layout) == ("q4_1", (4, 32), "canonical")
    codes = QArray(
        np.zeros((4, 16), np.uint8),
        "uint4",
        (4, 32),
        scale=np.ones((4, 1), ml_dtypes.bfloat16),
        zero_point=np.zeros((4, 1), np.uint8),
        group=(1, 32),
    )
    spec = codes.spec
    assert (spec.group, spec.scale, spec.zero_point) == ((1, 32), "bfloat16", "uint8")
    assert (spec.scale_shape, spec.has_global_scale) == ((4, 1), False)


def test_private_layouts_are_not_decoded(q4_1):
    tiled = q4_1[0].with_arrays("tile16", WeightArrays(np.zeros((1, 320), np.uint8)))
    with pytest.raises(ValueError, match="private layout 'tile16'"):
        tiled.dequantize()


RAW = np.zeros((4, 20), np.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"qtype": "q4_9"}, "qtype 'q4_9' is none of"),
        ({"shape": (4, 32, 1)}, r"shape \(4, 32, 1\) is not \(N, K\)"),
        ({"shape": (4, 64)}, r"q4_1 \(4, 64\) takes bytes of shape \(4, 40\), got \(4, 20\)"),
        ({"shape": (4, 33)}, "33 is not a multiple"),
        ({"scale": np.ones((4, 1))}, "carry their own scales"),
        ({"qtype": "int8", "qvalue": np.zeros((4, 32), np.uint8)}, "int8 codes need a group"),
        ({"aux": {"colour": np.ones(1)}}, r"aux keys \['colour'\] are none of"),
    ],
)
def test_contradictions_are_told(arguments, message):
    arguments = {"qvalue": RAW, "qtype": "q4_1", "shape": (4, 32), **arguments}
    with pytest.raises(ValueError, match=message):
        QArray(**arguments)


def test_act_spec_strategy():
    with pytest.raises(ValueError, match="strategy 'row' is none of tensor, token, group"):
        ActSpec("int8", "row", True)
