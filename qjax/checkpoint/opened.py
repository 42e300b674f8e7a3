"""A checkpoint with its headers read: which files, which model, which format."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mode
from typing import Any

from qjax.checkpoint import detect, names, plan
from qjax.checkpoint.detect import read_json
from qjax.checkpoint.expert_scales import taken_apart
from qjax.checkpoint.gguf_config import ROPE_TENSORS, gguf_config
from qjax.checkpoint.gguf_io import GGUFFile, read_gguf
from qjax.checkpoint.mapped import TensorFiles
from qjax.checkpoint.orbax_folder import Native
from qjax.checkpoint.safetensors_io import open_safetensors
from qjax.checkpoint.unpickle import open_pickled
from qjax.errors import UnsupportedError
from qjax.formats import kv_scales
from qjax.formats.base import QuantizationConfig
from qjax.formats.gguf import GGUF
from qjax.models.config import ModelConfig, model_config


@dataclass(frozen=True)
class Opened:
    """A checkpoint with its headers read.

    Attributes:
      rename: stored tensor name -> Hugging Face name; None for a tensor of no supported model.
      ignored: stored tensors that are known and need no place.
      quantization: how weights are stored.
      quantize_activations: whether weights keep what their method does to activations.
      rotated_pairs: q and k rows are stored pair by pair, as llama.cpp writes them for Llama.
      norm_offset: what the stored norm weights lack.
      folder: that config.json lies in, and fields: its content; None and empty for GGUF.
    """

    files: TensorFiles
    config: ModelConfig
    rename: Callable[[str], str | None]
    ignored: frozenset[str]
    quantization: QuantizationConfig
    quantize_activations: bool
    rotated_pairs: bool
    norm_offset: float
    load_tokenizer: Callable[[], Any]
    generation_config: Mapping[str, Any]
    folder: Path | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    def places(self) -> plan.Plan:
        """The place of every parameter, see `plan.plan`."""
        return plan.plan(self.files, self.config, self.quantization, self.rename, self.ignored)

    def origin(self, places: plan.Plan) -> plan.Origin:
        return plan.Origin(
            self.folder,
            self.fields,
            self.quantization,
            places,
            self.ignored,
            self.norm_offset,
            self.quantize_activations,
            None if self.folder is not None else Path(self.files.path),
        )


def open_gguf(path: Path, quantize_activations: bool) -> Opened:
    files = read_gguf(path)
    return opened_gguf(files, gguf_model(files), quantize_activations)


def gguf_model(files: GGUFFile) -> ModelConfig:
    """What the metadata of a GGUF file say of the model."""
    fields, shown = gguf_config(files)
    return model_config(fields, file=files.path, shown=shown)


def opened_gguf(files: GGUFFile, config: ModelConfig, quantize_activations: bool = True) -> Opened:
    """What the tensors of a GGUF file are."""

    def load_tokenizer() -> Any:
        from qjax.checkpoint.tokenizer import load_tokenizer

        return load_tokenizer(files)

    return Opened(
        files,
        config,
        partial(names.gguf_name, config=config),
        frozenset(ROPE_TENSORS) & files.tensors.keys(),
        GGUF(),
        quantize_activations,
        rotated_pairs=config.model_type in names.ROTATED_PAIRS,
        norm_offset=0.0,
        load_tokenizer=load_tokenizer,
        generation_config={},
    )


def open_folder(
    path: Path, quantization: str | None, quantize_activations: bool, pickled: bool
) -> Opened:
    """A checkpoint of several files, of which only headers are read yet; close its `files`."""
    folder = path if path.is_dir() else path.parent
    fields, config = folder_config(folder)
    files = open_pickled(folder) if pickled else open_safetensors(path)
    return opened_folder(folder, fields, config, files, quantization, quantize_activations)


def open_native(folder: Path, quantize_activations: bool) -> Opened:
    """A folder in orbax's format, whose weights are read by `orbax_folder`."""
    fields, config = folder_config(folder)
    files = TensorFiles(folder, {}, {}, {})
    opened = opened_folder(folder, fields, config, files)
    return replace(
        opened, quantization=Native(), quantize_activations=quantize_activations, norm_offset=0.0
    )


def folder_config(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    """A folder's config.json, and what it says of the model."""
    file = folder / "config.json"
    fields = read_json(file)
    return fields, model_config(fields, file=os.fspath(file))


def opened_folder(
    folder: Path,
    fields: Mapping[str, Any],
    config: ModelConfig,
    files: TensorFiles,
    quantization: str | None = None,
    quantize_activations: bool = True,
) -> Opened:
    """What the tensors of a folder are, and what stands beside them."""
    generation = folder / "generation_config.json"

    def load_tokenizer() -> Any:
        from qjax.checkpoint.tokenizer import load_tokenizer

        return load_tokenizer(folder)

    files.tensors = taken_apart(files.tensors)
    hf_names = {tensor: names.hf_name(tensor, config) for tensor in files.tensors}
    unused = {n for n, name in hf_names.items() if names.is_ignored(name, config)}
    unused |= {n for n, name in hf_names.items() if kv_scales.is_other(name)}
    scales = {n: kv_scales.canonical(name) for n, name in hf_names.items()}
    scales = {n: name for n, name in scales.items() if name is not None}
    method = detect.quantization(folder, fields, files, quantization)
    if quantize_activations:
        _check_cache(folder, method.cache, has_scales=bool(scales))
    else:
        unused |= {n for n, name in hf_names.items() if kv_scales.is_zero_point(name)}
    if quantize_activations and scales:
        if config.mla is not None:
            raise UnsupportedError(
                f"{folder}: has scales of cached keys and values, but a {config.model_type} caches "
                "others than were calibrated; quantize_activations=False loads it without them"
            )
        sizes = [math.prod(files.tensors[n].shape) for n in scales]
        config = replace(config, kv_scales=mode(sizes))
    else:
        unused |= scales.keys()
    return Opened(
        files,
        config,
        lambda tensor: scales.get(tensor) or hf_names[tensor],
        frozenset(unused),
        method,
        quantize_activations,
        rotated_pairs=False,
        # Gemma's checkpoints hold the norm weights less one.
        norm_offset=1.0 if config.post_norms else 0.0,
        load_tokenizer=load_tokenizer,
        generation_config=read_json(generation) if generation.exists() else {},
        folder=folder,
        fields=fields,
    )


def _check_cache(folder: Path, cache: str | None, *, has_scales: bool) -> None:
    """Refuses a key-value cache that is not rounded here as the checkpoint's method does it."""
    if cache not in (None, "fp8_e4m3"):
        raise UnsupportedError(
            f"{folder}: asks for a key-value cache of {cache}, which is not supported; "
            "quantize_activations=False loads it with a cache (and activations) left unrounded"
        )
    if cache is not None and not has_scales:
        warnings.warn(
            f"{folder}: asks for a key-value cache of {cache}, but has no scales of it; the cache "
            "is left unrounded",
            stacklevel=2,
        )
