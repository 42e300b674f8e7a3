"""`save`: a model becomes a folder that `load`, and other tools of the field, can read.

Each weight goes back to its canonical layout and through the format's `encode`. Only one weight is
held at a time: where the format's settings are to be derived from the weights, these are walked
twice. What was written is planned once more, from its headers, before it is put in place.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from qjax.checkpoint import beside, detect, gguf_writer
from qjax.checkpoint.mapped import TensorFiles
from qjax.checkpoint.opened import open_folder
from qjax.checkpoint.places import (
    Array,
    Module,
    Places,
    each,
    leaf_of,
    stored_places,
    usual_places,
    walk,
)
from qjax.checkpoint.plan import Origin
from qjax.checkpoint.safetensors_io import open_safetensors
from qjax.checkpoint.safetensors_writer import SHARD_BYTES, SafetensorsWriter
from qjax.errors import CheckpointError, UnsupportedError
from qjax.formats import exact, gguf, kv_scales
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
GGUF = "gguf"
METHODS = ("compressed-tensors", "gptq", "awq", "bitsandbytes", "fp8", "hqq")
DENSE = ("safetensors", "dense")
FORMATS = (*METHODS, *DENSE, GGUF)
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_STORED = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
Format = str | QuantizationConfig | Mapping[str, Any] | None


@dataclass
class Saved:
    """What was written.

    Attributes:
      folder: where.
      method: by its name, as in `quant_method`.
      exact: how many weights (layers and arrays) mean the same numbers as before.
      rounded: for every other, the largest relative change of one of its numbers.
      weights, nbytes: numbers of the model, and bytes that they take.
    """

    folder: Path
    method: str
    exact: int = 0
    rounded: dict[str, float] = field(default_factory=dict)
    weights: int = 0
    nbytes: int = 0

    def note(self, name: str, change: float, count: int) -> None:
        self.weights += count
        if change:
            self.rounded[name] = change
        else:
            self.exact += 1

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights


@dataclass(frozen=True)
class _Job:
    """How a model is written.

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
            values = _plain_values(weight)
            return weight if wanted is None else QArray.from_dense(values.astype(wanted))
        return weight if self.adapt is None else self.adapt(module, weight)


def save(
    params: Params,
    folder: str | os.PathLike[str],
    format: Format = None,
    *,
    dtype: str | None = None,
    dense: Sequence[str] = (),
    lossy: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Saved:
    """Writes a model as safetensors with config.json and its tokenizer.

    Args:
      params: from `load`, or with other weights in its tree; its source must still be there (the
        tokenizer is copied from it).
      folder: where to; must not exist, or be empty. It appears when all is written, or not at all.
      format: one of `FORMATS`, whose settings are then derived from the weights; or settings, as
        an object or as the dict of a config.json; None keeps the format that was loaded.
        "safetensors" (or "dense") dequantizes every weight. "gguf" writes one file, in the types
        that hold the same numbers.
      dtype: "float32", "bfloat16" or "float16": of what is not quantized. None keeps that, with
        float32 for what is dequantized.
      dense: layers to be dequantized: names, "re:" and a pattern, or a class ("Embedding"); each
        has to name one.
      lossy: whether numbers may be rounded to what the format holds (its scales, say).
      shard_bytes: a file of weights is ended before it grows beyond this.

    Raises:
      CheckpointError: the folder holds something, or the source has gone.
      UnsupportedError: the format cannot hold a weight, or is not written; or the model was loaded
        without what its method does to activations.
    """
    folder = Path(folder)
    origin = params.host.origin
    _check(params, folder, format, dtype)
    if format == GGUF or (format is None and origin.folder is None):
        return _save_gguf(params, folder, dtype, dense)
    job = _job(params, origin, format, dtype, tuple(dense), lossy)
    saved = Saved(folder, job.quantization.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.absolute().parent / f".{folder.name}.{secrets.token_hex(4)}.part"
    work.mkdir()
    try:
        _write(job, work, shard_bytes, saved, compare=lossy)
        _check_readable(params, work)
        os.replace(work, folder)  # an empty folder of this name gives way
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return saved


def _save_gguf(params: Params, file: Path, dtype: str | None, dense: Sequence[str]) -> Saved:
    if file.suffix != ".gguf":
        raise UnsupportedError(f"{file}: GGUF is one file, whose name has to end in .gguf")
    if dtype is not None or dense:
        raise UnsupportedError("GGUF: dtype and dense go with formats that are folders")
    gguf_writer.write(params, file)
    total = params.summary().total
    return Saved(file, GGUF, total.tensors, weights=total.weights, nbytes=file.stat().st_size)


def _check(params: Params, folder: Path, format: Format, dtype: str | None) -> None:
    origin = params.host.origin
    if isinstance(format, str) and format not in FORMATS:
        raise UnsupportedError(
            f"format {format!r:.80} is not one that is saved by name; these are: "
            f"{', '.join(FORMATS)}"
        )
    if dtype is not None and dtype not in DTYPES:
        raise UnsupportedError(f"dtype {dtype!r:.80} is not supported; {', '.join(DTYPES)} are")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError("exists and is not an empty folder: nothing written", file=folder)
    if origin is None:
        where = params.source or "a model made in memory"
        raise UnsupportedError(
            f"{where}: only models that were loaded from files can be saved, since config and "
            "tokenizer are taken from there"
        )
    source = origin.folder or origin.file
    if not source.exists():
        raise CheckpointError(
            "has gone: config and tokenizer are taken from where the model was loaded", file=source
        )
    if not origin.quantize_activations and type(origin.quantization) is not Dense:
        raise UnsupportedError(
            f"{params.source}: was loaded with quantize_activations=False, so what its method does "
            "to activations would be lost; load it again to save it"
        )


def _job(
    params: Params,
    origin: Origin,
    format: Format,
    dtype: str | None,
    dense: tuple[str, ...],
    lossy: bool,
) -> _Job:
    stored = {} if origin.folder is None else stored_places(origin, params.config)
    expected = usual_places(params.config) if params.config.mla is None or not stored else stored
    # Scales of the cache may be new.
    places = {name: stored.get(name, place) for name, place in expected.items()}
    if not isinstance(format, str):
        job = _as_told(params, origin, places, format)
        if dense or dtype:
            raise UnsupportedError("dense and dtype go with a format that is given by its name")
        return job
    job = _Job(params, origin, places, Dense(), True, dense=dense, dtype=dtype)
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


def _as_told(params: Params, origin: Origin, places: Places, wanted: Any) -> _Job:
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
        return _Job(params, origin, places, origin.quantization, changed=online)
    if isinstance(wanted, Mapping):
        method = wanted.get("quant_method")
        if not isinstance(method, str):
            raise CheckpointError("names no quant_method", field="quantization_config")
        wanted = registered(method).from_config(wanted, no_checkpoint())
    return _Job(params, origin, places, wanted, changed=True)


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
        gguf.stored(module, weight)
    except UnsupportedError:
        return []
    return [GGUF]


def _outline(weight: QArray) -> QArray:
    """The weight without its larger arrays, of which shapes and dtypes are left."""

    def outline(array: Any) -> Any:
        small = array.nbytes <= 1024
        return array if small else jax.ShapeDtypeStruct(array.shape, array.dtype)

    return jax.tree.map(outline, weight)


def _write(job: _Job, work: Path, shard_bytes: int, saved: Saved, *, compare: bool) -> None:
    origin = job.origin
    quantization = None
    if job.changed and type(job.quantization) is not Dense:
        quantization = {"quant_method": job.quantization.name} | job.quantization.to_config()
    dtype = job.dtype
    if dtype is None and job.dense == ("re:.*",):
        dtype = "float32"
    beside.write(origin, work, job.changed, quantization, dtype)
    with closing(_open(origin)) as files:
        texts = {} if job.changed or origin.folder is None else files.metadata
        kept = {key: text for key, text in texts.items() if isinstance(text, str)}
        writer = SafetensorsWriter(work, {"format": "pt"} | kept, shard_bytes)
        try:
            for name, array in _tensors(job, files, saved, compare):
                writer.add(name, array)
                saved.nbytes += array.nbytes
            for name in sorted(origin.ignored):
                if origin.folder is not None and not (job.changed and kv_scales.is_other(name)):
                    writer.add(name, files.array(name))
            writer.close()
        finally:
            writer.abandon()


def _open(origin: Origin) -> TensorFiles:
    if origin.folder is None:
        from qjax.checkpoint.gguf_io import read_gguf

        return read_gguf(Path(str(origin.file)))
    if any(origin.folder.glob("*.safetensors")):
        return open_safetensors(origin.folder)
    from qjax.checkpoint.unpickle import open_pickled

    return open_pickled(origin.folder)


def _tensors(
    job: _Job, files: TensorFiles, saved: Saved, compare: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the model by the name it is stored under."""
    config = job.params.config
    # Gemma's files hold its norms less one.
    offset = job.origin.norm_offset if job.origin.folder is not None else config.post_norms
    for place, value in walk(job.params, job.places):
        if isinstance(place, Array):
            array = _array(place, value, np.float32(offset), job.dtype)
            saved.note(place.tensor, 0.0, array.size)
            yield place.tensor, array
            continue
        for module, weight in each(place, value):
            stored = job.written(module.name, weight)
            change = _change(weight, stored) if compare or is_plain(stored) else 0.0
            saved.note(module.name, change, weight.shape[0] * weight.shape[1])
            written = _encode(module, stored, job.quantization)
            for suffix, array in written.items():
                yield module.tensor(suffix), array
            # What is not needed here, other engines may read.
            for suffix in () if job.changed else module.unread:
                if suffix in module.tensors and suffix not in written:
                    name = module.tensors[suffix]
                    yield name, files.array(name)


def _array(place: Array, values: np.ndarray, offset: np.float32, dtype: str | None) -> np.ndarray:
    values = values.astype(np.float32)
    last = place.tensor.rpartition(".")[2]
    if last in ("k_scale", "v_scale"):
        return values.reshape(place.shape).astype(DTYPES[_STORED[place.qtype]])
    if last not in ("bias", "sinks") and offset:
        values = values - offset
    return values.reshape(place.shape).astype(DTYPES[dtype or _STORED[place.qtype]])


def _change(before: QArray, after: QArray) -> float:
    """The largest relative change of a number of a weight by being stored otherwise."""
    if after is before:
        return 0.0
    return exact.relative_change(dequantized(before), dequantized(after))


def _encode(
    module: Module, weight: QArray, quantization: QuantizationConfig
) -> dict[str, np.ndarray]:
    if not is_plain(weight):
        return quantization.encode(module.name, weight)
    values = _plain_values(weight)
    return {"weight": values.swapaxes(-1, -2) if module.transposed else values}


def _plain_values(weight: QArray) -> np.ndarray:
    values = np.ascontiguousarray(weight.qvalue).view(DTYPES[_STORED[weight.qtype]])
    return values.reshape(*weight.qvalue.shape[:-1], weight.shape[1])


def _layer_class(module: str) -> str:
    return "Embedding" if is_embedding(module) else "Linear"


def _check_readable(params: Params, work: Path) -> None:
    """Plans what was written: no files are left that their own format would refuse."""
    origin = params.host.origin
    opened = open_folder(work, None, origin.quantize_activations, pickled=False)
    with closing(opened.files):
        opened.places()
