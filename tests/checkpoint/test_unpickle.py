"""Files of torch.save: one that TorchAO's tensors were pickled into, and hostile ones."""

import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

import qjax
from qjax.checkpoint.unpickle import INDEX_NAME, SINGLE_NAME, open_pickled
from qjax.errors import CheckpointError, QjaxError
from tests.timing import within_a_second

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "ao-bin-mixed"


def archive(file, pickled, storages=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(file, "w", compression) as out:
        out.writestr("model/data.pkl", pickled)
        out.writestr("model/byteorder", "little")
        for key, data in enumerate(storages):
            out.writestr(f"model/data/{key}", data)
    return file.parent


def text(value):
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def number(value):
    return b"J" + value.to_bytes(4, "little", signed=True)


def tensor(offset=0, size=(2, 3), stride=(3, 1), key="0", storage="FloatStorage"):
    """Opcodes of a tensor, as torch writes them."""
    persistent = b"(" + text("storage") + b"ctorch\n" + storage.encode() + b"\n"
    persistent += text(key) + text("cpu") + number(6) + b"tQ"
    sizes = b"".join(b"(" + b"".join(map(number, each)) + b"t" for each in (size, stride))
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + persistent + number(offset) + sizes
    return call + b"\x89ccollections\nOrderedDict\n)RtR"


def state_dict(*values):
    items = b"".join(text(f"t{i}") + value for i, value in enumerate(values))
    return b"\x80\x02ccollections\nOrderedDict\n)R(" + items + b"u."


def refused(folder, match):
    with within_a_second(), pytest.raises(QjaxError, match=match):
        open_pickled(folder)


NUMBERS = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_torch_file():
    with open_pickled(GOLDEN) as files:
        module = "model.layers.0.self_attn.q_proj"
        assert files.tensors[f"{module}._weight_qdata"].qtype == "i8"
        assert files.tensors[f"{module}._weight_qdata"].shape == (64, 64)
        assert abs(files.array(f"{module}._weight_qdata").astype(int)).max() in (127, 128)
        told = json.loads(files.metadata[f"{module}.weight"])
        assert told["_type"] == "Int8Tensor"
        kwargs = told["_data"]["act_quant_kwargs"]["_data"]
        assert kwargs["granularity"]["_type"] == "PerRow"
        assert kwargs["mapping_type"]["_data"] == "SYMMETRIC"
        assert files.tensors["model.norm.weight"].qtype == "f32"
        np.testing.assert_array_equal(files.array("model.norm.weight"), 1)


def test_index(tmp_path):
    """An index names the files; those of another folder are refused."""
    for file in ("config.json", SINGLE_NAME):
        shutil.copy(GOLDEN / file, tmp_path)
    (tmp_path / SINGLE_NAME).rename(tmp_path / "pytorch_model-00001-of-00001.bin")
    with open_pickled(GOLDEN) as files:
        names = list(files.tensors)
    index = {"weight_map": dict.fromkeys(names, "pytorch_model-00001-of-00001.bin")}
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    assert qjax.load(tmp_path).nbytes == qjax.load(GOLDEN).nbytes
    (tmp_path / INDEX_NAME).write_text('{"weight_map": {"a": "../pytorch_model.bin"}}')
    refused(tmp_path, "outside the folder")


def test_only_for_torchao(tmp_path):
    shutil.copy(GOLDEN / SINGLE_NAME, tmp_path)
    config = json.loads((GOLDEN / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="are not read"):
        qjax.load(tmp_path)


def test_plain_tensors(tmp_path):
    folder = archive(tmp_path / SINGLE_NAME, state_dict(tensor(), tensor(3, (3,), (1,))), [NUMBERS])
    with open_pickled(folder) as files:
        np.testing.assert_array_equal(files.array("t0"), NUMBERS)
        np.testing.assert_array_equal(files.array("t1"), NUMBERS[1])


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (tensor(1), r"t0.*takes bytes 4 to 28 of a storage of 24"),
        (tensor(size=(1 << 30, 1 << 30), stride=(1 << 30, 1)), "t0.*takes bytes"),
        (tensor(offset=-1), "out of range"),
        (tensor(stride=(1, 2)), r"t0: strides \(1, 2\) are not contiguous"),
        (tensor(size=(6,)), "contradicting sizes"),
        (tensor(key="1"), "storage data/1 is missing"),
        (tensor(storage="ComplexFloatStorage"), "wants 'torch.ComplexFloatStorage'"),
        (b"K\x01", "is a int, no tensor"),
        (b"cos\nsystem\n" + text("true") + b"\x85R", "wants 'os.system'"),
        (b"cbuiltins\neval\n" + text("1") + b"\x85R", "wants 'builtins.eval'"),
        (b"ctorch.hub\nload\n)R", "wants 'torch.hub.load'"),
        (b"ctorchao.a\nB\n(K\x01K\x02tR", "a call of torchao.a.B"),
        (b"(" + text("x") + b"i__main__\nA\n", "opcode"),
        (b"h\x07", "KeyError"),
        (b"r\xff\xff\xff\x7f", "is no pickle"),
        (b"R", "is no pickle"),
        (b"}K\x01)s", "keys are no texts"),
    ],
)
def test_refused(tmp_path, value, match):
    refused(archive(tmp_path / SINGLE_NAME, state_dict(value), [NUMBERS]), match)


class Harm:
    def __reduce__(self):
        return (Path.touch, (Path("harm"),))


@pytest.mark.parametrize("protocol", range(6))
def test_python_pickles_are_refused(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps({"a": Harm()}, protocol)
    refused(archive(tmp_path / SINGLE_NAME, data), "wants|is no pickle")
    assert not Path("harm").exists()


def test_billion_laughs(tmp_path):
    """Tuples of tuples that would take for ever to print, hash or walk."""
    doubled = b")q\x00" + b"".join(
        bytes([ord("h"), i]) + b"\x86q" + bytes([i + 1]) for i in range(60)
    )
    call = b"ctorch._utils\n_rebuild_tensor_v2\n" + doubled + b"R"
    kind = b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_wrapper_subclass\n"
    setting = kind + b"ctorchao\nT\n)}" + text("x") + doubled + b"stR"
    for value, match in ((doubled, "no tensor"), (call, "is no pickle"), (setting, "settings")):
        refused(archive(tmp_path / SINGLE_NAME, state_dict(value)), match)


def test_broken_archives(tmp_path):
    file = tmp_path / SINGLE_NAME
    whole = (GOLDEN / SINGLE_NAME).read_bytes()
    for data in (b"", b"x" * 100, whole[:-9], whole[: len(whole) // 2], pickle.dumps({})):
        file.write_bytes(data)
        refused(tmp_path, str(file))
    refused(archive(file, state_dict(tensor()), [NUMBERS], zipfile.ZIP_DEFLATED), "compressed")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        out.writestr("model/other", "x")
    file.write_bytes(buffer.getvalue())
    refused(tmp_path, r"holds no data\.pkl")


def test_flipped_bytes(tmp_path):
    """Whatever byte of the pickle changes: an error of qjax, or tensors within the file."""
    whole = bytearray((GOLDEN / SINGLE_NAME).read_bytes())
    start = whole.index(b"\x80\x02ccollections")
    file = tmp_path / SINGLE_NAME
    rng = np.random.default_rng(0)
    for at in rng.integers(start, start + 4000, 200):
        damaged = bytearray(whole)
        damaged[at] ^= int(rng.integers(1, 256))
        file.write_bytes(damaged)
        told = ""
        try:
            with open_pickled(tmp_path) as files:
                for name in files.tensors:
                    assert files.raw(name).nbytes == files.tensors[name].nbytes
        except QjaxError as error:
            told = str(error)
        assert not told or str(file) in told
