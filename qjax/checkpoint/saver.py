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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from qjax import ops
from qjax.checkpoint import detect, plan
from qjax.checkpoint.mapped import TensorFiles
from qjax.checkpoint.opened import open_folder
from qjax.checkpoint.safetensors_io import open_safetensors
from qjax.checkpoint.safetensors_writer import SHARD_BYTES, SafetensorsWriter
from qjax.errors import CheckpointError, UnsupportedError
from qjax.formats.base import PLAIN, Checkpoint, Dense, QuantizationConfig
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
    if origin.fields.get("model_type") == "gpt_oss":
        raise UnsupportedError(f"{params.source}: gpt-oss models cannot be saved yet")
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
            for name, array in _tensors(params, origin, target):
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
    params: Params, origin: plan.Origin, target: _Target
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the model by the name it is stored under."""
    parts: dict[str, list[tuple[int, Any]]] = {}  # of joined layers, with their first rows
    for name, place in origin.plan.items():
        leaf = _leaf(params, name)
        value: Any
        if isinstance(place, plan.Vector):
            value, stored, whole = _vector(name, leaf, place, origin), place.record.name, place
            rows, total = place.rows, math.prod(place.record.shape)
            join: Callable[[list[Any]], Any] = np.concatenate
        else:
            whole, rows = place, place.pieces[0].rows
            stored, total = place.pieces[0].module, place.pieces[0].shape[-2]
            value = ops.unprepare(jax.tree.map(np.asarray, leaf))
            join = partial(join_rows, stored)
        if rows is not None:
            waiting = parts.setdefault(stored, [])
            waiting.append((rows.start, value))
            if sum(value.shape[0] for _, value in waiting) < total:
                continue
            value = join([part for _, part in sorted(parts.pop(stored), key=lambda part: part[0])])
        if isinstance(whole, plan.Vector):
            yield stored, value
            continue
        for index, piece in enumerate(whole.pieces):
            one = value if len(whole.pieces) == 1 else jax.tree.map(lambda a, i=index: a[i], value)
            for suffix, array in _encode(piece, one, target.quantization).items():
                yield _stored_name(piece, suffix), array


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
    piece: plan.Piece, weight: QArray, quantization: QuantizationConfig
) -> dict[str, np.ndarray]:
    if weight.qtype in PLAIN and weight.act is None and not weight.aux:
        values = np.ascontiguousarray(weight.qvalue).view(_DTYPES[weight.qtype])
        return {"weight": values.reshape(*weight.qvalue.shape[:-1], weight.shape[1])}
    return quantization.encode(piece.module, weight)


def _stored_name(piece: plan.Piece, suffix: str) -> str:
    """The name that a tensor had, or would have had beside those of its layer."""
    if suffix in piece.stored:
        return piece.stored[suffix].name
    for known, record in piece.stored.items():
        if record.name.endswith("." + known):
            return f"{record.name.removesuffix(known)}{suffix}"
    return f"{piece.module}.{suffix}"


def join_rows(module: str, weights: list[QArray]) -> QArray:
    """Weights on the host that were rows of one, put together again.

    Raises:
      UnsupportedError: they no longer share what belongs to the whole.
    """
    first = weights[0]
    n = sum(weight.shape[0] for weight in weights)
    single = [w for w in weights if w.scale is not None and w.scale.shape[-2] == 1]
    shared = len(single) == len(weights)

    def same(arrays: list[Any]) -> Any:
        if any(a.tobytes() != arrays[0].tobytes() for a in arrays):
            raise UnsupportedError(f"{module}: its parts differ in what they have in common")
        return arrays[0]

    def rows(arrays: list[Any]) -> Any:
        if arrays[0] is None:
            return None
        return same(arrays) if shared else np.concatenate(arrays, axis=-2)

    alike = {(w.qtype, w.act, w.additive, w.hadamard, tuple(sorted(w.aux))) for w in weights}
    groups = {w.group for w in weights} if not shared else set()
    if len(alike) > 1 or len(groups) > 1 or "output_perm" in first.aux:
        raise UnsupportedError(f"{module}: its parts are stored in ways that cannot be joined")
    aux = {
        key: np.concatenate([w.aux[key] for w in weights], axis=-2)
        if key == "lora_b"
        else same([w.aux[key] for w in weights])
        for key in first.aux
    }
    return replace(
        first,
        qvalue=np.concatenate([w.qvalue for w in weights], axis=-2),
        scale=rows([w.scale for w in weights]),
        zero_point=rows([w.zero_point for w in weights]),
        shape=(n, first.shape[1]),
        group=(n, first.group[1]) if shared and first.group else first.group,
        aux=aux,
    )


def _check_readable(params: Params, work: Path) -> None:
    """Plans what was written: no files are left that their own format would refuse."""
    origin = params.host.origin
    opened = open_folder(work, None, origin.quantize_activations, pickled=False)
    with closing(opened.files):
        opened.places()
