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
    from pallas_kernels.inputs import ActSpec
    from qjax.api import generate, load, sampling_defaults, save
    from qjax.compress.oneshot import oneshot
    from qjax.engine.engine import Engine
    from qjax.engine.request import GenerationResult
    from qjax.engine.sampling_params import SamplingParams
    from qjax.errors import (
        CalibrationError,
        CheckpointError,
        DistributedError,
        DownloadError,
        EngineError,
        QjaxError,
        RecipeError,
        RequestError,
        ShardingError,
        UnsupportedError,
    )
    from qjax.formats.base import (
        Checkpoint,
        Keys,
        Layer,
        QuantizationConfig,
        expect,
        fault,
    )
    from qjax.forward import forward
    from qjax.key_bases import key_bases
    from qjax.llm import LLM
    from qjax.params import Params
    from qjax.qarray import QArray
    from qjax.recommend import recommend
    from qjax.registry import register_quantization_config
    from qjax.report import report
    from qjax.scheme import QuantizationArgs, QuantizationScheme
    from qjax.sharding import make_mesh

__version__ = "0.1.0"

_HOMES = {
    "LLM": "qjax.llm",
    "ActSpec": "pallas_kernels.inputs",
    "CalibrationError": "qjax.errors",
    "Checkpoint": "qjax.formats.base",
    "CheckpointError": "qjax.errors",
    "DistributedError": "qjax.errors",
    "DownloadError": "qjax.errors",
    "Engine": "qjax.engine.engine",
    "EngineError": "qjax.errors",
    "GenerationResult": "qjax.engine.request",
    "Keys": "qjax.formats.base",
    "Layer": "qjax.formats.base",
    "Params": "qjax.params",
    "QArray": "qjax.qarray",
    "QjaxError": "qjax.errors",
    "QuantizationArgs": "qjax.scheme",
    "QuantizationConfig": "qjax.formats.base",
    "QuantizationScheme": "qjax.scheme",
    "RecipeError": "qjax.errors",
    "RequestError": "qjax.errors",
    "SamplingParams": "qjax.engine.sampling_params",
    "ShardingError": "qjax.errors",
    "UnsupportedError": "qjax.errors",
    "expect": "qjax.formats.base",
    "fault": "qjax.formats.base",
    "forward": "qjax.forward",
    "generate": "qjax.api",
    "key_bases": "qjax.key_bases",
    "load": "qjax.api",
    "make_mesh": "qjax.sharding",
    "oneshot": "qjax.compress.oneshot",
    "recommend": "qjax.recommend",
    "register_quantization_config": "qjax.registry",
    "report": "qjax.report",
    "sampling_defaults": "qjax.api",
    "save": "qjax.api",
}

__all__ = [
    "LLM",
    "ActSpec",
    "CalibrationError",
    "Checkpoint",
    "CheckpointError",
    "DistributedError",
    "DownloadError",
    "Engine",
    "EngineError",
    "GenerationResult",
    "Keys",
    "Layer",
    "Params",
    "QArray",
    "QjaxError",
    "QuantizationArgs",
    "QuantizationConfig",
    "QuantizationScheme",
    "RecipeError",
    "RequestError",
    "SamplingParams",
    "ShardingError",
    "UnsupportedError",
    "expect",
    "fault",
    "forward",
    "generate",
    "key_bases",
    "load",
    "make_mesh",
    "oneshot",
    "recommend",
    "register_quantization_config",
    "report",
    "sampling_defaults",
    "save",
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

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by name, as cloudpickle (in Ray, Dask ...) does with modules of the plain class:
        it meets this one as a global of functions that it sends elsewhere."""
        return import_module, (self.__name__,)


sys.modules[__name__].__class__ = _Package
