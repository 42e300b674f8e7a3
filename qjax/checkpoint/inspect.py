"""What a checkpoint is and what it will take to run it, from its headers alone."""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from qjax import host_memory, ops
from qjax.checkpoint import detect, plan
from qjax.checkpoint.gguf_io import GGUFFile, read_gguf
from qjax.checkpoint.mapped import TensorFiles
from qjax.checkpoint.opened import Opened, folder_config, gguf_model, opened_folder, opened_gguf
from qjax.checkpoint.safetensors_io import open_safetensors
from qjax.checkpoint.source import Source, resolve
from qjax.errors import CheckpointError, RequestError, UnsupportedError
from qjax.formats.base import PLAIN
from qjax.kv_cache import KV_CACHE_DTYPES, bytes_per_token, cache_dtypes
from qjax.models.config import ModelConfig
from qjax.qtypes import QTYPES


@dataclass(frozen=True)
class TypeUse:
    """All tensors of one stored type: how many, with how many elements, in how many bytes."""

    qtype: str
    tensors: int
    elements: int
    nbytes: int


@dataclass(frozen=True)
class Kind:
    """Quantized layers that are stored alike.

    Attributes:
      layers: how many; joined layers and experts count one by one, as they are stored.
      role: last part of their names, several joined by commas.
      qtype, group: of the weights, as `QArray` has them.
      activation: type that inputs are rounded to, or "".
      nbytes: in memory, of all layers.
      kernel: the implementation that would run here.
      refused: why a better one does not, by its name.
    """

    layers: int
    role: str
    qtype: str
    group: tuple[int, int] | None
    activation: str
    nbytes: int
    kernel: str
    refused: Mapping[str, str]


@dataclass(frozen=True)
class Quantized:
    """A checkpoint's quantization.

    Attributes:
      method: its name.
      settings: as the config says.
      kinds: of layers.
      nbytes: that all weights take in memory, plain ones included.
      parameters: how many weights they stand for.
    """

    method: str
    settings: Mapping[str, Any]
    kinds: tuple[Kind, ...]
    nbytes: int
    parameters: int


@dataclass(frozen=True)
class Cache:
    """What keys and values of a model are held in.

    Attributes:
      auto: the dtype that is taken unless asked otherwise.
      scales: how many scales each layer has for its keys, and for its values, that came with the
        model.
      bytes_per_token: over all layers, by each dtype that the model can have.
    """

    auto: str
    scales: int
    bytes_per_token: Mapping[str, int]


@dataclass(frozen=True)
class Summary:
    """A checkpoint in numbers.

    Attributes:
      source: where it was found.
      architecture: as the file names it, "" where it does not.
      license: "" where unknown.
      types: by stored type, the one that takes most bytes first.
      parameters: weights that the tensors stand for.
      nbytes: bytes of all tensors; `memory` is what the weights take once they are loaded.
      context_length: tokens the model was trained for, or None.
      cache: what keys and values are held in, or None.
      free_memory: bytes that this process may still take, or None where the system does not say.
      problem: why qjax cannot run it, or None.
      quantized: of a GGUF file, or a folder with a quantization config, that can be read; or None.
    """

    source: Source
    architecture: str
    license: str
    types: tuple[TypeUse, ...]
    parameters: int
    nbytes: int
    context_length: int | None
    cache: Cache | None
    free_memory: int | None
    problem: str | None
    quantized: Quantized | None = None

    @property
    def memory(self) -> int:
        """Bytes that the weights take once they are loaded."""
        return self.quantized.nbytes if self.quantized else self.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each element, scales and padding included."""
        return 8 * self.nbytes / max(1, self.parameters)

    @property
    def kv_bytes_per_token(self) -> int | None:
        """Of the cache that is taken unless asked otherwise, or None."""
        return self.cache and self.cache.bytes_per_token[self.cache.auto]

    @property
    def tokens_that_fit(self) -> int | None:
        """Tokens of context, over all sequences, that fit in the free memory beside the weights."""
        if self.free_memory is None or self.kv_bytes_per_token is None:
            return None
        return max(0, self.free_memory - self.memory) // self.kv_bytes_per_token


def summarize(source: str | os.PathLike[str]) -> Summary:
    """Summarizes a model, fetching it first where necessary; no tensor is read.

    Raises:
      CheckpointError: a file is damaged.
      DownloadError: it cannot be found or fetched.
    """
    found = resolve(source)
    if found.kind == "gguf":
        with read_gguf(found.path) as files:
            return _summary(found, files)
    if found.kind == "orbax":
        raise UnsupportedError(
            f"{found.path}: folders in orbax's format are not inspected; `print(params.summary())` "
            "shows what their weights take"
        )
    if found.kind == "pickle":
        from qjax.checkpoint.unpickle import open_pickled

        with open_pickled(found.path) as files:
            return _summary(found, files)
    with open_safetensors(found.path) as files:
        return _summary(found, files)


def _summary(source: Source, files: TensorFiles) -> Summary:
    uses: dict[str, list[int]] = {}
    for record in files.tensors.values():
        use = uses.setdefault(record.qtype, [0, 0, 0])
        for index, amount in enumerate((1, math.prod(record.shape), record.nbytes)):
            use[index] += amount
    types = [TypeUse(qtype, *use) for qtype, use in uses.items()]
    types.sort(key=lambda use: -use.nbytes)

    config, problem, quantized = None, None, None
    try:
        config = _config(source, files)
        opened, settings = _opened(source, files, config)
        config = opened.config
        if settings is not None:
            quantized = _quantized(files, opened, settings)
        unknown = [use.qtype for use in types if use.qtype not in QTYPES]
        if unknown and quantized is None:
            problem = f"tensors of type {', '.join(unknown)} are not supported"
    except UnsupportedError as error:
        problem = str(error)
    except CheckpointError as error:
        if not isinstance(files, GGUFFile):
            raise
        problem = str(error)  # a vocabulary alone, or a part of a model
    architecture = files.metadata.get("general.architecture", "")
    return Summary(
        source=source,
        architecture=architecture or (config.model_type if config else ""),
        license=source.license or files.metadata.get("general.license", ""),
        types=tuple(types),
        parameters=quantized.parameters if quantized else sum(use.elements for use in types),
        nbytes=sum(use.nbytes for use in types),
        context_length=config.max_position_embeddings if config else None,
        cache=_cache(config) if config else None,
        free_memory=host_memory.available(),
        problem=problem,
        quantized=quantized,
    )


def _config(source: Source, files: TensorFiles) -> ModelConfig:
    if isinstance(files, GGUFFile):
        return gguf_model(files)
    folder = source.path if source.path.is_dir() else source.path.parent
    file = folder / "config.json"
    if not file.is_file():
        raise UnsupportedError(f"{folder} has no config.json, which says what the model is")
    return folder_config(folder)[1]


def _opened(
    source: Source, files: TensorFiles, config: ModelConfig
) -> tuple[Opened, Mapping[str, Any] | None]:
    """What the tensors are, and the settings of their quantization, or None where there is none."""
    if isinstance(files, GGUFFile):
        return opened_gguf(files, config), {}
    folder = source.path if source.path.is_dir() else source.path.parent
    fields = detect.read_json(folder / "config.json")
    return opened_folder(folder, fields, config, files), detect.find(folder, fields)[0]


def _quantized(files: TensorFiles, opened: Opened, settings: Mapping[str, Any]) -> Quantized:
    """Plans every weight from the headers, and decodes one layer of each kind to know its type."""
    places = opened.places()
    alike: dict[Hashable, dict[str, plan.Piece]] = {}
    nbytes = 0
    for place in places.values():
        if isinstance(place, plan.Vector):
            nbytes += 4 * math.prod(place.shape)
            continue
        for piece in place.pieces:
            stored = tuple((s, r.qtype, r.shape) for s, r in sorted(piece.stored.items()))
            alike.setdefault((piece.shape, stored), {})[piece.module] = piece
    kinds: dict[Hashable, Kind] = {}
    for pieces in alike.values():
        piece = next(iter(pieces.values()))
        weight = piece.layer.decode(plan.read(files, piece))
        nbytes += weight.nbytes * len(pieces)
        if weight.act is None and weight.qtype in PLAIN:
            continue
        found = ops.supports(weight)
        roles = dict.fromkeys(module.rpartition(".")[2] for module in pieces)
        key = (weight.qtype, weight.group, weight.act, found.implementation)
        known = kinds.get(key)
        kinds[key] = Kind(
            len(pieces) + (known.layers if known else 0),
            ", ".join(dict.fromkeys([*(known.role.split(", ") if known else []), *roles])),
            weight.qtype,
            weight.group,
            weight.act.dtype if weight.act else "",
            weight.nbytes * len(pieces) + (known.nbytes if known else 0),
            found.implementation,
            found.refused,
        )
    parameters = sum(math.prod(place.shape) for place in places.values())
    return Quantized(opened.quantization.name, settings, tuple(kinds.values()), nbytes, parameters)


def _cache(config: ModelConfig) -> Cache:
    sizes = {}
    for asked in KV_CACHE_DTYPES:
        try:
            (dtype,) = set(cache_dtypes(config, asked, "bfloat16"))
        except RequestError:
            continue  # not with this model
        sizes[dtype] = bytes_per_token(config, dtype)
    auto = cache_dtypes(config, "auto", "bfloat16")[0]
    return Cache(auto, config.kv_scales, sizes)
