"""Which quantization methods there are: those of qjax, and those that users add.

    @qjax.register_quantization_config("my_quant")
    class MyQuant(qjax.QuantizationConfig): ...

Packages may add theirs by an entry point in the group "qjax.plugins": a module, or a function
without arguments, that registers what it brings.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar

from qjax.errors import UnsupportedError

ENTRY_POINT_GROUP = "qjax.plugins"

# Modules of `qjax.formats` that register the methods of these names when they are imported.
_MODULES = {
    "auto_round": ("auto-round", "inc", "intel"),
    "awq": ("awq", "auto_awq", "awq_marlin", "llm-awq"),
    "bitsandbytes": ("bitsandbytes",),
    "compressed_tensors": ("compressed-tensors", "compressed_tensors", "sparseml"),
    "deepspeedfp": ("deepspeedfp",),
    "experts_int8": ("experts_int8",),
    "fp8": ("fp8", "fbgemm_fp8", "deepseek_v4_fp8"),
    "gptq": ("gptq", "auto_gptq", "gptq_marlin"),
    "hqq": ("hqq",),
    "marlin": ("marlin",),
    "modelopt": ("modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed"),
    "mxfp4": ("mxfp4", "gpt_oss_mxfp4"),
    "quark": ("quark",),
    "torchao": ("torchao",),
}
_BUILTIN = {name: f"qjax.formats.{module}" for module, names in _MODULES.items() for name in names}

_registered: dict[str, type] = {}
_plugins_loaded = False
_broken: dict[str, str] = {}  # plugin -> what went wrong
Config = TypeVar("Config", bound=type)


def register_quantization_config(name: str, *aliases: str) -> Callable[[Config], Config]:
    """Class decorator: makes a `QuantizationConfig` the reader of checkpoints of this method.

    Args:
      name: the value of `quant_method` in a checkpoint's quantization config, in lower case.
      aliases: other values that mean the same.

    A class that is defined again (a cell of a notebook run twice, a module reloaded) takes its own
    place.

    Raises:
      TypeError: the class is no `QuantizationConfig`.
      ValueError: one of the names is taken.
    """
    names = [each.lower() for each in (name, *aliases)]

    def register(config: Config) -> Config:
        if not all(hasattr(config, each) for each in ("from_config", "layer", "encode")):
            raise TypeError(f"{config.__qualname__} must derive from qjax.QuantizationConfig")
        for each in names:
            owner = _BUILTIN.get(each, config.__module__)
            if owner != config.__module__ or _identity(_registered.get(each)) not in (
                None,
                _identity(config),
            ):
                raise ValueError(f"the quantization method {each!r} is taken")
        config.name = name  # type: ignore[attr-defined]
        _registered.update(dict.fromkeys(names, config))
        return config

    return register


def _identity(config: type | None) -> tuple[str, str] | None:
    return None if config is None else (config.__module__, config.__qualname__)


def quantization_config(name: str, file: str = "") -> Any:
    """The class that reads checkpoints of a method.

    Raises:
      UnsupportedError: there is none of this name.
    """
    load_plugins()
    key = name.lower()
    if key not in _registered and key in _BUILTIN:
        importlib.import_module(_BUILTIN[key])
    if key not in _registered:
        where = f"{file}: " if file else ""
        known = ", ".join(methods())
        broken = "".join(f"; the plugin {name} failed: {why}" for name, why in _broken.items())
        raise UnsupportedError(
            f"{where}quant_method {name!r:.80} is not supported; supported are {known}{broken}"
        )
    return _registered[key]


def methods() -> list[str]:
    """Every name that is known, aliases included."""
    load_plugins()
    return sorted({*_BUILTIN, *_registered})


def added() -> dict[str, type]:
    """The methods that do not come with qjax: name -> class."""
    load_plugins()
    return {name: config for name, config in _registered.items() if name not in _BUILTIN}


def load_plugins() -> None:
    """Imports what other packages bring, once a process, when a method is first looked up.

    One that fails is warned of and left out, so that it stops no model that does without it.
    """
    global _plugins_loaded
    if _plugins_loaded:
        return
    _plugins_loaded = True  # first: a plugin may ask for methods itself
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            found = point.load()
            if not isinstance(found, type) and callable(found):
                found()
        except Exception as error:
            package = "" if point.dist is None else f" of {point.dist.name}"
            name, why = f"{point.name!r}{package}", f"{type(error).__name__}: {error}"
            _broken[name] = why
            warnings.warn(
                f"the qjax plugin {name} ({point.value}) cannot be loaded and is left out: {why}",
                RuntimeWarning,
                stacklevel=2,
            )
