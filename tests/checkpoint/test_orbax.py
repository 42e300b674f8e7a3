"""Models in orbax's format: every kind of weight as it is, one device or several."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import qjax
from qjax.checkpoint import saver
from qjax.checkpoint.loader import load
from qjax.errors import CheckpointError, UnsupportedError
from tests.checkpoint.test_native import same
from tests.checkpoint.test_save_by_name import same_numbers, stored

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize(
    "name", ["gguf-gemma3-Q5_0", "bnb-nf4-dq", "ct-fp8-kv8", "hqq-4b-g64-axis0", "gptoss-mxfp4"]
)
def test_every_weight_as_it_was(name, golden, tmp_path):
    params = load(golden / name)
    saved = saver.save(params, tmp_path / "saved", "orbax")
    found = load(tmp_path / "saved")
    assert same(found.tree, params.tree)
    assert found.config == params.config
    assert found.tokenizer.encode("Hello") == params.tokenizer.encode("Hello")
    assert saved.weights == params.summary().total.weights
    # The same once more, without being told, from what was written.
    again = qjax.save(found, tmp_path / "again")
    assert same(load(again).tree, params.tree)


def test_to_other_formats(golden, tmp_path):
    """What was stored before: names and norms as the model's class has them."""
    source = golden / "ct-qwen3moe-w4a16-g32"
    qjax.save(load(source), tmp_path / "native", "orbax")
    native = load(tmp_path / "native")
    qjax.save(native, tmp_path / "saved", "compressed-tensors")
    assert same_numbers(load(tmp_path / "saved"), native)
    packed = {n: t for n, t in stored(source).items() if n.endswith("_packed")}
    assert packed.items() <= stored(tmp_path / "saved").items()
    gemma = golden / "base-tiny-gemma3"
    qjax.save(load(gemma), tmp_path / "gemma", "orbax")
    qjax.save(load(tmp_path / "gemma"), tmp_path / "dense", "safetensors")
    assert same_numbers(load(tmp_path / "dense"), load(gemma))


def test_what_is_damaged_or_asked_for_wrongly(golden, tmp_path):
    params = load(golden / "gguf-Q4_1")
    with pytest.raises(UnsupportedError, match="orbax keeps weights as they are"):
        qjax.save(params, tmp_path / "a", "orbax", dtype="bfloat16")
    folder = qjax.save(params, tmp_path / "a", "orbax")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        qjax.save(params, folder, "orbax")
    with pytest.raises(UnsupportedError, match="needs safetensors"):
        load(folder, quantization="fp8")
    file = folder / "qjax.json"
    content = json.loads(file.read_text())
    for change, reason in (
        ({"version": 99}, "version 99"),
        ({"parts": [{"version": 1, "leaves": content["parts"][0]["leaves"][1:]}]}, "by orbax"),
        ({"parts": [*content["parts"], content["parts"][0]]}, "weights/1: cannot"),
    ):
        file.write_text(json.dumps(content | change))
        with pytest.raises(CheckpointError, match=reason):
            load(folder)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(UnsupportedError, match="sharding goes with folders in orbax's format"):
        load(golden / "gguf-Q4_1", sharding=lambda name, shape: one)


_ON_SEVERAL_DEVICES = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import qjax
from qjax import ops
from qjax.qarray import QArray
from dataclasses import replace

source, folder = sys.argv[1:]
def sharding(mesh, axis):
    size = mesh.shape[axis]
    def place(name, shape):
        split = len(shape) > 1 and shape[-2] % size == 0 and shape[-2] > 1
        return NamedSharding(mesh, P(*[None] * (len(shape) - 2), axis) if split else P())
    return place
def put(leaf, place):
    if isinstance(leaf, QArray):
        leaf = ops.unprepare(jax.tree.map(np.asarray, leaf))
    return jax.tree.map(lambda a: jax.device_put(a, place("", a.shape)), leaf)
params = qjax.load(source)
one = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
is_weight = lambda node: isinstance(node, QArray)
tree = jax.tree.map(lambda leaf: put(leaf, sharding(one, "model")), params.tree, is_leaf=is_weight)
qjax.save(replace(params, tree=tree), folder, "orbax")
other = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
found = qjax.load(folder, sharding=sharding(other, "y"))
assert jax.tree.structure(found.tree) == jax.tree.structure(tree)
split = 0
for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(found.tree), strict=True):
    assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert b.sharding.mesh == other, b.sharding
    split += not b.sharding.is_fully_replicated
assert split > 10, split
print("same", split)
"""


def test_on_several_devices_and_on_another_mesh(golden, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", _ON_SEVERAL_DEVICES, golden / "ct-fp8-kv8", tmp_path / "saved"],
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.startswith("same")
    # One device reads what four have written.
    assert same_numbers(load(tmp_path / "saved"), load(golden / "ct-fp8-kv8"))
