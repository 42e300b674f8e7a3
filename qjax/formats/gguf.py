"""GGUF: every tensor is blocks of a ggml type, scales included (or plain floats)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qjax.errors import UnsupportedError
from qjax.formats.base import Arrays, Layer, QuantizationConfig, Stored, expect
from qjax.qarray import QArray
from qjax.qtypes import QTYPES


class GGUF(QuantizationConfig):
    """Weights of a GGUF file, kept as its blocks."""

    name = "gguf"

    def layer(self, module: str, stored: Stored, shape: tuple[int, ...]) -> Layer:
        record = expect(module, stored, "weight")
        supported = [t.name for t in QTYPES.values() if t.ggml_id is not None]
        if record.qtype not in supported:
            raise UnsupportedError(
                f"{record.file}, {record.name}: type {record.qtype} is not supported here; "
                f"supported are {', '.join(supported)}"
            )
        expect(module, stored, "weight", record.qtype, shape)
        return Layer(("weight",), _blocks(record.qtype, shape))


def _blocks(qtype: str, shape: tuple[int, ...]) -> Callable[[Arrays], QArray]:
    def decode(arrays: Arrays) -> QArray:
        raw = np.ascontiguousarray(arrays["weight"]).view(np.uint8)
        return QArray(raw, qtype, (shape[-2], shape[-1]))

    return decode
