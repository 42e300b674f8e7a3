"""Layers as a checkpoint stores them, from arrays that a test has packed."""

from dataclasses import dataclass
from unittest import mock

import jax
import numpy as np

from pallas_kernels.matmul.spec import decode
from qjax.errors import ShardingError
from qjax.formats import weights
from qjax.formats.base import Checkpoint
from qjax.parts import lazily, part, read
from qjax.registry import quantization_config

MODULE = "model.layers.0.mlp.up_proj"
_DTYPES = {
    "bfloat16": "bf16",
    "float8_e4m3fn": "f8_e4m3",
    "float8_e5m2": "f8_e5m2",
    "float8_e8m0fnu": "f8_e8m0",
}


@dataclass
class Record:
    name: str
    qtype: str
    shape: tuple[int, ...]
    file: str = "model.safetensors"
    offset: int = 0


def record(name, array):
    dtype = array.dtype
    return Record(name, _DTYPES.get(dtype.name, f"{dtype.kind}{8 * dtype.itemsize}"), array.shape)


def quantization(config, tensors=None, module=MODULE, dtype="", method=None):
    """The format that a quantization config asks for, or that is asked for beside none."""
    named = {f"{module}.{suffix}": array for suffix, array in (tensors or {}).items()}
    records = {name: record(name, array) for name, array in named.items()}
    checkpoint = Checkpoint("config.json", records, {}, named.__getitem__, "llama", dtype)
    return quantization_config(method or config["quant_method"]).from_config(config, checkpoint)


def planned(config, tensors, shape, module=MODULE, dtype=""):
    """How one layer with these tensors (by suffix) is read."""
    stored = {suffix: record(f"{module}.{suffix}", array) for suffix, array in tensors.items()}
    return quantization(config, tensors, module, dtype).layer(module, stored, shape)


def decoded(config, tensors, shape, module=MODULE, dtype=""):
    """The QArray that one layer becomes; every tensor is read or known."""
    layer = planned(config, tensors, shape, module, dtype)
    assert layer is not None
    assert {*layer.reads} <= {*tensors} <= {*layer.reads, *layer.ignores}
    return whole(layer, {suffix: tensors[suffix] for suffix in layer.reads})


def whole(layer, arrays):
    """The decoded weight; its parts, of which no more is read, are what it has there."""
    lazy = lazily(layer.decode(arrays))
    found = read(lazy)
    for parts, index in (((2, 1), (1, 0)), ((1, 2), (0, 1)), ((4, 1), (1, 0)), ((1, 4), (0, 2))):
        try:
            expected = part(found, parts, index)
        except ShardingError:
            continue
        with mock.patch.object(weights, "AT_ONCE", 200):  # some rows after others
            assert same(read(part(lazy, parts, index)), expected), (parts, index)
    return found


def same(one, other):
    """Whether two weights are the same to the bit, and in all that is static."""
    leaves = jax.tree.leaves(one), jax.tree.leaves(other)
    return jax.tree.structure(one) == jax.tree.structure(other) and all(
        a.dtype == b.dtype and np.array_equal(a.view(np.uint8), b.view(np.uint8))
        for a, b in zip(*(map(np.ascontiguousarray, each) for each in leaves), strict=True)
    )


def round_trip(config, tensors, shape, module=MODULE):
    """The QArray that one layer becomes, which is written as it was stored."""
    found = decoded(config, tensors, shape, module)
    written = quantization(config).encode(module, found)
    assert written.keys() == tensors.keys()
    for suffix, array in written.items():
        assert array.dtype == tensors[suffix].dtype, suffix
        np.testing.assert_array_equal(array, tensors[suffix], suffix)
    return found


def weight_of(weight):
    """float64 [N, K] of a decoded weight, rows and columns in the model's order."""
    values = decode(weight.spec, weight.arrays, np).astype(np.float64)
    if "output_perm" in weight.aux:
        values = values[weight.aux["output_perm"][0]]
    if "perm" in weight.aux:
        values = values[:, np.argsort(weight.aux["perm"][0])]
    return values


def words(codes, bits, word=32):
    """Codes along the last axis as one number, the first in its lowest bits, cut into words."""
    result = []
    for row in codes.reshape(-1, codes.shape[-1]):
        stream = sum(int(code) << (bits * i) for i, code in enumerate(row))
        count = codes.shape[-1] * bits // word
        result.append([(stream >> (word * i)) & ((1 << word) - 1) for i in range(count)])
    unsigned = np.array(result, f"u{word // 8}").reshape(*codes.shape[:-1], -1)
    return unsigned.view(f"i{word // 8}")
