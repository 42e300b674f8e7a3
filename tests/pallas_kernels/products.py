"""What tests of products share: which implementations run, rounding of activations in float64, and
the error of a result.
"""

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import native, unpack
from pallas_kernels.matmul import planes_gguf

# Of `error`, from what `allowed` names. A norm computed in float32 now and then tips an activation
# over to the next code.
TOLERANCES = {"float32": 1e-5, "bfloat16": 4e-3, "int16": 3e-5, "int8": 2e-3}


# Each type of blocks with the implementations that take it.
EVERY_TYPE = pytest.mark.parametrize(
    ("implementation", "qtype"),
    [
        (name, qtype)
        for qtype in unpack.BLOCKS
        for name in ("native", "triton", "tpu", "xla", "ref")
        if (name != "native" or qtype in native.TYPE_IDS)
        and (name not in ("triton", "tpu") or qtype in planes_gguf.TYPES)
    ],
    indirect=["implementation"],
)
# Each implementation of products.
PRODUCTS = pytest.mark.parametrize(
    "implementation", ["native", "triton", "tpu", "xla", "ref"], indirect=True
)
# Those that are interpreted here, so that each compilation takes long: they are given fewer cases.
INTERPRETED = ("triton", "tpu")
# Those that add up a row in one order, whatever is beside it; the oracle promises none.
COMPILED = pytest.mark.parametrize("implementation", ["native", "xla"], indirect=True)


def _nearest(blocks, top):
    scale = np.abs(blocks).max(-1, keepdims=True) / top
    return np.rint(blocks / np.where(scale > 0, scale, 1)) * scale, scale


def rounded(x, activation_dtype):
    """float64 [T, K] as `pallas_kernels.matmul.matmul` says of `activation_dtype`."""
    if activation_dtype == "float32":
        return x
    if activation_dtype == "bfloat16":
        return x.astype(ml_dtypes.bfloat16).astype(np.float64)
    k = x.shape[1]
    blocks = np.pad(x, ((0, 0), (0, -k % 32))).reshape(len(x), -1, 32)
    result, scale = _nearest(blocks, {"int16": 127 * 256 + 127, "int8": 127}[activation_dtype])
    if activation_dtype == "int8":
        again = np.argsort(-scale[..., 0], axis=1, kind="stable")[:, :2]
        for row, chosen in enumerate(again):
            result[row, chosen] += _nearest((blocks - result)[row, chosen], 127)[0]
    return result.reshape(len(x), -1)[:, :k]


def allowed(activation_dtype):
    """What an implementation may round inputs, and weights, to: as asked, or not at all."""
    both = [("bfloat16", "bfloat16")] if activation_dtype == "bfloat16" else []
    return [("float32", "float32"), (activation_dtype, "float32"), *both]


def least_error(got, x, decoded, activation_dtype, add=0):
    """`error` of x @ decoded.T + add, by whichever rounding is nearest; x and decoded float64."""
    return min(
        error(got, rounded(x, of_x) @ rounded(decoded, of_w).T + add)
        for of_x, of_w in allowed(activation_dtype)
    )


def error(got, wanted):
    """The largest over the rows of |difference| / |row|, Euclidean norms."""
    difference = np.linalg.norm(np.asarray(got, np.float64) - wanted, axis=-1)
    return (difference / np.linalg.norm(wanted, axis=-1)).max()
