"""Trees of weights as plain arrays and JSON: every weight of every checkpoint, bit for bit."""

import json
import os
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.inputs import ActSpec
from qjax import ops
from qjax.checkpoint import native
from qjax.checkpoint.loader import load
from qjax.errors import CheckpointError
from qjax.qarray import QArray

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
OUTSIDE = Path(os.environ.get("QJAX_FIXTURES", GOLDEN))
CHECKPOINTS = {
    folder.name: folder
    for root in (OUTSIDE, GOLDEN)
    for folder in sorted(root.glob("*"))
    if any(folder.glob("*.safetensors")) or any(folder.glob("model*.gguf"))
}


def same(one, other) -> bool:
    """The same structure, static fields included, and the same bits of the same dtypes."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(
        a.dtype == b.dtype and a.shape == b.shape and np.asarray(a).tobytes() == b.tobytes()
        for a, b in pairs
    )


def is_weight(node) -> bool:
    return isinstance(node, QArray)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_weight_comes_back(name, tmp_path):
    """As this machine holds it and in the canonical layout, by way of files of numpy and JSON."""
    tree = load(CHECKPOINTS[name]).tree
    canonical = jax.tree.map(
        lambda leaf: ops.unprepare(leaf) if is_weight(leaf) else leaf, tree, is_leaf=is_weight
    )
    for each in (tree, canonical):
        arrays, static = native.describe(each)
        assert all(array.dtype.isbuiltin == 1 for array in arrays.values())
        np.savez(tmp_path / "arrays.npz", **arrays)
        with np.load(tmp_path / "arrays.npz", allow_pickle=False) as read:
            restored = native.restore(dict(read), json.loads(json.dumps(static)))
        assert same(each, restored)


def weight() -> QArray:
    scale = np.arange(1, 5, dtype=np.float32).reshape(4, 1)
    return QArray(
        np.arange(32, dtype=np.uint8).reshape(4, 8),
        "int8",
        (4, 8),
        scale.astype(ml_dtypes.bfloat16),
        aux={"act_scale": np.ones((1, 1), np.float32)},
        group=(1, 8),
        act=ActSpec("int8", "tensor", False, divisor=127.5),
        hadamard=(8, 0),
    )


def test_arrays_may_stay_on_the_device():
    arrays, static = native.describe(
        {"a": {"weight": jax.tree.map(jnp.asarray, weight())}}, on_host=False
    )
    assert all(isinstance(array, jax.Array) for array in arrays.values())
    assert arrays["a.weight/scale"].dtype == np.uint16
    # bfloat16 is the upper half of float32: 3.0 is 0x4040.
    assert arrays["a.weight/scale"][2, 0] == 0x4040
    assert same({"a": {"weight": weight()}}, native.restore(arrays, static))


def test_names_say_where_an_array_belongs():
    arrays, static = native.describe({"a.b": weight(), "norm": np.ones(3, np.float16)})
    assert set(arrays) == {"a.b/qvalue", "a.b/scale", "a.b/aux/act_scale", "norm"}
    assert same(native.restore(arrays, static)["a.b"], weight())
    with pytest.raises(ValueError, match=r"two leaves .* a\.b/qvalue"):
        native.describe({"a.b": weight(), "a": {"b": weight()}})


def test_what_does_not_belong_together_is_refused():
    arrays, static = native.describe({"w": weight()})
    with pytest.raises(CheckpointError, match=r"w/scale.*missing"):
        native.restore({k: v for k, v in arrays.items() if k != "w/scale"}, static)
    with pytest.raises(CheckpointError, match=r"other.*belongs to no weight"):
        native.restore({**arrays, "other": np.ones(1)}, static)
    with pytest.raises(CheckpointError, match=r"w/scale.*float32, but bfloat16 is kept as uint16"):
        native.restore({**arrays, "w/scale": np.ones((4, 1), np.float32)}, static)
    with pytest.raises(CheckpointError, match=r"version.*reads 1"):
        native.restore(arrays, {**static, "version": 2})
    _, other = native.describe({"w": replace(weight(), group=(2, 8), scale=np.ones((2, 1)))})
    with pytest.raises(CheckpointError, match=r"w.*wrongly: .*shape \(2, 1\)"):
        native.restore(arrays, {**other, "leaves": [other["leaves"][0] | static_dtypes(static)]})


def static_dtypes(static) -> dict:
    return {"dtypes": static["leaves"][0]["dtypes"]}
