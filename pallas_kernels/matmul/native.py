"""Native CPU kernels of the quantized matrix product: not built."""

from __future__ import annotations

from typing import Any


def matmul(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("native kernels are not built")


def prepare(spec: Any, qvalue: Any) -> None:
    return None


def unprepare(spec: Any, qvalue: Any) -> Any:
    raise NotImplementedError("native kernels are not built")
