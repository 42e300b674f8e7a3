"""qjax: quantized language models in JAX.

    import qjax

    params = qjax.load("smollm2-135m")
    print(qjax.generate(params, "The capital of France is"))

`import qjax` alone imports nothing else: each name below is looked up when it is first used.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qjax.api import generate, load, sampling_defaults
    from qjax.engine.engine import Engine
    from qjax.engine.request import GenerationResult
    from qjax.engine.sampling_params import SamplingParams
    from qjax.errors import (
        CheckpointError,
        DownloadError,
        QjaxError,
        RequestError,
        UnsupportedError,
    )
    from qjax.forward import forward
    from qjax.params import Params
    from qjax.qarray import QArray

__version__ = "0.1.0"

_HOMES = {
    "CheckpointError": "qjax.errors",
    "DownloadError": "qjax.errors",
    "Engine": "qjax.engine.engine",
    "GenerationResult": "qjax.engine.request",
    "Params": "qjax.params",
    "QArray": "qjax.qarray",
    "QjaxError": "qjax.errors",
    "RequestError": "qjax.errors",
    "SamplingParams": "qjax.engine.sampling_params",
    "UnsupportedError": "qjax.errors",
    "forward": "qjax.forward",
    "generate": "qjax.api",
    "load": "qjax.api",
    "sampling_defaults": "qjax.api",
}

__all__ = [
    "CheckpointError",
    "DownloadError",
    "Engine",
    "GenerationResult",
    "Params",
    "QArray",
    "QjaxError",
    "RequestError",
    "SamplingParams",
    "UnsupportedError",
    "forward",
    "generate",
    "load",
    "sampling_defaults",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qjax' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


class _Package(ModuleType):
    """Keeps `qjax.forward` the function: importing the module of that name would put it there."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
