"""`write`: a model becomes one GGUF file, which llama.cpp and `load` can read.

Weights go back as they are: blocks of ggml's own types byte by byte, integer codes with float16
scales as the blocks that stand for the same numbers. Nothing is rounded here: what no type of GGUF
holds is an error, or goes to the caller's `encode`. A model that was loaded from a GGUF file keeps
its metadata and the order of its tensors; for others they are made from the config and the
tokenizer's files. Only one weight is held at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qjax.checkpoint import joined, names
from qjax.checkpoint.gguf_config import ROPE_TENSORS
from qjax.checkpoint.gguf_io import GGUFFile, read_gguf
from qjax.checkpoint.gguf_metadata import file_type, model_metadata, rope_tensors
from qjax.checkpoint.gguf_stream import GGUFStream
from qjax.checkpoint.gguf_vocabulary import vocabulary_metadata
from qjax.checkpoint.pieces import pair_order
from qjax.checkpoint.places import leaf_of
from qjax.checkpoint.wholes import on_host
from qjax.errors import CheckpointError, UnsupportedError
from qjax.formats.base import PLAIN
from qjax.formats.gguf import stored
from qjax.models import functional
from qjax.params import Params
from qjax.qarray import QArray

Encode = Callable[[str, QArray], QArray]
"""From a module's name and a weight that no type of GGUF holds, to one that some type does."""

_FILE_TYPE = "general.file_type"
# Of one file, not of the model.
_DROPPED = ("split.no", "split.count", "split.tensors.count")
_INPUT_SCALE = ".input_scale"


def write(
    params: Params,
    file: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any] | None = None,
    encode: Encode | None = None,
) -> Path:
    """Writes a GGUF file.

    Args:
      params: from `load` (its source must still be there: metadata and tokenizer come from it), the
        weights maybe changed since.
      file: where to; must not exist. It appears when all is written, or not at all.
      metadata: further keys, or other values; see `gguf_stream.Metadata` for their types. With
        "tokenizer.ggml.model" among them, the source's tokenizer is not looked for.
      encode: called for the weights that GGUF holds in no type; None makes them an error.

    Returns:
      The file.

    Raises:
      CheckpointError: the file exists, or the source has gone or is damaged.
      UnsupportedError: a model, a tokenizer or a weight that has no form in GGUF.
    """
    file = Path(file)
    if file.exists():
        raise CheckpointError("exists: nothing written", file=file)
    with ExitStack() as stack:
        source = _source(params)
        gguf = stack.enter_context(read_gguf(source)) if source.is_file() else None
        described = _described(params, source, gguf, dict(metadata or {}))
        tensors = _Tensors(params, gguf, encode)
        file.parent.mkdir(parents=True, exist_ok=True)
        announced = tensors.announced()
        stream = stack.enter_context(GGUFStream(file, described, announced))
        written: dict[str, tuple[str, int]] = {}
        for (name, qtype, raw), (_, shape) in zip(tensors, announced, strict=True):
            stream.add(name, qtype, raw)
            if len(shape) > 1:
                written[name] = qtype, raw.nbytes
        if _FILE_TYPE in described and _FILE_TYPE not in (metadata or {}):
            stream.finish({_FILE_TYPE: _file_type(written, gguf)})
    return file


def _source(params: Params) -> Path:
    """The GGUF file, or the folder, that a model was loaded from."""
    origin = params.host.origin
    if origin is None:
        raise UnsupportedError("a model made in memory has no tokenizer: GGUF files carry theirs")
    if origin.folder is not None:
        source = Path(origin.folder)
    else:
        place = next(iter(origin.plan.values()))
        records = place.pieces[0].stored.values() if hasattr(place, "pieces") else [place.record]
        source = Path(next(iter(records)).file)
    if not source.exists():
        raise CheckpointError(
            "has gone: metadata and tokenizer are taken from where the model was loaded",
            file=source,
        )
    return source


def _described(
    params: Params, source: Path, gguf: GGUFFile | None, own: dict[str, Any]
) -> dict[str, Any]:
    if gguf is not None:
        kept = {key: value for key, value in gguf.metadata.items() if key not in _DROPPED}
        for key, value in kept.items():
            if not isinstance(value, str | list | np.ndarray):
                kept[key] = gguf.typed(key)
        return kept | own
    named = model_metadata(params.config)
    architecture = named.pop("general.architecture")
    vocabulary = {}
    if "tokenizer.ggml.model" not in own:
        vocabulary = vocabulary_metadata(source, params.config.vocab_size)
    name = params.host.origin.fields.get("_name_or_path") or source.name
    return {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": str(name).rstrip("/").rpartition("/")[2],
        **named,
        **vocabulary,
        "general.quantization_version": 2,
        _FILE_TYPE: 0,
        **own,
    }


def _file_type(written: dict[str, tuple[str, int]], gguf: GGUFFile | None) -> int:
    """That of the source where types are as they were."""
    if gguf is not None and _FILE_TYPE in gguf.metadata:
        records = gguf.tensors.items()
        before = {name: (r.qtype, r.nbytes) for name, r in records if len(r.shape) > 1}
        if before == written:
            return gguf.metadata[_FILE_TYPE]
    return file_type(written)


class _Tensors:
    """The tensors of a model by the names that GGUF has for them, made one by one."""

    def __init__(self, params: Params, gguf: GGUFFile | None, encode: Encode | None):
        self._params, self._gguf, self._encode = params, gguf, encode
        config = params.config
        self._shapes = functional.parameter_shapes(config)
        self._rotated = config.model_type in names.ROTATED_PAIRS
        # GGUF name -> parameters: one, or the parts of a joined one from top to bottom.
        self._parts: dict[str, list[str]] = {}
        for name in self._shapes:
            place = names.gguf_tensor(name, config)
            if place is None:
                raise UnsupportedError(
                    f"{name}: GGUF files of {config.model_type} have no place for it"
                )
            self._parts.setdefault(place, []).append(name)
        for place, parts in self._parts.items():
            if len(parts) > 1:
                parts.sort(key=self._first_row)
            elif names.gguf_name(place, config) != parts[0]:
                raise UnsupportedError(f"{parts[0]}: {place} needs all of its parts")
        self._copied = [] if gguf is None else [n for n in gguf.tensors if self._is_copied(n)]
        self._made = rope_tensors(config) if gguf is None else {}

    def _first_row(self, name: str) -> int:
        module = name.rpartition(".")[0]
        (fused,) = names.fused_into(module, self._params.config)
        return names.rows_of(module, fused, self._params.config, self._shapes)[0].start

    def _is_copied(self, name: str) -> bool:
        """Whether a tensor of the source is no parameter and still holds."""
        weight = self._parts.get(name.removesuffix(_INPUT_SCALE) + ".weight")
        if name.endswith(_INPUT_SCALE) and weight is not None:
            return leaf_of(self._params, weight[0]).qtype == "fp4_e2m1"
        return name in ROPE_TENSORS

    def announced(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order in which they come."""
        assert not hasattr(self, "_order")
        shapes = {name: values.shape for name, values in self._made.items()}
        for place, parts in self._parts.items():
            *lead, n, k = (1, *self._shapes[parts[0]])
            if len(parts) > 1 and place.endswith(".weight"):
                n = sum(self._shapes[part][-2] for part in parts)
            elif len(parts) > 1:
                k = sum(self._shapes[part][-1] for part in parts)
            whole = (*lead[1:], n, k) if len(self._shapes[parts[0]]) > 1 else (k,)
            # The gate of a shared network is one row, and stored without that axis.
            shapes[place] = whole[1:] if whole[0] == 1 else whole
            if self._has_scale(parts[0]):
                shapes[place.replace(".weight", ".scale")] = (whole[0] if len(whole) > 2 else 1,)
        if self._gguf is not None:
            shapes |= {name: self._gguf.tensors[name].shape for name in self._copied}
            known = {name: place for place, name in enumerate(self._gguf.tensors)}
            shapes = dict(sorted(shapes.items(), key=lambda item: known.get(item[0], len(known))))
        self._order = list(shapes)
        return list(shapes.items())

    def _has_scale(self, name: str) -> bool:
        leaf = leaf_of(self._params, name)
        if not isinstance(leaf, QArray) or leaf.qtype != "fp4_e2m1" or leaf.group is None:
            return False
        return leaf.group[1] == 16 and "global_scale" in leaf.aux

    def __iter__(self) -> Iterator[tuple[str, str, np.ndarray]]:
        """Name, type and bytes of each."""
        scales: dict[str, np.ndarray] = {}
        for name in self._order:
            if name in self._parts:
                qtype, tensors = self._stored(name)
                if "scale" in tensors:
                    scales[name.replace(".weight", ".scale")] = tensors["scale"]
                yield name, qtype, tensors["weight"]
            elif name in self._made:
                yield name, "f32", self._made[name]
            elif name in self._copied:
                assert self._gguf is not None
                yield name, self._gguf.tensors[name].qtype, self._gguf.raw(name)
            else:
                weight = name.replace(".scale", ".weight")
                found = scales.pop(name, None)
                yield name, "f32", self._stored(weight)[1]["scale"] if found is None else found

    def _stored(self, place: str) -> tuple[str, dict[str, np.ndarray]]:
        parts = [self._host(name) for name in self._parts[place]]
        if isinstance(parts[0], np.ndarray):
            return "f32", {"weight": np.concatenate(parts, axis=-1)}
        module = self._parts[place][0].removesuffix(".weight")
        if any(part.qtype != parts[0].qtype for part in parts) and self._encode is not None:
            parts = [self._encode(module, part) for part in parts]
        weight = parts[0] if len(parts) == 1 else joined.weights(module, parts, False)
        if weight.qtype in PLAIN and ".ffn_gate_inp" in place:  # routers are float32 in llama.cpp
            return "f32", {"weight": weight.to_numpy()}
        try:
            return stored(module, weight)
        except UnsupportedError:
            if self._encode is None:
                raise
        return stored(module, self._encode(module, weight))

    def _host(self, name: str) -> Any:
        """A parameter on the host, its rows as GGUF has them."""
        weight = on_host(self._params, name, leaf_of(self._params, name))
        order = pair_order(name, self._params.config) if self._rotated else None
        order = None if order is None else np.argsort(order)
        if not isinstance(weight, QArray):
            values = weight.astype(np.float32)
            return values if order is None else values[order]
        if "output_perm" in weight.aux:
            rows = weight.aux["output_perm"][0]
            kept = {key: value for key, value in weight.aux.items() if key != "output_perm"}
            weight = replace(weight, aux=kept).take_rows(rows)
        return weight if order is None else weight.take_rows(order)
