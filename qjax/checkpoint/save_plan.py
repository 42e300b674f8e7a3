"""What a save does to each weight: settings of the format, derived or given, and the words of the
format for the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from qjax.checkpoint import beside, detect
from qjax.checkpoint.places import Array, Places, each, leaf_of, stored_places, usual_places, walk
from qjax.checkpoint.plan import Origin
from qjax.errors import CheckpointError, UnsupportedError
from qjax.formats import gguf as gguf_format
from qjax.formats.base import (
    Dense,
    QuantizationConfig,
    is_embedding,
    is_plain,
    no_checkpoint,
)
from qjax.ops.dense import dequantized
from qjax.params import Params
from qjax.qarray import QArray
from qjax.registry import quantization_config as registered
from qjax.scheme import is_ignored

# Those whose settings are derived from the weights, by `QuantizationConfig.for_weights`.
METHODS = ("compressed-tensors", "gptq", "awq", "bitsandbytes", "fp8", "hqq")
DENSE = ("safetensors", "dense")
GGUF, ORBAX = "gguf", "orbax"
# What is saved by its name, and what it holds.
FORMATS = {
    "compressed-tensors": "integers of 2 to 8 bits, INT8, FP8, NVFP4, MXFP4 and MXFP8, inputs and "
    "cache rounded or not, mixed by layer (vLLM, transformers)",
    "gptq": "integers of 2, 3, 4 and 8 bits in groups of columns, also of reordered ones "
    "(GPTQModel, AutoGPTQ, vLLM)",
    "awq": "4-bit integers in groups of columns (AutoAWQ, GPTQModel, vLLM)",
    "bitsandbytes": "NF4, FP4, LLM.int8 (transformers, vLLM)",
    "fp8": "8-bit floats with rounded inputs, by weight or in blocks (vLLM, transformers)",
    "hqq": "integers with float zero points (HQQ)",
    "gguf": "one file in ggml's types, of which some hold integers of other formats (llama.cpp)",
    "safetensors": "dequantized: float32, bfloat16 or float16; also called dense (all)",
    "orbax": "every weight as it is held, on several devices too (qjax)",
}
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
STORED = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
Format = str | QuantizationConfig | Mapping[str, Any] | None


@dataclass(frozen=True)
class SavePlan:
    """How a model is written as safetensors.

    Attributes:
      quantization: the format with its settings.
      changed: whether it differs from what was loaded, so that config.json has to.
      adapt: a weight in the words of the format, where its settings were derived.
      dense: targets of the layers that are dequantized.
      dtype: of what is not quantized; None as it is.
    """

    params: Params
    origin: Origin
    places: Places
    quantization: QuantizationConfig
    changed: bool
    adapt: Callable[[str, QArray], QArray] | None = None
    dense: tuple[str, ...] = ()
    dtype: str | None = None

    def written(self, module: str, weight: QArray) -> QArray:
        """The weight as it is to be stored."""
        if not is_plain(weight) and is_ignored(module, self.dense, _layer_class(module)):
            values = dequantized(weight)
            return QArray.from_dense(values.astype(DTYPES[self.dtype or "float32"]))
        if is_plain(weight):
            wanted = DTYPES.get(self.dtype or "")
            values = plain_values(weight)
            return weight if wanted is None else QArray.from_dense(values.astype(wanted))
        return weight if self.adapt is None else self.adapt(module, weight)


def plan_save(
    params: Params,
    origin: Origin,
    format: Format,
    dtype: str | None,
    dense: tuple[str, ...],
    lossy: bool,
) -> SavePlan:
    """How a model is to be written as safetensors; arguments and errors are those of `save`."""
    stored = {} if origin.folder is None else stored_places(origin, params.config)
    expected = usual_places(params.config) if params.config.mla is None or not stored else stored
    # Scales of the cache may be new.
    places = {name: stored.get(name, place) for name, place in expected.items()}
    if not isinstance(format, str):
        job = _as_told(params, origin, places, format)
        if dense or dtype:
            raise UnsupportedError("dense and dtype go with a format that is given by its name")
        return job
    job = SavePlan(params, origin, places, Dense(), True, dense=dense, dtype=dtype)
    if format in DENSE:  # a cache that is rounded has no place in such a checkpoint
        kept = {n: p for n, p in places.items() if not n.endswith((".k_scale", ".v_scale"))}
        return replace(job, dense=("re:.*",), places=kept)
    method = registered(format)
    model_dtype = dtype or beside.model_dtype(origin)
    job = replace(job, adapt=partial(_adapted, method, lossy, model_dtype))
    weights: dict[str, QArray] = {}
    for place, value in walk(params, places):
        if not isinstance(place, Array):
            for module, weight in each(place, value):
                weights[module.name] = _outline(job.written(module.name, weight))
    for target in dense:
        if not any(is_ignored(name, (target,), _layer_class(name)) for name in weights):
            raise UnsupportedError(f"dense: {target!r:.80} names no layer of this model")
    return replace(job, quantization=method.for_weights(weights, params.config.kv_scales))


def _as_told(params: Params, origin: Origin, places: Places, wanted: Any) -> SavePlan:
    """The format that was loaded, or one whose settings are given."""
    if wanted is None:
        # Quantized while it was loaded: the checkpoint itself knows nothing of it.
        quantized = type(origin.quantization) is not Dense
        if not quantized and (found := _first_quantized(params, places)):
            raise UnsupportedError(
                f"{found}: was loaded from full-precision weights, but is quantized now: name a "
                f"format; these are: {', '.join(FORMATS)}"
            )
        online = quantized and detect.find(Path(str(origin.folder)), origin.fields)[0] is None
        return SavePlan(params, origin, places, origin.quantization, changed=online)
    if isinstance(wanted, Mapping):
        method = wanted.get("quant_method")
        if not isinstance(method, str):
            raise CheckpointError("names no quant_method", field="quantization_config")
        wanted = registered(method).from_config(wanted, no_checkpoint())
    return SavePlan(params, origin, places, wanted, changed=True)


def _first_quantized(params: Params, places: Places) -> str | None:
    """The name of a weight that is not plain, if there is one."""
    leaves = ((name, leaf_of(params, name)) for name in places)
    return next((n for n, leaf in leaves if isinstance(leaf, QArray) and not is_plain(leaf)), None)


def _adapted(
    method: type[QuantizationConfig], lossy: bool, dtype: str, module: str, weight: QArray
) -> QArray:
    """A weight in the words of a format.

    Raises:
      UnsupportedError: it has none; those that have are named.
    """
    try:
        found = method.adapted(module, weight, lossy, dtype)
        method.for_weights({module: _outline(found)})
    except UnsupportedError as error:
        holding = [name for name in METHODS if _holds(registered(name), module, weight, dtype)]
        others = ", ".join([*holding, *_as_gguf(module, weight), "safetensors (dequantized)"])
        raise UnsupportedError(
            f"{error} (this weight could be saved as: {others}; or with its layer left dense: "
            f"dense=[{module!r}])"
        ) from error
    return found


def _holds(method: type[QuantizationConfig], module: str, weight: QArray, dtype: str) -> bool:
    try:
        method.for_weights({module: _outline(method.adapted(module, weight, False, dtype))})
    except UnsupportedError:
        return False
    return True


def _as_gguf(module: str, weight: QArray) -> list[str]:
    try:
        gguf_format.stored(module, weight)
    except UnsupportedError:
        return []
    return [GGUF]


def _outline(weight: QArray) -> QArray:
    """The weight without its larger arrays, of which shapes and dtypes are left."""

    def outline(array: Any) -> Any:
        small = array.nbytes <= 1024
        return array if small else jax.ShapeDtypeStruct(array.shape, array.dtype)

    return jax.tree.map(outline, weight)


def _layer_class(module: str) -> str:
    return "Embedding" if is_embedding(module) else "Linear"


def plain_values(weight: QArray) -> np.ndarray:
    values = np.ascontiguousarray(weight.qvalue).view(DTYPES[STORED[weight.qtype]])
    return values.reshape(*weight.qvalue.shape[:-1], weight.shape[1])
