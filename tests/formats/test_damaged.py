"""Damaged checkpoints of every format that lies in tests/golden: refused at once, by name.

A tensor or a setting may be redundant; then the weights that come out must be those of the whole
checkpoint, to the bit. Anything else has to be an error that names the file and the thing.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from qjax.checkpoint import detect
from qjax.checkpoint.loader import load
from qjax.errors import CheckpointError, QjaxError, UnsupportedError
from qjax.params import Params
from tests.timing import within_a_second

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
OUTSIDE = Path(os.environ.get("QJAX_FIXTURES", GOLDEN))
FILE = "model.safetensors"


class Tensor(NamedTuple):
    """A tensor of a safetensors file, not looked into."""

    dtype: str
    shape: list[int]
    data: bytes


Tensors = dict[str, Tensor]


def read(file: Path) -> tuple[Tensors, dict[str, str]]:
    data = file.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    body, metadata = data[8 + length :], header.pop("__metadata__", {})
    return {
        name: Tensor(entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }, metadata


def write(file: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        offsets = [at, at + len(data)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        at += len(data)
    text = json.dumps(header).encode()
    body = b"".join(tensor.data for tensor in tensors.values())
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)


class Model:
    """One checkpoint, and copies of it that are damaged."""

    def __init__(self, folder: Path, work: Path):
        self.folder, self.work = folder, work
        self.config = json.loads((folder / "config.json").read_text())
        found, where = detect.find(folder, self.config)
        assert found is not None
        self.quantization, self.where = dict(found), where.name
        self.tensors, self.metadata = read(folder / FILE)
        self.whole = load(folder)
        # The tensors of one quantized layer: that which has most of them, or no plain weight.
        modules: dict[str, list[str]] = {}
        for name in self.tensors:
            if (parts := name.split("."))[1:2] == ["layers"] and len(parts) > 5:
                modules.setdefault(".".join(parts[:5]), []).append(name)
        self.module = max(modules, key=lambda m: (len(modules[m]), m))
        self.of_layer = [n for n in modules[self.module] if not n.endswith(".bias")]

    def damaged(
        self,
        tensors: Tensors | None = None,
        quantization: dict[str, Any] | None = None,
    ) -> Path:
        write(self.work / FILE, self.tensors if tensors is None else tensors, self.metadata)
        config = dict(self.config)
        for file in detect.SIDE_FILES:
            if (self.folder / file).exists():
                (self.work / file).write_bytes((self.folder / file).read_bytes())
        changed = self.quantization if quantization is None else quantization
        if self.where == "config.json":
            key = "quantization_config"
            config[key if key in config else "compression_config"] = changed
        else:
            (self.work / self.where).write_text(json.dumps(changed))
        (self.work / "config.json").write_text(json.dumps(config))
        return self.work


def names() -> list[str]:
    found = set()
    for root in (GOLDEN, OUTSIDE):
        for folder in root.glob("*/"):
            if (folder / FILE).is_file() and (folder / "config.json").is_file():
                config = json.loads((folder / "config.json").read_text())
                if detect.find(folder, config)[0] is not None:
                    found.add(folder.name)
    return sorted(found)


@pytest.fixture(scope="module", params=names())
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    name = request.param
    folder = GOLDEN / name if (GOLDEN / name).is_dir() else OUTSIDE / name
    return Model(folder, tmp_path_factory.mktemp("damaged"))


def same(one: Params, other: Params) -> bool:
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def refusal(folder: Path) -> QjaxError | None:
    """The error that loading ends in, after less than a second."""
    with within_a_second():
        try:
            load(folder)
        except (CheckpointError, UnsupportedError) as error:
            return error
    return None


def check(model: Model, folder: Path, *words: str, redundant: bool = False) -> None:
    error = refusal(folder)
    if error is None and redundant:
        assert same(load(folder), model.whole), f"{words} changed, and nobody noticed"
        return
    assert error is not None, f"{words} changed, and nobody noticed"
    assert str(folder) in str(error)
    assert any(word in str(error) for word in words), f"{error} names none of {words}"


def test_cut_short(model: Model) -> None:
    folder = model.damaged()
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[:-7])
    check(model, folder, "cut short")


# Layers with and without these are both in use, and nothing else tells them apart.
OPTIONAL = (".pre_quant_scale",)


def test_missing(model: Model) -> None:
    for name in model.of_layer:
        if name.endswith(OPTIONAL):
            continue
        tensors = {key: value for key, value in model.tensors.items() if key != name}
        scale = model.module.replace("_proj", "_scale")  # one of the cache is no longer the layer's
        check(model, model.damaged(tensors), model.module, scale, redundant=True)


def test_whole_layer_missing(model: Model) -> None:
    kept = {k: v for k, v in model.tensors.items() if not k.startswith(model.module + ".")}
    # Of joined layers, the parts are missed.
    check(model, model.damaged(kept), model.module.rpartition(".")[0])


def test_extra(model: Model) -> None:
    extra = Tensor("F32", [2], bytes(8))
    for name in (f"{model.module}.weight_scale_3", "model.layers.0.mlp.side_proj.weight"):
        check(model, model.damaged({**model.tensors, name: extra}), name)


def reshaped(tensor: Tensor) -> Iterator[Tensor]:
    """One row more, one row less, and a column more."""
    if not tensor.shape:
        yield Tensor(tensor.dtype, [3], tensor.data * 3)
        return
    rows, rest = tensor.shape[0], tensor.shape[1:]
    size = len(tensor.data) // max(1, rows)
    yield Tensor(tensor.dtype, [rows + 2, *rest], tensor.data + tensor.data[:size] * 2)
    if rows > 1:
        yield Tensor(tensor.dtype, [rows - 1, *rest], tensor.data[:-size])
    if rest and math.prod(rest) > 1:
        width = len(tensor.data) // math.prod(tensor.shape)
        more = bytes(width * rows * math.prod(rest[:-1]))
        yield Tensor(tensor.dtype, [rows, *rest[:-1], rest[-1] + 1], tensor.data + more)


def test_wrong_shape(model: Model) -> None:
    for name in model.of_layer:
        for tensor in reshaped(model.tensors[name]):
            folder = model.damaged({**model.tensors, name: tensor})
            check(model, folder, model.module, redundant=True)


def test_wrong_dtype(model: Model) -> None:
    for name in model.of_layer:
        tensor = model.tensors[name]
        elements = math.prod(tensor.shape)
        other = "I64" if tensor.dtype != "I64" else "F64"
        changed = Tensor(other, tensor.shape, bytes(8 * elements))
        folder = model.damaged({**model.tensors, name: changed})
        check(model, folder, model.module, redundant=True)


_NAN = {
    "F32": b"\0\0\xc0\x7f",
    "BF16": b"\xc0\x7f",
    "F16": b"\0\x7e",
    "F8_E4M3": b"\x7f",
    "F8_E8M0": b"\xff",
}


def test_scales_that_are_no_numbers(model: Model) -> None:
    for name in model.of_layer:
        tensor = model.tensors[name]
        codes = len(tensor.data) == max(len(model.tensors[each].data) for each in model.of_layer)
        if tensor.dtype not in _NAN or codes:
            continue
        broken = _NAN[tensor.dtype]
        data = broken + tensor.data[len(broken) :]
        folder = model.damaged({**model.tensors, name: tensor._replace(data=data)})
        check(model, folder, model.module, redundant=True)


def test_unknown_method(model: Model) -> None:
    changed = {**model.quantization, "quant_method": "unheard_of"}
    check(model, model.damaged(quantization=changed), "'unheard_of' is not supported")


def test_unknown_key(model: Model) -> None:
    changed = {**model.quantization, "unheard_of": 1}
    check(model, model.damaged(quantization=changed), "unheard_of")


def changed_values(
    config: Any, names: frozenset[str], change: Callable[[Any], Any]
) -> Iterator[tuple[str, Any]]:
    """Copies of a config with one of these keys changed, at any depth, where it is of weights."""
    if isinstance(config, dict):
        for key, value in config.items():
            if any(word in key for word in ("activation", "input", "output", "kv_cache")):
                continue
            if key in names and isinstance(value, int) and not isinstance(value, bool):
                yield key, {**config, key: change(value)}
            for inner, copy in changed_values(value, names, change):
                yield inner, {**config, key: copy}


BITS = frozenset({"bits", "nbits", "num_bits", "w_bit"})
GROUPS = frozenset({"group_size", "q_group_size"})


def test_bits_that_contradict_the_tensors(model: Model) -> None:
    for key, changed in changed_values(model.quantization, BITS, lambda b: 4 if b == 8 else b - 1):
        folder = model.damaged(quantization=changed)
        check(model, folder, "model.layers.", "lm_head.", key, redundant=True)


def test_groups_that_contradict_the_tensors(model: Model) -> None:
    for key, changed in changed_values(
        model.quantization, GROUPS, lambda g: 2 * g if g > 0 else 32
    ):
        folder = model.damaged(quantization=changed)
        check(model, folder, "model.layers.", "lm_head.", key, "group", redundant=True)


@pytest.mark.parametrize("value", [None, [], "x", {"a": 1}, -5, 1e9, True])
def test_values_of_other_types(model: Model, value: Any) -> None:
    """Whatever is written there, it is an error of qjax or it says nothing about the weights."""
    for key in model.quantization:
        if key == "quant_method":
            continue
        folder = model.damaged(quantization={**model.quantization, key: value})
        error = refusal(folder)
        if error is not None:
            assert str(folder) in str(error) or "model." in str(error)
