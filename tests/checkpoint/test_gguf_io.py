"""The GGUF reader against a file that llama.cpp wrote, and against files made to break it.

The hostile files follow the classes of holes that were found in other GGUF readers: CVE-2024-21802,
-21825, -21836, -23496, -23605, CVE-2025-49847, CVE-2026-7482, and llama.cpp's handcrafted files.
"""

import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qjax.checkpoint.gguf_io import TYPES, read_gguf
from qjax.errors import CheckpointError, UnsupportedError
from tests.checkpoint.gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    array,
    gguf,
    pair,
    string,
    tensor,
)
from tests.timing import within_a_second

GOLDEN = Path(__file__).parents[1] / "golden" / "gguf-Q4_1" / "model.gguf"
F32_ID, Q4_0_ID = 0, 2

ARCHITECTURE = pair("general.architecture", STRING, "llama")
TOKENS = pair("tokenizer.ggml.tokens", ARRAY, array(STRING, ["a", "b", "c"]))


def llama(name: str, kind: int, value) -> bytes:
    return gguf([ARCHITECTURE, pair(f"llama.{name}", kind, value)])


def vocabulary(name: str, kind: int, value) -> bytes:
    return gguf([TOKENS, pair(f"tokenizer.ggml.{name}", kind, value)])


def one_tensor(dims, type_id=F32_ID, offset=0, rank=None, data=bytes(4096)) -> bytes:
    return gguf(tensors=[tensor("t", dims, type_id, offset, rank)], data=data)


def aligned(kind: int, value) -> bytes:
    pairs = [pair("general.alignment", kind, value)]
    return gguf(pairs, [tensor("t", [4], F32_ID, 0)], bytes(16))


# name -> (bytes, field that the error must name)
HOSTILE = {
    "empty": (b"", None),
    "magic only": (b"GGUF", None),
    "header cut": (gguf()[:20], None),
    "other magic": (gguf(magic=b"FUGG"), "magic"),
    "version 0": (gguf(version=0), "version"),
    "version 1": (gguf(version=1), "version"),
    "version 4": (gguf(version=4), "version"),
    "big-endian": (gguf(version=3 << 24), "version"),
    "tensor count overflow": (gguf(tensor_count=2**64 - 1), "tensor_count"),
    "tensor count beyond file": (gguf(tensor_count=1000), "tensor_count"),
    "value count overflow": (gguf(kv_count=2**63), "kv_count"),
    "value count times size overflow": (gguf(kv_count=2**64 // 32), "kv_count"),
    "one value too many announced": (gguf([ARCHITECTURE], kv_count=2), "key 1"),
    "one million tiny values": (gguf(kv_count=1 << 20, data=bytes(20 << 20)), "kv_count"),
    "key length overflow": (gguf([struct.pack("<Q", 2**64 - 1) + bytes(32)]), "key 0"),
    "key longer than file": (gguf([struct.pack("<Q", 4096) + bytes(32)]), "key 0"),
    "key empty": (gguf([pair("", U8, 1)]), "key 0"),
    "key not utf-8": (gguf([pair(b"\xff\xfe", U8, 1)]), "key 0"),
    "key twice": (gguf([pair("k", U8, 1), pair("k", U8, 1)]), "k"),
    "string length overflow": (gguf([pair("k", STRING, struct.pack("<Q", 2**64 - 8))]), "k"),
    "string longer than file": (gguf([pair("k", STRING, struct.pack("<Q", 2**40))]), "k"),
    "string not utf-8": (gguf([pair("k", STRING, string(b"\xc3\x28"))]), "k"),
    "value type unknown": (gguf([pair("k", 13, bytes(8))]), "k"),
    "value type huge": (gguf([pair("k", 2**32 - 1, bytes(8))]), "k"),
    "value cut": (gguf([pair("k", U64, b"\1")])[:41], "k"),
    "truth value 2": (gguf([pair("k", BOOL, b"\2")]), "k"),
    "truth value 2 in array": (
        gguf([pair("k", ARRAY, struct.pack("<IQ", BOOL, 2) + b"\1\2")]),
        "k",
    ),
    "array of 2^40": (gguf([pair("k", ARRAY, array(U8, [], count=2**40))]), "k"),
    "array size overflow": (gguf([pair("k", ARRAY, array(U64, [], count=2**61 + 1))]), "k"),
    "array of strings, 2^40": (gguf([pair("k", ARRAY, array(STRING, [], count=2**40))]), "k"),
    "array of strings, count beyond": (
        gguf([pair("k", ARRAY, array(STRING, ["a"], count=3))], data=bytes(9)),
        "k[2]",
    ),
    "array string too long": (
        gguf([pair("k", ARRAY, array(STRING, ["a"], 2) + struct.pack("<Q", 2**62))]),
        "k[1]",
    ),
    "array string not utf-8": (gguf([pair("k", ARRAY, array(STRING, ["a", b"\x80"]))]), "k[1]"),
    "array of arrays": (gguf([pair("k", ARRAY, array(ARRAY, [], 1) + array(U8, [1]))]), "k"),
    "array of unknown type": (gguf([pair("k", ARRAY, struct.pack("<IQ", 99, 1))]), "k"),
    "tensor name twice": (
        gguf(tensors=[tensor("t", [8], F32_ID, 0), tensor("t", [8], F32_ID, 32)], data=bytes(64)),
        "t",
    ),
    "tensor name empty": (gguf(tensors=[tensor("", [8], F32_ID, 0)], data=bytes(32)), "tensor 0"),
    "tensor name beyond file": (
        gguf(tensors=[struct.pack("<Q", 2**50) + bytes(64)]),
        "tensor 0",
    ),
    "tensor name not utf-8": (
        gguf(tensors=[tensor(b"\xff", [8], 0, 0)], data=bytes(32)),
        "tensor 0",
    ),
    "no dimensions": (one_tensor([], rank=0), "t"),
    "five dimensions": (one_tensor([1, 1, 1, 1, 1]), "t"),
    "2^32-1 dimensions": (one_tensor([4], rank=2**32 - 1), "t"),
    "negative dimension": (one_tensor([2**64 - 4]), "t"),
    "dimension zero": (one_tensor([0, 4]), "t"),
    "product overflows to zero": (one_tensor([2**32, 2**32]), "t"),
    "product overflows to 16": (one_tensor([2**62 + 4, 4]), "t"),
    "product overflow hidden by zero": (one_tensor([2**62, 2**62, 0]), "t"),
    "byte size overflow": (one_tensor([2**61]), "t"),
    "larger than file": (one_tensor([1025 * 32]), "t"),
    "row not whole blocks": (one_tensor([33], Q4_0_ID), "t"),
    "row not whole blocks, total is": (one_tensor([16, 2], Q4_0_ID), "t"),
    "tensor type removed": (one_tensor([32], 4), "t"),
    "tensor type unknown": (one_tensor([32], 43), "t"),
    "tensor type huge": (one_tensor([32], 2**31), "t"),
    "alignment zero": (aligned(U32, 0), "general.alignment"),
    "alignment 3": (aligned(U32, 3), "general.alignment"),
    "alignment 2^31": (aligned(U32, 2**31), "general.alignment"),
    "alignment of wrong type": (aligned(U64, 32), "general.alignment"),
    "alignment a string": (aligned(STRING, "32"), "general.alignment"),
    "alignment negative": (aligned(I32, -32), "general.alignment"),
    "offset not aligned": (one_tensor([4], offset=4), "t"),
    "offset not the running sum": (one_tensor([4], offset=32), "t"),
    "offset overflow": (one_tensor([4], offset=2**64 - 32), "t"),
    "overlap": (
        gguf(
            tensors=[tensor("s", [16], F32_ID, 0), tensor("t", [16], F32_ID, 32)], data=bytes(128)
        ),
        "t",
    ),
    "hole": (
        gguf(tensors=[tensor("s", [8], F32_ID, 0), tensor("t", [8], F32_ID, 64)], data=bytes(96)),
        "t",
    ),
    "data past the end": (one_tensor([1024], data=bytes(4095)), "t"),
    "no data at all": (gguf(tensors=[tensor("t", [4], F32_ID, 0)])[:-7], "t"),
    "architecture a number": (gguf([pair("general.architecture", U32, 1)]), "general.architecture"),
    "zero heads": (llama("attention.head_count", U32, 0), "llama.attention.head_count"),
    "zero heads in every layer": (
        llama("attention.head_count", ARRAY, array(U32, [0, 0])),
        "llama.attention.head_count",
    ),
    "zero kv heads": (llama("attention.head_count_kv", U32, 0), "llama.attention.head_count_kv"),
    "negative heads": (llama("attention.head_count", I32, -4), "llama.attention.head_count"),
    "heads a float": (llama("attention.head_count", F32, 4.0), "llama.attention.head_count"),
    "heads a string": (llama("attention.head_count", STRING, "4"), "llama.attention.head_count"),
    "heads not shared evenly": (
        gguf(
            [
                ARCHITECTURE,
                pair("llama.attention.head_count", U32, 9),
                pair("llama.attention.head_count_kv", U32, 2),
            ]
        ),
        "llama.attention.head_count_kv",
    ),
    "513 layers": (llama("block_count", U32, 513), "llama.block_count"),
    "2^32-1 layers": (llama("block_count", U32, 2**32 - 1), "llama.block_count"),
    "zero layers": (llama("block_count", U32, 0), "llama.block_count"),
    "layers an array": (llama("block_count", ARRAY, array(U32, [2])), "llama.block_count"),
    "heads of two layers for three": (
        gguf(
            [
                ARCHITECTURE,
                pair("llama.block_count", U32, 3),
                pair("llama.attention.head_count", ARRAY, array(U32, [4, 4])),
            ]
        ),
        "llama.attention.head_count",
    ),
    "width zero": (llama("embedding_length", U32, 0), "llama.embedding_length"),
    "width 2^40": (llama("embedding_length", U64, 2**40), "llama.embedding_length"),
    "context true": (llama("context_length", BOOL, 1), "llama.context_length"),
    "epsilon nan": (
        llama("attention.layer_norm_rms_epsilon", F32, float("nan")),
        "llama.attention.layer_norm_rms_epsilon",
    ),
    "rope base infinite": (llama("rope.freq_base", F64, float("inf")), "llama.rope.freq_base"),
    "rope base negative": (llama("rope.freq_base", F32, -1.0), "llama.rope.freq_base"),
    "rope base a string": (llama("rope.freq_base", STRING, "1e4"), "llama.rope.freq_base"),
    "tokens numbers": (
        gguf([pair("tokenizer.ggml.tokens", ARRAY, array(U32, [1, 2]))]),
        "tokenizer.ggml.tokens",
    ),
    "tokens one string": (
        gguf([pair("tokenizer.ggml.tokens", STRING, "a")]),
        "tokenizer.ggml.tokens",
    ),
    "tokens none": (
        gguf([pair("tokenizer.ggml.tokens", ARRAY, array(STRING, []))]),
        "tokenizer.ggml.tokens",
    ),
    "scores too few": (vocabulary("scores", ARRAY, array(F32, [0, 0])), "tokenizer.ggml.scores"),
    "scores too many": (vocabulary("scores", ARRAY, array(F32, [0] * 4)), "tokenizer.ggml.scores"),
    "scores integers": (vocabulary("scores", ARRAY, array(I32, [0] * 3)), "tokenizer.ggml.scores"),
    "scores strings": (
        vocabulary("scores", ARRAY, array(STRING, ["0"] * 3)),
        "tokenizer.ggml.scores",
    ),
    "token types too few": (
        vocabulary("token_type", ARRAY, array(I32, [1])),
        "tokenizer.ggml.token_type",
    ),
    "token types floats": (
        vocabulary("token_type", ARRAY, array(F32, [1, 1, 1])),
        "tokenizer.ggml.token_type",
    ),
    "merges numbers": (vocabulary("merges", ARRAY, array(U32, [1])), "tokenizer.ggml.merges"),
    "bos past the vocabulary": (
        vocabulary("bos_token_id", U32, 3),
        "tokenizer.ggml.bos_token_id",
    ),
    "eos 2^32-1": (vocabulary("eos_token_id", U32, 2**32 - 1), "tokenizer.ggml.eos_token_id"),
    "unknown id negative": (
        vocabulary("unknown_token_id", I32, -1),
        "tokenizer.ggml.unknown_token_id",
    ),
    "eos a string": (vocabulary("eos_token_id", STRING, "1"), "tokenizer.ggml.eos_token_id"),
    "template a number": (
        gguf([pair("tokenizer.chat_template", U32, 1)]),
        "tokenizer.chat_template",
    ),
    "byte token malformed": (
        gguf(
            [
                pair("tokenizer.ggml.model", STRING, "llama"),
                pair("tokenizer.ggml.tokens", ARRAY, array(STRING, ["<0x0A>", "<0xZZ>"])),
                pair("tokenizer.ggml.token_type", ARRAY, array(I32, [6, 6])),
            ]
        ),
        "tokenizer.ggml.tokens",
    ),
    "split count a string": (gguf([pair("split.count", STRING, "2")]), "split.count"),
    "split without its name": (gguf([pair("split.count", U16, 2)]), "split.count"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_one_error(tmp_path, name):
    data, field = HOSTILE[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    with within_a_second(), pytest.raises(CheckpointError) as caught:
        read_gguf(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    assert caught.value.file == os.fspath(path)
    assert str(path) in str(caught.value)
    assert caught.value.field == field
    if field is not None:
        assert caught.value.offset is not None
        assert 0 <= caught.value.offset <= len(data)
        assert f"byte {caught.value.offset}" in str(caught.value)


def test_not_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    for path in (tmp_path, tmp_path / "missing.gguf", tmp_path / "pipe.gguf"):
        with pytest.raises(CheckpointError, match=path.name):
            read_gguf(path)


# A small whole model file, whose every header byte the next tests spoil.
WHOLE = gguf(
    [
        ARCHITECTURE,
        pair("general.alignment", U32, 32),
        pair("llama.block_count", U32, 1),
        pair("llama.attention.head_count", U32, 4),
        pair("llama.rope.freq_base", F32, 1e4),
        TOKENS,
        pair("tokenizer.ggml.scores", ARRAY, array(F32, [0, -1, -2])),
        pair("tokenizer.ggml.token_type", ARRAY, array(I32, [1, 3, 1])),
        pair("tokenizer.ggml.eos_token_id", U32, 1),
        pair("tokenizer.ggml.add_bos_token", BOOL, 1),
    ],
    [tensor("a.weight", [32, 3], Q4_0_ID, 0), tensor("b.weight", [5], F32_ID, 64)],
    bytes(range(64)) + bytes(20),
)


def read_bytes(path: Path, data: bytes) -> None:
    """Reads a file and all its tensors; anything but success or CheckpointError goes through."""
    path.write_bytes(data)
    try:
        with read_gguf(path) as file:
            for name in file.tensors:
                file.raw(name).sum()
    except CheckpointError as error:
        if error.file != os.fspath(path):
            raise


def test_every_length_of_a_cut_file(tmp_path):
    for length in range(len(WHOLE)):
        (tmp_path / "cut.gguf").write_bytes(WHOLE[:length])
        with pytest.raises(CheckpointError):
            read_gguf(tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes(WHOLE)
    with read_gguf(tmp_path / "cut.gguf") as file:
        assert file.raw("a.weight")[0, :3].tolist() == [0, 1, 2]


def test_every_byte_spoiled(tmp_path):
    for position in range(len(WHOLE) - 84):
        for value in (0x00, 0xFF, WHOLE[position] ^ 1):
            spoiled = bytearray(WHOLE)
            spoiled[position] = value
            read_bytes(tmp_path / "spoiled.gguf", bytes(spoiled))


HUGE = st.sampled_from(
    [0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
)
EDIT = st.tuples(
    st.sampled_from(["byte", "u32", "u64", "insert", "delete", "copy"]),
    st.integers(0, len(WHOLE) - 9),
    st.one_of(HUGE, st.integers(0, 255)),
)


@settings(
    max_examples=1000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(EDIT, min_size=1, max_size=4))
def test_mutated_files(tmp_path, edits):
    data = bytearray(WHOLE)
    for kind, position, value in edits:
        if kind == "byte":
            data[position : position + 1] = bytes([value & 255])
        elif kind == "u32":
            data[position : position + 4] = struct.pack("<I", value & (2**32 - 1))
        elif kind == "u64":
            data[position : position + 8] = struct.pack("<Q", value)
        elif kind == "insert":
            data[position:position] = struct.pack("<Q", value)
        elif kind == "delete":
            del data[position : position + 1 + value % 64]
        else:
            data[position:position] = data[position : position + value % 64]
    read_bytes(tmp_path / "mutated.gguf", bytes(data))


def test_golden_metadata():
    """Values that gguf-py reads from the same file."""
    with read_gguf(GOLDEN) as file:
        metadata = file.metadata
    assert len(metadata) == 27
    assert metadata["general.architecture"] == "llama"
    assert metadata["general.name"] == "Tiny Llama256"
    assert metadata["llama.block_count"] == 2
    assert metadata["llama.rope.freq_base"] == 10000.0
    assert metadata["llama.attention.layer_norm_rms_epsilon"] == np.float32(1e-6)
    assert len(metadata["tokenizer.ggml.tokens"]) == 512
    assert len(metadata["tokenizer.ggml.merges"]) == 252
    assert metadata["tokenizer.ggml.token_type"].dtype == np.int32
    assert metadata["tokenizer.ggml.token_type"].shape == (512,)
    assert metadata["tokenizer.chat_template"].startswith("{% for m in messages %}")


def test_golden_tensors():
    """Types, shapes and offsets that gguf-py reads from the same file."""
    with read_gguf(GOLDEN) as file:
        assert len(file.tensors) == 21
        kinds = [record.qtype for record in file.tensors.values()]
        assert {k: kinds.count(k) for k in kinds} == {"q6_k": 1, "f32": 5, "q4_1": 15}
        head = file.tensors["output.weight"]
        assert (head.qtype, head.shape, head.offset) == ("q6_k", (512, 256), 13440)
        assert file.raw("output.weight").shape == (512, 210)
        up = file.tensors["blk.1.ffn_up.weight"]
        assert (up.qtype, up.shape, up.offset) == ("q4_1", (512, 256), 863360)
        data = GOLDEN.read_bytes()
        assert file.raw("blk.1.ffn_up.weight").tobytes() == data[863360 : 863360 + 512 * 160]
        norm = file.array("output_norm.weight")
        np.testing.assert_array_equal(norm, np.frombuffer(data, "<f4", 256, 120960))
        assert norm.min() > 0  # as every norm that was trained from ones
        with pytest.raises(UnsupportedError, match="q6_k"):
            file.array("output.weight")
        with pytest.raises(CheckpointError, match=r"missing\.weight"):
            file.raw("missing.weight")


def test_views_are_read_only_and_outlive_the_file():
    file = read_gguf(GOLDEN)
    view = file.raw("output.weight")
    expected = view.copy()
    file.release("output.weight")
    file.close()
    np.testing.assert_array_equal(view, expected)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 0


def test_every_kind_of_value(tmp_path):
    values = {
        U8: 255, I8: -128, U16: 65535, I16: -32768, U32: 2**32 - 1, I32: -(2**31), F32: 0.5,
        BOOL: True, STRING: "жук 🦗", U64: 2**64 - 1, I64: -(2**63), F64: 0.1,
    }  # fmt: skip
    pairs = [pair(f"one.{kind}", kind, value) for kind, value in values.items()]
    pairs += [
        pair(f"two.{kind}", ARRAY, array(kind, [value] * 2)) for kind, value in values.items()
    ]
    pairs += [pair(f"none.{kind}", ARRAY, array(kind, [])) for kind in values]
    path = tmp_path / "values.gguf"
    path.write_bytes(gguf(pairs, version=2))
    metadata = read_gguf(path).metadata
    for kind, value in values.items():
        assert metadata[f"one.{kind}"] == value
        assert type(metadata[f"one.{kind}"]) is type(value)
        assert list(metadata[f"two.{kind}"]) == [value, value]
        assert len(metadata[f"none.{kind}"]) == 0


def test_every_type_of_tensor(tmp_path):
    """Each known type is readable as raw blocks."""
    infos, expected, data = [], {}, b""
    for type_id, (name, block, nbytes) in TYPES.items():
        infos.append(tensor(name, [2 * block, 3], type_id, len(data)))
        expected[name] = np.full((3, 2 * nbytes), type_id, np.uint8)
        data += expected[name].tobytes()
        data += b"\xee" * (-len(data) % 64)
    path = tmp_path / "types.gguf"
    path.write_bytes(gguf([pair("general.alignment", U32, 64)], infos, data, alignment=64))
    with read_gguf(path) as file:
        assert set(file.tensors) == set(expected)
        for name, raw in expected.items():
            assert file.tensors[name].qtype == name
            np.testing.assert_array_equal(file.raw(name), raw)


def write_split(folder: Path, *, numbers=(0, 1, 2), total=3, names=("a", "b", "c")) -> list[Path]:
    paths = []
    for position, (number, name) in enumerate(zip(numbers, names, strict=True), 1):
        pairs = [pair("split.no", U16, number), pair("split.count", U16, 3)]
        if position == 1:
            pairs += [ARCHITECTURE, pair("split.tensors.count", I32, total)]
        data = np.full(8, number, np.float32).tobytes()
        path = folder / f"m-{position:05}-of-00003.gguf"
        path.write_bytes(gguf(pairs, [tensor(name, [8], F32_ID, 0)], data))
        paths.append(path)
    return paths


@pytest.mark.parametrize("opened", [0, 2])
def test_split_files_are_joined(tmp_path, opened):
    with read_gguf(write_split(tmp_path)[opened]) as file:
        assert file.metadata["general.architecture"] == "llama"
        assert list(file.tensors) == ["a", "b", "c"]
        assert [file.array(name)[7] for name in file.tensors] == [0, 1, 2]


def test_split_files_that_do_not_fit(tmp_path):
    paths = write_split(tmp_path, numbers=(0, 2, 1))
    with pytest.raises(CheckpointError, match=r"00002-of-00003.*split\.no"):
        read_gguf(paths[0])
    write_split(tmp_path, total=4)
    with pytest.raises(CheckpointError, match=r"split\.tensors\.count.*is 4.*3 tensors"):
        read_gguf(paths[0])
    write_split(tmp_path, names=("a", "b", "a"))
    with pytest.raises(CheckpointError, match=r"00003-of-00003.*, a: tensor is also in"):
        read_gguf(paths[0])
    write_split(tmp_path)
    paths[1].unlink()
    with pytest.raises(CheckpointError, match=r"1 of 3 parts are missing.*m-00002-of-00003\.gguf"):
        read_gguf(paths[0])
