"""Writes GGUF bytes for tests, right or wrong in any place, straight from the specification."""

import struct

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_FORMATS = "BbHhIif?"


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def scalar(kind: int, value) -> bytes:
    if kind == STRING:
        return string(value)
    return struct.pack("<" + {U64: "Q", I64: "q", F64: "d"}.get(kind, _FORMATS[kind % 8]), value)


def array(kind: int, values, count: int | None = None) -> bytes:
    count = len(values) if count is None else count
    return struct.pack("<IQ", kind, count) + b"".join(scalar(kind, v) for v in values)


def pair(key: str | bytes, kind: int, value) -> bytes:
    """One metadata entry; `value` is a number, a text, or bytes that are taken as they are."""
    data = value if isinstance(value, bytes) else scalar(kind, value)
    return string(key) + struct.pack("<I", kind) + data


def tensor(name, dims, type_id: int, offset: int, rank: int | None = None) -> bytes:
    head = string(name) + struct.pack("<I", len(dims) if rank is None else rank)
    return head + b"".join(struct.pack("<Q", d) for d in dims) + struct.pack("<IQ", type_id, offset)


def gguf(
    pairs=(),
    tensors=(),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensor_count: int | None = None,
    kv_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    tensor_count = len(tensors) if tensor_count is None else tensor_count
    kv_count = len(pairs) if kv_count is None else kv_count
    head = magic + struct.pack("<IQQ", version, tensor_count, kv_count)
    head += b"".join(pairs) + b"".join(tensors)
    return head + b"\0" * (-len(head) % alignment) + data
