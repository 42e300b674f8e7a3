"""`load`: a checkpoint becomes a `Params`, one tensor at a time.

First everything is planned and checked from headers alone: which stored tensor fills which
parameter, with which shape. Only then is data touched. A weight stays in the mapped file where the
kernels read it as it is; one that is repacked is copied, and its pages are given back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qjax import ops
from qjax.checkpoint import names
from qjax.checkpoint.gguf_config import ROPE_TENSORS, gguf_config
from qjax.checkpoint.gguf_io import read_gguf
from qjax.checkpoint.mapped import TensorFiles
from qjax.checkpoint.safetensors_io import open_safetensors
from qjax.errors import CheckpointError, UnsupportedError
from qjax.models import functional
from qjax.models.config import ModelConfig, model_config
from qjax.params import Host, Params
from qjax.qarray import QArray
from qjax.qtypes import QTYPES

_PLAIN = ("f32", "f16", "bf16")
_LARGEST_JSON = 1 << 24


@dataclass(frozen=True)
class _Opened:
    """A checkpoint with its headers read.

    Attributes:
      rename: stored tensor name -> Hugging Face name; None for a tensor of no supported model.
      ignored: stored tensors that are known and need no place.
      qtypes: the types that a weight may be stored in.
      rotated_pairs: q and k rows are stored pair by pair, as llama.cpp writes them for Llama.
      norm_offset: what the stored norm weights lack.
    """

    files: TensorFiles
    config: ModelConfig
    rename: Callable[[str], str | None]
    ignored: frozenset[str]
    qtypes: tuple[str, ...]
    rotated_pairs: bool
    norm_offset: float
    load_tokenizer: Callable[[], Any]
    generation_config: Mapping[str, Any]


@dataclass(frozen=True)
class _Part:
    """A parameter's place in the files: rows of one stored tensor (None: all), and its shape."""

    tensor: str
    rows: slice | None
    shape: tuple[int, ...]


def load(source: str | os.PathLike[str]) -> Params:
    """Loads a model's weights as they are stored, on this machine's default device.

    Args:
      source: a GGUF file, a folder with config.json and safetensors, a name on the Hugging Face
        hub, or a built-in name.

    Returns:
      Params; the tokenizer is loaded when it is first used.

    Raises:
      CheckpointError: a file is damaged, or a tensor is missing, superfluous or of a wrong shape.
      UnsupportedError: the architecture, or the type of a tensor, is not one that qjax runs.
      DownloadError: the name is unknown, or it cannot be fetched.
    """
    from qjax.checkpoint.source import resolve

    found = resolve(source)
    path = Path(found.path)
    opened = _open_gguf(path) if found.kind == "gguf" else _open_folder(path)
    with closing(opened.files):
        parts = _plan(opened)
        tree: dict[str, Any] = {}
        for name, leaf in _read_all(opened, parts):
            *parents, last = name.split(".")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = leaf
    host = Host(str(found.name), opened.load_tokenizer, opened.generation_config)
    return Params(tree, opened.config, host)


def _open_gguf(path: Path) -> _Opened:
    files = read_gguf(path)
    fields, shown = gguf_config(files)
    config = model_config(fields, file=files.path, shown=shown)

    def load_tokenizer() -> Any:
        from qjax.checkpoint.tokenizer import load_tokenizer

        return load_tokenizer(files)

    return _Opened(
        files,
        config,
        partial(names.gguf_name, config=config),
        frozenset(ROPE_TENSORS) & files.tensors.keys(),
        tuple(QTYPES),
        rotated_pairs=config.model_type == "llama",
        norm_offset=0.0,
        load_tokenizer=load_tokenizer,
        generation_config={},
    )


def _open_folder(path: Path) -> _Opened:
    folder = path if path.is_dir() else path.parent
    file = folder / "config.json"
    fields = _read_json(file)
    _refuse_quantized(folder, fields)
    config = model_config(fields, file=os.fspath(file))
    generation = folder / "generation_config.json"
    files = open_safetensors(path)

    def load_tokenizer() -> Any:
        from qjax.checkpoint.tokenizer import load_tokenizer

        return load_tokenizer(folder)

    return _Opened(
        files,
        config,
        names.hf_name,
        frozenset(n for n in files.tensors if names.is_ignored(names.hf_name(n), config)),
        _PLAIN,
        rotated_pairs=False,
        # Gemma's checkpoints hold the norm weights less one.
        norm_offset=1.0 if config.post_norms else 0.0,
        load_tokenizer=load_tokenizer,
        generation_config=_read_json(generation) if generation.exists() else {},
    )


def _refuse_quantized(folder: Path, fields: Mapping[str, Any]) -> None:
    text = fields.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, Mapping) else None
    found = fields.get("quantization_config") or nested
    if found is None and (folder / "hf_quant_config.json").exists():
        found = {"quant_method": "modelopt"}
    if found is not None:
        method = found.get("quant_method") if isinstance(found, Mapping) else None
        method = method if isinstance(method, str) else "unnamed"
        raise UnsupportedError(
            f"{folder}: quant_method {method!r:.80} is not supported yet; GGUF "
            f"files are, and safetensors of {', '.join(_PLAIN)}"
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        with open(file, "rb") as stream:
            data = stream.read(_LARGEST_JSON + 1)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=file) from error
    if len(data) > _LARGEST_JSON:
        raise CheckpointError(f"is larger than {_LARGEST_JSON} bytes", file=file)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not valid JSON: {error}", file=file) from error
    if not isinstance(content, dict):
        raise CheckpointError("is not a JSON object", file=file)
    return content


def _plan(opened: _Opened) -> dict[str, _Part]:
    """Where each parameter of the model is stored; every tensor and every parameter has its match.

    Only headers are read.
    """
    files, config = opened.files, opened.config
    expected = functional.parameter_shapes(config)
    parts: dict[str, _Part] = {}
    for tensor, record in files.tensors.items():
        if tensor in opened.ignored:
            continue
        renamed = opened.rename(tensor)
        pieces = names.split_fused(renamed, config) if renamed else [(tensor, None)]
        unknown = [name for name, _ in pieces if name not in expected]
        if unknown:
            raise CheckpointError(
                f"has no place in a {config.model_type} model of {config.num_layers} layers",
                file=record.file,
                field=tensor,
                offset=record.offset,
            )
        # Of a fused tensor, the pieces stand below each other and fill it.
        rows = sum(expected[name][0] for name, _ in pieces)
        shape = (rows, *expected[pieces[0][0]][1:])
        if record.shape != shape:
            raise CheckpointError(
                f"has shape {record.shape}, the model's sizes ask for {shape}",
                file=record.file,
                field=tensor,
                offset=record.offset,
            )
        _check_qtype(tensor, record.file, record.qtype, opened.qtypes if len(shape) > 1 else _PLAIN)
        for name, piece in pieces:
            if name in parts:
                raise CheckpointError(
                    f"fills {name}, as {parts[name].tensor} does", file=record.file, field=tensor
                )
            parts[name] = _Part(tensor, piece, expected[name])
    missing = sorted(expected.keys() - parts.keys())
    if missing:
        raise CheckpointError(
            f"no tensor for this parameter ({len(missing)} of {len(expected)} are unfilled)",
            file=files.path,
            field=missing[0],
        )
    return parts


def _check_qtype(tensor: str, file: str, qtype: str, supported: tuple[str, ...]) -> None:
    if qtype not in supported:
        raise UnsupportedError(
            f"{file}, {tensor}: type {qtype} is not supported here; supported are "
            + ", ".join(supported)
        )


def _read_all(opened: _Opened, parts: dict[str, _Part]) -> Iterator[tuple[str, Any]]:
    from tqdm.auto import tqdm

    # Repacking is native code that lets go of the interpreter lock: two cores, half the time.
    workers = min(4, os.cpu_count() or 1)
    with (
        ThreadPoolExecutor(workers, "qjax-load") as pool,
        # Shown on a terminal only (disable=None), and only where loading takes its time.
        tqdm(total=len(parts), desc="loading", delay=1.0, leave=False, disable=None) as bar,
    ):
        # Each task in a context of its own: `dispatch.use` holds in the pool's threads too.
        contexts = [copy_context() for _ in parts]
        leaves = pool.map(
            lambda context, *part: context.run(_read, opened, *part),
            contexts,
            parts,
            parts.values(),
        )
        try:
            for name, leaf in zip(parts, leaves, strict=True):
                bar.update()
                yield name, leaf
        finally:
            pool.shutdown(cancel_futures=True)


def _read(opened: _Opened, name: str, part: _Part) -> QArray | jax.Array:
    """One parameter on the device: a matrix as a QArray, a vector as float32."""
    files = opened.files
    record = files.tensors[part.tensor]
    if len(part.shape) == 1:
        return jax.device_put(_vector(opened, name, part))
    raw = files.raw(part.tensor)
    if part.rows is not None:
        raw = raw[part.rows]
    stored = raw
    if opened.rotated_pairs:
        raw = _unrotate(name, raw, opened.config)
    weight = QArray(raw, record.qtype, (part.shape[0], part.shape[1]))
    # A table that is only looked up is read a row at a time, best where it lies.
    if name != "model.embed_tokens.weight" or opened.config.tie_word_embeddings:
        weight = ops.prepare(weight)
    # Not copied where the bytes lie as a device wants them (on a CPU, at a multiple of 64).
    weight = jax.block_until_ready(jax.device_put(weight))
    if weight.layout != "canonical" or raw is not stored:
        files.release(part.tensor)
    return weight


def _vector(opened: _Opened, name: str, part: _Part) -> np.ndarray:
    """A norm weight or a bias: float32, copied."""
    values = opened.files.array(part.tensor)
    if part.rows is not None:
        values = values[part.rows]
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        record = opened.files.tensors[part.tensor]
        raise CheckpointError(
            "holds values that are not finite",
            file=record.file,
            field=part.tensor,
            offset=record.offset,
        )
    if name.endswith(".bias"):
        return _unrotate(name, values, opened.config) if opened.rotated_pairs else values
    return values + np.float32(opened.norm_offset)


def _unrotate(name: str, rows: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Puts the rows of q and k back into halves.

    llama.cpp rotates neighbouring rows of a head, this model (as Hugging Face's) rows that are half
    a head apart. Only whole rows move, so this holds for packed blocks too.
    """
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return rows
    pairs = rows.reshape(heads, config.head_dim // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
