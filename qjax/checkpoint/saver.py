"""`save`: a model becomes a folder that `load`, and other tools of the field, can read.

Each weight goes back to its canonical layout and through the format's `encode`, under the names
that the checkpoint had: joined layers are joined again, stacked experts are taken apart. Only one
weight is held at a time. What was written is planned once more, from its headers, before it is put
in place.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from qjax import ops
from qjax.checkpoint import detect, joined, names, plan
from qjax.checkpoint.mapped import TensorFiles
from qjax.checkpoint.opened import open_folder
from qjax.checkpoint.safetensors_io import open_safetensors
from qjax.checkpoint.safetensors_writer import SHARD_BYTES, SafetensorsWriter
from qjax.errors import CheckpointError, UnsupportedError
from qjax.formats.base import PLAIN, Checkpoint, Dense, QuantizationConfig
from qjax.models.config import ModelConfig
from qjax.params import Params
from qjax.qarray import QArray
from qjax.registry import quantization_config as registered

# Beside the weights: what a tokenizer or a processor is read from, and the terms of use.
_COPIED = (
    *("generation_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template*", "*.model", "*.tiktoken"),
    *("preprocessor_config.json", "processor_config.json", "LICENSE*", "NOTICE*"),
)
_CONFIGS = ("quantization_config", "compression_config")
_DTYPES = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class _Target:
    """What is written: the format, and how it differs from what was loaded."""

    quantization: QuantizationConfig
    changed: bool


def save(
    params: Params,
    folder: str | os.PathLike[str],
    quantization_config: QuantizationConfig | Mapping[str, Any] | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes a model as safetensors with config.json and its tokenizer.

    Args:
      params: from `load`; its source must still be there (the tokenizer is copied from it).
      folder: where to; must not exist, or be empty. It appears when all is written, or not at all.
      quantization_config: another format for the weights, as an object or as the dict of a
        config.json; None keeps the one that they were loaded in.
      shard_bytes: a file of weights is ended before it grows beyond this.

    Returns:
      The folder.

    Raises:
      CheckpointError: the folder holds something, or the source has gone.
      UnsupportedError: the format cannot hold a weight, or is not written; or the model was loaded
        from a GGUF file, or without what its method does to activations.
    """
    folder = Path(folder)
    origin = params.host.origin
    _check(params, folder)
    target = _target(origin, quantization_config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.absolute().parent / f".{folder.name}.{secrets.token_hex(4)}.part"
    work.mkdir()
    try:
        _write(params, origin, target, work, shard_bytes)
        _check_readable(params, work)
        os.replace(work, folder)  # an empty folder of this name gives way
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return folder


def _check(params: Params, folder: Path) -> None:
    origin = params.host.origin
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError("exists and is not an empty folder: nothing written", file=folder)
    if origin is None or origin.folder is None:
        where = params.source or "a model made in memory"
        raise UnsupportedError(
            f"{where}: only models that were loaded from a folder with config.json and safetensors "
            "can be saved"
        )
    if not origin.folder.is_dir():
        raise CheckpointError(
            "has gone: config and tokenizer are copied from where the model was loaded",
            file=origin.folder,
        )
    if not origin.quantize_activations and type(origin.quantization) is not Dense:
        raise UnsupportedError(
            f"{params.source}: was loaded with quantize_activations=False, so what its method does "
            "to activations would be lost; load it again to save it"
        )


def _target(origin: plan.Origin, wanted: Any) -> _Target:
    if wanted is None:
        found, _ = detect.find(Path(str(origin.folder)), origin.fields)
        # Quantized while it was loaded: the checkpoint itself knows nothing of it.
        online = found is None and type(origin.quantization) is not Dense
        return _Target(origin.quantization, changed=online)
    if isinstance(wanted, Mapping):
        method = wanted.get("quant_method")
        if not isinstance(method, str):
            raise CheckpointError("names no quant_method", field="quantization_config")
        checkpoint = Checkpoint("quantization_config", {}, {}, _read_nothing)
        wanted = registered(method).from_config(wanted, checkpoint)
    return _Target(wanted, changed=True)


def _read_nothing(name: str) -> np.ndarray:
    raise UnsupportedError(f"quantization_config: {name} cannot be read before it is written")


def _write(
    params: Params, origin: plan.Origin, target: _Target, work: Path, shard_bytes: int
) -> None:
    source = Path(str(origin.folder))
    _write_configs(origin, target, source, work)
    with _open(source) as files:
        texts = {} if target.changed else files.metadata
        kept = {key: text for key, text in texts.items() if isinstance(text, str)}
        writer = SafetensorsWriter(work, {"format": "pt"} | kept, shard_bytes)
        try:
            for name, array in _tensors(params, origin, target, files):
                writer.add(name, array)
            for name in sorted(origin.ignored):
                writer.add(name, files.array(name))
            writer.close()
        finally:
            writer.abandon()


def _open(source: Path) -> TensorFiles:
    if any(source.glob("*.safetensors")):
        return open_safetensors(source)
    from qjax.checkpoint.unpickle import open_pickled

    return open_pickled(source)


def _write_configs(origin: plan.Origin, target: _Target, source: Path, work: Path) -> None:
    for file in sorted({file for pattern in _COPIED for file in source.glob(pattern)}):
        if file.is_file():
            shutil.copyfile(file, work / file.name)
    if not target.changed:
        for name in ("config.json", *detect.SIDE_FILES):
            if (source / name).is_file():
                shutil.copyfile(source / name, work / name)
        return
    fields = {key: value for key, value in origin.fields.items() if key not in _CONFIGS}
    if isinstance(text := fields.get("text_config"), Mapping):
        fields["text_config"] = {k: v for k, v in text.items() if k not in _CONFIGS}
    if type(target.quantization) is not Dense:
        config = target.quantization.to_config()
        fields["quantization_config"] = {"quant_method": target.quantization.name} | config
    detect.write_json(work / "config.json", fields)


def _tensors(
    params: Params, origin: plan.Origin, target: _Target, files: TensorFiles
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the model by the name it is stored under."""
    parts: dict[str, list[tuple[int, Any]]] = {}  # of joined layers, with their first rows
    for name, place in origin.plan.items():
        leaf = _leaf(params, name)
        value: Any
        if isinstance(place, plan.Vector):
            value, stored, whole = _vector(name, leaf, place, origin), place.record.name, place
            rows, total = place.rows, math.prod(place.record.shape[-1:])
            join: Callable[[list[Any], bool], Any] = partial(joined.arrays, axis=-1)
        else:
            whole, rows = place, place.pieces[0].rows
            stored, total = place.pieces[0].module, place.pieces[0].shape[-2]
            value = ops.unprepare(jax.tree.map(np.asarray, leaf))
            join = partial(joined.weights, stored)
        if rows is not None:
            waiting = parts.setdefault(stored, [])
            waiting.append((rows.start, value))
            axis = -1 if isinstance(place, plan.Vector) else -2
            if sum(value.shape[axis] for _, value in waiting) < total:
                continue
            ordered = sorted(parts.pop(stored), key=lambda part: part[0])
            value = join([part for _, part in ordered], rows.step is not None)
        if isinstance(whole, plan.Vector):
            yield stored, value
            continue
        for index, piece in enumerate(whole.pieces):
            one = value if len(whole.pieces) == 1 else jax.tree.map(lambda a, i=index: a[i], value)
            written = _encode(piece, one, target.quantization, params.config)
            for suffix, array in written.items():
                yield _stored_name(piece, suffix), array
            # What is not needed here, other engines may read.
            for suffix in () if target.changed else piece.layer.ignores:
                if suffix in piece.stored and suffix not in written:
                    name = piece.stored[suffix].name
                    yield name, files.array(name)


def _leaf(params: Params, name: str) -> Any:
    node = params.tree
    for key in name.split("."):
        node = node[key]
    return node


def _vector(name: str, leaf: Any, place: plan.Vector, origin: plan.Origin) -> np.ndarray:
    values = np.asarray(leaf, np.float32)
    if not name.endswith(".bias"):
        values = values - np.float32(origin.norm_offset)
    values = values.astype(_DTYPES[place.record.qtype])
    return values if place.rows is not None else values.reshape(place.record.shape)


def _encode(
    piece: plan.Piece, weight: QArray, quantization: QuantizationConfig, config: ModelConfig
) -> dict[str, np.ndarray]:
    if weight.qtype in PLAIN and weight.act is None and not weight.aux:
        values = np.ascontiguousarray(weight.qvalue).view(_DTYPES[weight.qtype])
        values = values.reshape(*weight.qvalue.shape[:-1], weight.shape[1])
        if names.are_gpt_oss_experts(piece.module, config):
            values = values.swapaxes(-1, -2)
        return {"weight": values}
    return quantization.encode(piece.module, weight)


def _stored_name(piece: plan.Piece, suffix: str) -> str:
    """The name that a tensor had, or would have had beside those of its layer."""
    if suffix in piece.stored:
        return piece.stored[suffix].name
    for known, record in piece.stored.items():
        if record.name.endswith("." + known):
            return f"{record.name.removesuffix(known)}{suffix}"
    return f"{piece.module}.{suffix}"


def _check_readable(params: Params, work: Path) -> None:
    """Plans what was written: no files are left that their own format would refuse."""
    origin = params.host.origin
    opened = open_folder(work, None, origin.quantize_activations, pickled=False)
    with closing(opened.files):
        opened.places()
