"""Where each parameter of a model is stored, worked out and checked from headers alone.

Every parameter finds its tensors and every tensor its parameter; what is left over on either side
is an error. How the tensors of one layer become a weight is the format's business
(`qjax.formats`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qjax.checkpoint import names
from qjax.checkpoint.mapped import TensorFiles, TensorRecord
from qjax.errors import CheckpointError
from qjax.formats.base import PLAIN, Layer, QuantizationConfig, dense_layer, expect, fault
from qjax.models import functional
from qjax.models.config import ModelConfig

# Parameters that lie beside a weight and are no part of it.
_VECTORS = ("bias", "e_score_correction_bias")


@dataclass(frozen=True)
class Piece:
    """A stored layer: its tensors by suffix, how they decode, and which rows of it are wanted."""

    module: str
    shape: tuple[int, ...]
    stored: Mapping[str, TensorRecord]
    layer: Layer
    rows: slice | None = None


@dataclass(frozen=True)
class Weight:
    """A matrix parameter: one piece, or one for each expert."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Vector:
    """A parameter that is kept as a float32 array: some rows of a plain tensor."""

    name: str
    shape: tuple[int, ...]
    record: TensorRecord
    rows: slice | None = None


Plan = dict[str, Weight | Vector]


@dataclass(frozen=True)
class Origin:
    """How a loaded model was stored: what it takes to write it again.

    Attributes:
      folder: where the checkpoint lies; None for a GGUF file.
      file: of a GGUF model; None for a folder.
      fields: of its config.json.
      quantization: its format.
      plan: where each parameter came from.
      ignored: stored tensors that no parameter came from.
      norm_offset: what was added to the stored norm weights.
      quantize_activations: whether weights kept what their method does to activations.
    """

    folder: Path | None
    fields: Mapping[str, Any]
    quantization: QuantizationConfig
    plan: Plan
    ignored: frozenset[str]
    norm_offset: float
    quantize_activations: bool
    file: Path | None = None

    def stored_bytes(self) -> dict[str, int]:
        """Bytes that each parameter takes in the checkpoint; a part of a joined one, its share."""
        return {name: _stored_bytes(place) for name, place in self.plan.items()}


def _stored_bytes(place: Weight | Vector) -> int:
    if isinstance(place, Vector):
        share = 1.0 if place.rows is None else place.shape[-1] / place.record.shape[-1]
        return round(place.record.nbytes * share)
    total = 0.0
    for piece in place.pieces:
        used = [r for s, r in piece.stored.items() if s in piece.layer.reads + piece.layer.ignores]
        share = 1.0 if piece.rows is None else place.shape[-2] / piece.shape[-2]
        total += sum(record.nbytes for record in used) * share
    return round(total)


@dataclass
class _Modules:
    """Stored tensors sorted by the module they belong to: module -> suffix -> record."""

    file: str | os.PathLike[str]
    of: dict[str, dict[str, TensorRecord]] = field(default_factory=dict)
    suffixes: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)
    quantized: bool = False

    def take(self, module: str, *suffixes: str) -> None:
        self.used.update(self.of[module][suffix].name for suffix in suffixes)


def plan(
    files: TensorFiles,
    config: ModelConfig,
    quantization: QuantizationConfig,
    rename: Callable[[str], str | None],
    ignored: frozenset[str],
) -> Plan:
    """The place of every parameter of the model.

    Args:
      rename: stored tensor name -> Hugging Face name; None for a tensor of no supported model.
      ignored: stored tensors that are known and need no place.

    Raises:
      CheckpointError: a tensor is missing, superfluous, or of a wrong shape or dtype.
      UnsupportedError: the format cannot read a layer.
    """
    expected = functional.parameter_shapes(config)
    modules = _sort(files, config, expected, rename, ignored)
    result: Plan = {}
    for name, shape in expected.items():
        module, _, last = name.rpartition(".")
        if last == "weight" and len(shape) > 1:
            found = _weight(name, module, shape, config, quantization, modules, expected)
        else:
            found = _vector(name, module, last, shape, modules, config, expected)
        if found is not None:
            result[name] = found
    _check_all_used(files, config, modules, ignored, rename)
    if quantization.quantizes_weights and not modules.quantized:
        raise CheckpointError(
            f"names {quantization.name}, but every weight is stored plain: without this key they "
            "load as they are",
            file=files.path,
            field="quantization_config",
        )
    missing = sorted(expected.keys() - result.keys())
    if missing:
        raise CheckpointError(
            f"no tensor for this parameter ({len(missing)} of {len(expected)} are unfilled)",
            file=files.path,
            field=missing[0],
        )
    return result


def _sort(
    files: TensorFiles,
    config: ModelConfig,
    expected: Mapping[str, tuple[int, ...]],
    rename: Callable[[str], str | None],
    ignored: frozenset[str],
) -> _Modules:
    known: set[str] = set()
    for name, shape in expected.items():
        module = name.rpartition(".")[0]
        known.add(module)
        known.update(names.fused_into(module, config))
        if len(shape) == 3:
            known.update(names.expert_modules(module, shape[0]))
    modules = _Modules(files.path)
    for tensor, record in files.tensors.items():
        renamed = None if tensor in ignored else rename(tensor)
        if renamed is None:
            continue
        parts = renamed.split(".")
        for cut in range(len(parts) - 1, 0, -1):
            module, suffix = ".".join(parts[:cut]), ".".join(parts[cut:])
            if module in known:
                stored = modules.of.setdefault(module, {})
                if suffix in stored:
                    raise CheckpointError(
                        f"fills {renamed}, as {stored[suffix].name} does",
                        file=record.file,
                        field=tensor,
                    )
                stored[suffix] = record
                modules.suffixes.add(suffix)
                break
    return modules


def _weight(
    name: str,
    module: str,
    shape: tuple[int, ...],
    config: ModelConfig,
    quantization: QuantizationConfig,
    modules: _Modules,
    expected: Mapping[str, tuple[int, ...]],
) -> Weight | None:
    if module in modules.of:
        return Weight(name, shape, (_piece(module, shape, quantization, modules, config),))
    for fused in names.fused_into(module, config):
        if fused in modules.of:
            rows, total = names.rows_of(module, fused, config, expected)
            whole = (*shape[:-2], total, shape[-1])
            piece = _piece(fused, whole, quantization, modules, config, rows)
            return Weight(name, shape, (piece,))
    if len(shape) == 3:
        experts = names.expert_modules(module, shape[0])
        missing = [expert for expert in experts if expert not in modules.of]
        if len(missing) < len(experts):
            if missing:
                raise CheckpointError(
                    "no tensor of this expert is stored", file=modules.file, field=missing[0]
                )
            pieces = tuple(_piece(e, shape[1:], quantization, modules, config) for e in experts)
            return Weight(name, shape, pieces)
    return None


def _piece(
    module: str,
    shape: tuple[int, ...],
    quantization: QuantizationConfig,
    modules: _Modules,
    config: ModelConfig,
    rows: slice | None = None,
) -> Piece:
    stored = {key: r for key, r in modules.of.get(module, {}).items() if key not in _VECTORS}
    layer = quantization.layer(module, stored, shape)
    if layer is None:
        transposed = names.are_gpt_oss_experts(module, config)
        layer = dense_layer(module, stored, shape, transposed=transposed)
    else:
        modules.quantized = True
    modules.take(module, *layer.reads, *(s for s in layer.ignores if s in stored))
    return Piece(module, shape, stored, layer, rows)


def _vector(
    name: str,
    module: str,
    last: str,
    shape: tuple[int, ...],
    modules: _Modules,
    config: ModelConfig,
    expected: Mapping[str, tuple[int, ...]],
) -> Vector | None:
    if last in ("k_scale", "v_scale"):
        return _cache_scale(name, module, last, shape, modules)
    if last in modules.of.get(module, {}):
        record = modules.of[module][last]
        expect(module, modules.of[module], last, PLAIN, shape)
        modules.take(module, last)
        return Vector(name, shape, record)
    for fused in names.fused_into(module, config):
        if last in modules.of.get(fused, {}):
            rows, total = names.rows_of(module, fused, config, expected)
            expect(fused, modules.of[fused], last, PLAIN, (*shape[:-1], total))
            modules.take(fused, last)
            return Vector(name, shape, modules.of[fused][last], rows)
    return None


def _cache_scale(
    name: str, module: str, last: str, shape: tuple[int, ...], modules: _Modules
) -> Vector | None:
    """A scale of keys or values: its own, that of both, or where there is only one kind, that."""
    stored = modules.of.get(module, {})
    other = {"k_scale": "v_scale", "v_scale": "k_scale"}[last]
    for suffix in (last, "kv_scale") if last in modules.suffixes else ("kv_scale", other):
        if suffix in stored:
            expect(module, stored, suffix, PLAIN)
            record = stored[suffix]
            if math.prod(record.shape) != shape[0]:
                raise fault(
                    record, f"has shape {record.shape}, other layers have {shape[0]} scales"
                )
            modules.take(module, suffix)
            return Vector(name, shape, record)
    return None


def _check_all_used(
    files: TensorFiles,
    config: ModelConfig,
    modules: _Modules,
    ignored: frozenset[str],
    rename: Callable[[str], str | None],
) -> None:
    for tensor, record in files.tensors.items():
        if tensor not in modules.used and tensor not in ignored:
            raise CheckpointError(
                f"has no place in a {config.model_type} model of {config.num_layers} layers",
                file=record.file,
                field=tensor,
                offset=record.offset,
            )


def read(files: TensorFiles, piece: Piece) -> dict[str, np.ndarray]:
    """The arrays that a piece decodes from; views of the mapped files."""
    return {
        suffix: files.array(piece.stored[suffix].name)
        if files.is_plain(piece.stored[suffix].name)
        else files.raw(piece.stored[suffix].name)
        for suffix in piece.layer.reads
    }
