"""The safetensors reader against the reference package, and against files made to break it."""

import json
import os
import struct
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qjax.checkpoint.safetensors_io import open_safetensors
from qjax.errors import CheckpointError, UnsupportedError
from tests.timing import within_a_second

GOLDEN = Path(__file__).parents[1] / "golden" / "base-tiny-llama"


def entry(dtype="F32", shape=(2,), begin=0, end=8) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def file_bytes(header, data: bytes = bytes(8), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(**fields) -> bytes:
    return file_bytes({"t": entry() | fields})


_HALF = b'"t":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
TWICE = b"{" + _HALF % (0, 4) + b"," + _HALF % (4, 8) + b"}"

# name -> (bytes, field that the error must name)
HOSTILE = {
    "empty": (b"", None),
    "length only": (struct.pack("<Q", 2), None),
    "header of 2^64-1": (file_bytes({}, length=2**64 - 1), "header length"),
    "header of 2^63": (file_bytes({}, length=2**63), "header length"),
    "header over 100 MB": (file_bytes({}, length=100_000_001), "header length"),
    "header past the end": (file_bytes({}, length=11), "header length"),
    "header empty": (file_bytes(b""), "header"),
    "header starts with a space": (file_bytes(b' {"t":{}}'), "header"),
    "header a list": (file_bytes(b"[]"), "header"),
    "header cut": (file_bytes(b'{"t":{"dtype":"F32"'), "header"),
    "header followed by more": (file_bytes(b"{}{}"), "header"),
    "header not utf-8": (file_bytes(b'{"\xff":1}'), "header"),
    "header nested deeply": (file_bytes(b'{"t":' + b"[" * 100_000), "header"),
    "header objects nested deeply": (file_bytes(b'{"t":' * 100_000), "header"),
    "header with NaN": (file_bytes(b'{"t":NaN}'), "header"),
    "header with a giant number": (file_bytes(b'{"t":' + b"9" * 5000 + b"}"), "header"),
    "tensor twice": (file_bytes(TWICE), "t"),
    "field twice": (
        file_bytes(b'{"t":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}'),
        "dtype",
    ),
    "metadata a list": (file_bytes({"__metadata__": [], "t": entry()}), "__metadata__"),
    "metadata with numbers": (file_bytes({"__metadata__": {"a": 1}, "t": entry()}), "__metadata__"),
    "entry a number": (file_bytes({"t": 5}), "t"),
    "entry null": (file_bytes({"t": None}), "t"),
    "dtype missing": (file_bytes({"t": {"shape": [2], "data_offsets": [0, 8]}}), "t"),
    "field unknown": (one(extra=1), "t"),
    "dtype unknown": (one(dtype="F33"), "t"),
    "dtype lower case": (one(dtype="f32"), "t"),
    "dtype a list": (one(dtype=["F32"]), "t"),
    "shape a number": (one(shape=2), "t"),
    "shape negative": (one(shape=[-2]), "t"),
    "shape twice negative": (one(shape=[-1, -2]), "t"),
    "shape a float": (one(shape=[2.0]), "t"),
    "shape true": (one(shape=[True, 2]), "t"),
    "shape overflow": (one(shape=[2**62, 4]), "t"),
    "shape overflow to 2": (one(shape=[2**63 + 1, 2]), "t"),
    "shape of 10,000 axes": (one(shape=[1] * 10_000), "t"),
    "shape too small": (one(shape=[1]), "t"),
    "shape too large": (one(shape=[3]), "t"),
    "half a byte": (one(dtype="F4", shape=[15]), "t"),
    "three offsets": (one(data_offsets=[0, 4, 8]), "t"),
    "offsets reversed": (one(data_offsets=[8, 0]), "t"),
    "offset negative": (one(data_offsets=[-8, 0]), "t"),
    "offset 2^64": (one(data_offsets=[2**64, 2**64 + 8]), "t"),
    "offset a float": (one(data_offsets=[0.0, 8.0]), "t"),
    "begins late": (
        file_bytes({"t": entry(begin=4, end=12)}, bytes(12)),
        "t",
    ),
    "hole": (
        file_bytes({"s": entry(), "t": entry(begin=12, end=20)}, bytes(20)),
        "t",
    ),
    "overlap": (
        file_bytes({"s": entry(), "t": entry(begin=4, end=12)}, bytes(12)),
        "t",
    ),
    "same range twice": (file_bytes({"s": entry(), "t": entry()}), "t"),
    "data cut": (file_bytes({"t": entry()}, bytes(7)), "data_offsets"),
    "data missing": (file_bytes({"t": entry()}, b""), "data_offsets"),
    "data beyond file": (
        file_bytes({"t": entry(shape=[2**30], end=2**32)}),
        "data_offsets",
    ),
    "data followed by more": (file_bytes({"t": entry()}, bytes(9)), "data_offsets"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_one_error(tmp_path, name):
    data, field = HOSTILE[name]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(data)
    tracemalloc.start()
    with within_a_second(), pytest.raises(CheckpointError) as caught:
        open_safetensors(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000
    assert caught.value.file == os.fspath(path)
    assert caught.value.field == field
    if field is not None:
        assert caught.value.offset is not None
        assert 0 <= caught.value.offset <= len(data)
    assert len(str(caught.value)) < 1000


WHOLE = file_bytes(
    {
        "__metadata__": {"format": "pt"},
        "a.weight": entry("BF16", (2, 3), 0, 12),
        "b.weight": entry("F8_E4M3", (4,), 12, 16),
        "c": entry("I64", (), 16, 24),
    },
    bytes(range(24)),
)


def read_bytes(path: Path, data: bytes) -> None:
    """Reads a file and all its tensors; anything but success or CheckpointError goes through."""
    path.write_bytes(data)
    try:
        with open_safetensors(path) as files:
            for name in files.tensors:
                files.raw(name).sum()
    except CheckpointError as error:
        if error.file != os.fspath(path):
            raise


def test_every_length_of_a_cut_file(tmp_path):
    path = tmp_path / "cut.safetensors"
    for length in range(len(WHOLE)):
        path.write_bytes(WHOLE[:length])
        with pytest.raises(CheckpointError):
            open_safetensors(path)
    path.write_bytes(WHOLE)
    with open_safetensors(path) as files:
        assert files.array("c").item() == 0x1716151413121110


TOKENS = st.sampled_from(
    [b"{", b"}", b"[", b"]", b'"', b",", b":", b"-", b"0", b"9" * 20, b"1e9", b"null", b"true",
     b"NaN", b'"c":', b'"dtype":', b'"I4"', b"\\u0000", b"\\ud800", b"\xff", b"\0", b" " * 9]
)  # fmt: skip
EDITS = st.lists(
    st.tuples(st.integers(0, len(WHOLE) - 24), st.integers(0, 12), TOKENS | st.binary(max_size=4)),
    min_size=1,
    max_size=4,
)


@settings(
    max_examples=1000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(EDITS, st.booleans())
def test_mutated_files(tmp_path, edits, fix_length):
    data = bytearray(WHOLE)
    for position, removed, added in edits:
        data[position : position + removed] = added
    if fix_length:  # so that the parser behind the first check is reached
        data[:8] = struct.pack("<Q", max(0, len(data) - 8 - 24))
    read_bytes(tmp_path / "mutated.safetensors", bytes(data))


def test_golden_equals_the_reference_package():
    safetensors = pytest.importorskip("safetensors")
    with (
        open_safetensors(GOLDEN) as files,
        safetensors.safe_open(GOLDEN / "model.safetensors", "np") as reference,
    ):
        assert set(files.tensors) == set(reference.keys())
        assert files.metadata == reference.metadata()
        for name in files.tensors:
            expected = reference.get_tensor(name)
            array = files.array(name)
            assert array.dtype == expected.dtype
            np.testing.assert_array_equal(array, expected)
            assert files.tensors[name].qtype == "bf16"
            assert files.raw(name).shape == (*expected.shape[:-1], expected.shape[-1] * 2)


def test_views_are_read_only_and_outlive_the_files():
    files = open_safetensors(GOLDEN)
    view = files.array("model.embed_tokens.weight")
    expected = view.copy()
    files.release("model.embed_tokens.weight")
    files.close()
    np.testing.assert_array_equal(view, expected)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 0


def test_every_dtype(tmp_path):
    """Values with known bit patterns: 1.0 or 1 in each type, in the order of the specification."""
    patterns = {
        "BOOL": (b"\1", np.bool_), "U8": (b"\1", np.uint8), "I8": (b"\1", np.int8),
        "F8_E5M2": (b"\x3c", ml_dtypes.float8_e5m2), "F8_E4M3": (b"\x38", ml_dtypes.float8_e4m3fn),
        "F8_E8M0": (b"\x7f", ml_dtypes.float8_e8m0fnu),
        "F8_E4M3FNUZ": (b"\x40", ml_dtypes.float8_e4m3fnuz),
        "F8_E5M2FNUZ": (b"\x40", ml_dtypes.float8_e5m2fnuz),
        "I16": (b"\1\0", np.int16), "U16": (b"\1\0", np.uint16), "F16": (b"\0\x3c", np.float16),
        "BF16": (b"\x80\x3f", ml_dtypes.bfloat16), "I32": (b"\1\0\0\0", np.int32),
        "U32": (b"\1\0\0\0", np.uint32), "F32": (b"\0\0\x80\x3f", np.float32),
        "F64": (b"\0\0\0\0\0\0\xf0\x3f", np.float64), "I64": (b"\1" + bytes(7), np.int64),
        "U64": (b"\1" + bytes(7), np.uint64), "C64": (b"\0\0\x80\x3f" + bytes(4), np.complex64),
    }  # fmt: skip
    header, data = {}, b""
    for name, (pattern, _) in patterns.items():
        header[name] = entry(name, (3, 1), len(data), len(data) + 3 * len(pattern))
        data += pattern * 3
    header["F4"] = entry("F4", (3, 2), len(data), len(data) + 3)
    header["empty"] = entry("F32", (0, 4), len(data) + 3, len(data) + 3)
    header["F6_E2M3"] = entry("F6_E2M3", (4,), len(data) + 3, len(data) + 6)
    path = tmp_path / "all.safetensors"
    path.write_bytes(file_bytes(header, data + b"\x22" * 6))
    with open_safetensors(path) as files:
        for name, (pattern, dtype) in patterns.items():
            assert files.tensors[name].qtype == name.lower()
            array = files.array(name)
            assert (array.dtype, array.shape) == (np.dtype(dtype), (3, 1))
            assert (array.astype(np.complex64) == 1).all()
            assert files.raw(name).shape == (3, len(pattern))
        assert files.array("empty").shape == (0, 4)
        assert files.raw("F4").tolist() == [[0x22]] * 3
        assert files.raw("F6_E2M3").shape == (3,)
        with pytest.raises(UnsupportedError, match="f4"):
            files.array("F4")


def write_sharded(folder: Path, weight_map) -> Path:
    (folder / "x-1.safetensors").write_bytes(file_bytes({"a": entry()}, b"\1" * 8))
    (folder / "x-2.safetensors").write_bytes(file_bytes({"b": entry()}, b"\2" * 8))
    index = (
        weight_map
        if isinstance(weight_map, bytes)
        else json.dumps({"weight_map": weight_map}).encode()
    )
    (folder / "model.safetensors.index.json").write_bytes(index)
    return folder


def test_folder_with_index(tmp_path):
    with open_safetensors(
        write_sharded(tmp_path, {"b": "x-2.safetensors", "a": "x-1.safetensors"})
    ) as files:
        assert files.raw("a").tolist() == [1] * 8
        assert files.raw("b").tolist() == [2] * 8


OUTSIDE = [
    "../x-1.safetensors",
    "/etc/passwd",
    "a/../../x",
    "..\\x-1.safetensors",
    "C:\\x",
    "C:x",
    "",
    "a\0",
    7,
]


@pytest.mark.parametrize("file", OUTSIDE)
def test_index_stays_in_its_folder(tmp_path, file):
    write_sharded(tmp_path, {"a": "x-1.safetensors", "b": file})
    with pytest.raises(CheckpointError, match="only files inside the folder") as caught:
        open_safetensors(tmp_path)
    assert caught.value.field == "b"


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            b'{"weight_map":{"a":"x-1.safetensors","a":"x-2.safetensors"}}',
            "a, at byte 0: key occurs twice",
        ),
        (b'{"weight_map":{"a":"x-2.safetensors"}}', "x-2.safetensors, which does not hold it"),
        (b'{"weight_map":{"c":"x-2.safetensors"}}', "x-2.safetensors, which does not hold it"),
        (b'{"weight_map":{"a":"x-3.safetensors"}}', "x-3.safetensors: cannot be opened"),
        (b'{"weight_map":[]}', "weight_map"),
        (b"{}", "weight_map"),
        (b"", "too few"),
        (b'{"weight_map"', "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_index_that_does_not_fit(tmp_path, index, message):
    with pytest.raises(CheckpointError, match=message):
        open_safetensors(write_sharded(tmp_path, index))


def test_tensor_in_two_files(tmp_path):
    write_sharded(tmp_path, {"a": "x-1.safetensors", "b": "x-2.safetensors"})
    (tmp_path / "x-2.safetensors").write_bytes(
        file_bytes({"b": entry(), "a": entry(begin=8, end=16)}, bytes(16))
    )
    with pytest.raises(CheckpointError, match=r"x-2\.safetensors, a: tensor is also in .*x-1"):
        open_safetensors(tmp_path)


def test_folder_without_index(tmp_path):
    with pytest.raises(CheckpointError, match=r"nor any other \.safetensors file"):
        open_safetensors(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(file_bytes({"b": entry()}))
    assert list(open_safetensors(tmp_path).tensors) == ["b"]
    (tmp_path / "a.safetensors").write_bytes(file_bytes({"a": entry()}))
    with pytest.raises(CheckpointError, match=r"several files: a\.safetensors, b\.safetensors"):
        open_safetensors(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(file_bytes({"m": entry()}))
    assert list(open_safetensors(tmp_path).tensors) == ["m"]
