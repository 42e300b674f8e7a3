"""`load`: a checkpoint becomes a `Params`, one tensor at a time.

First everything is planned and checked from headers alone: which stored tensor fills which
parameter, with which shape. Only then is data touched. A weight stays in the mapped file where the
kernels read it as it is; one that is repacked is copied, and its pages are given back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from contextvars import copy_context
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qjax import ops
from qjax.checkpoint import native, orbax_folder, pieces, plan
from qjax.checkpoint.opened import Opened, open_folder, open_gguf, open_native
from qjax.checkpoint.targets import WHOLE, Targets, Wanted
from qjax.errors import CheckpointError, UnsupportedError
from qjax.models import functional
from qjax.models.config import ModelConfig
from qjax.params import Host, Params
from qjax.qarray import QArray


def load(
    source: str | os.PathLike[str],
    *,
    quantization: str | None = None,
    quantize_activations: bool = True,
    sharding: orbax_folder.Shard | None = None,
    mesh: Mesh | None = None,
    prepare: bool = True,
) -> Params:
    """Loads a model's weights as they are stored, on this machine's default device.

    Args:
      source: a GGUF file, a folder with config.json and safetensors, a name on the Hugging Face
        hub, or a built-in name.
      quantization: a method that is applied to a full-precision checkpoint as it is read, such as
        "fp8"; None takes the checkpoint as it is.
      quantize_activations: False leaves activations and cache unrounded where the method rounds
        them, which shows what that costs.
      sharding: of a folder in orbax's format: where each array is to lie, by its name and shape;
        weights then keep the layout in which they were saved.
      mesh: from `qjax.sharding.make_mesh`: devices that each get a part of the model. A process
        reads what its own devices want.
      prepare: False leaves weights of other files than orbax's in the order in which they are
        stored, for work on the weights themselves: they run, but slowly.

    Returns:
      Params; the tokenizer is loaded when it is first used.

    Raises:
      CheckpointError: a file is damaged, or a tensor is missing, superfluous or of a wrong shape.
      UnsupportedError: the architecture, or the type of a tensor, is not one that qjax runs.
      ShardingError: the model, or a weight, cannot be split over the mesh.
      DownloadError: the name is unknown, or it cannot be fetched.
    """
    from qjax.checkpoint.source import resolve

    found = resolve(source)
    path = Path(found.path)
    if found.kind == "orbax":
        if quantization is not None:
            raise UnsupportedError(f"{path}: quantization={quantization!r} needs safetensors")
        return _load_native(path, found.name, quantize_activations, sharding, mesh)
    if sharding is not None:
        raise UnsupportedError(
            f"{path}: sharding goes with folders in orbax's format; save it as one "
            '(format="orbax")'
        )
    if found.kind == "gguf":
        if quantization is not None:
            raise UnsupportedError(f"{path}: quantization={quantization!r} needs safetensors")
        opened = open_gguf(path, quantize_activations)
    else:
        pickled = found.kind == "pickle"
        opened = open_folder(path, quantization, quantize_activations, pickled)
    with closing(opened.files):
        places = opened.places()
        tree: dict[str, Any] = {}
        targets = None if mesh is None else Targets.of(mesh, opened.config)
        for name, leaf in _read_all(opened, places, targets, prepare):
            native.put(tree, name.split("."), leaf)
    host = Host(
        str(found.name), opened.load_tokenizer, opened.generation_config, opened.origin(places)
    )
    return Params(tree, opened.config, host, mesh)


def _load_native(
    folder: Path,
    name: str,
    quantize_activations: bool,
    sharding: orbax_folder.Shard | None,
    mesh: Mesh | None,
) -> Params:
    opened = open_native(folder, quantize_activations)
    targets = None if mesh is None else Targets.of(mesh, opened.config)
    tree: dict[str, Any] = {}
    scales: int = 0
    for path, leaf in orbax_folder.read(folder, sharding):
        if path[-1] in ("k_scale", "v_scale"):
            if not quantize_activations:
                continue
            scales = leaf.size
        if isinstance(leaf, QArray) and not quantize_activations:
            leaf = pieces.without_activation_quantization(leaf)
        if sharding is None:
            leaf = jax.block_until_ready(
                _native(leaf, ".".join(path), folder, opened.config, targets)
            )
        native.put(tree, path, leaf)
    host = Host(name, opened.load_tokenizer, opened.generation_config, opened.origin({}))
    params = Params(tree, replace(opened.config, kv_scales=scales), host, mesh)
    _require_all(params, folder)
    return params


def _native(
    leaf: Any, name: str, folder: Path, config: ModelConfig, targets: Targets | None
) -> Any:
    """A parameter from the host on its devices."""
    if not isinstance(leaf, QArray):
        return jax.device_put(leaf) if targets is None else targets.vector(name, np.asarray(leaf))
    weight = ops.unprepare(leaf)
    if targets is None:
        return jax.device_put(_prepared(name, weight, config))

    def read(wanted: Wanted) -> QArray:
        return _prepared(name, pieces.cut(weight, wanted, f"{folder}, {name}"), config)

    return targets.weight(name, read, weight.group)


def _require_all(params: Params, folder: Path) -> None:
    """Raises CheckpointError where the tree is not that of the model."""
    found = {".".join(path) for path, _ in native.leaves_of(params.tree)}
    expected = functional.parameter_shapes(params.config).keys()
    if odd := sorted(found ^ expected):
        what = "has no place in this model" if odd[0] in found else "is missing"
        raise CheckpointError(f"{what}", file=folder, field=odd[0])


def _prepared(name: str, weight: QArray, config: ModelConfig) -> QArray:
    """The weight as this machine's kernels like it."""
    # A table that is only looked up is read a row at a time, best where it lies.
    if name == "model.embed_tokens.weight" and not config.tie_word_embeddings:
        return weight
    return ops.prepare(weight)


def _read_all(
    opened: Opened, places: plan.Plan, targets: Targets | None, prepare: bool
) -> Iterator[tuple[str, Any]]:
    from tqdm import tqdm

    # Repacking is native code that lets go of the interpreter lock: two cores, half the time.
    workers = min(4, os.cpu_count() or 1)
    with (
        ThreadPoolExecutor(workers, "qjax-load") as pool,
        # Shown on a terminal only (disable=None), and only where loading takes its time.
        tqdm(total=len(places), desc="loading", delay=1.0, leave=False, disable=None) as bar,
    ):
        # Each task in a context of its own: `dispatch.use` holds in the pool's threads too.
        contexts = [copy_context() for _ in places]
        leaves = pool.map(
            lambda context, place: context.run(_read, opened, place, targets, prepare),
            contexts,
            places.values(),
        )
        try:
            for name, leaf in zip(places, leaves, strict=True):
                bar.update()
                yield name, leaf
        finally:
            pool.shutdown(cancel_futures=True)


def _read(
    opened: Opened, place: plan.Weight | plan.Vector, targets: Targets | None, prepare: bool
) -> QArray | jax.Array:
    """One parameter on its devices: a matrix as a QArray, anything else as float32."""
    if isinstance(place, plan.Vector):
        vector = _vector(opened, place)
        return jax.device_put(vector) if targets is None else targets.vector(place.name, vector)
    decoded = pieces.decoded(opened, place)

    def read(wanted: Wanted) -> QArray:
        weight = pieces.read(place, decoded, wanted)
        return _prepared(place.name, weight, opened.config) if prepare else weight

    if targets is not None:
        weight = targets.weight(place.name, read, decoded.group)
    else:
        weight = jax.device_put(read(WHOLE))
    # Not copied where the bytes lie as a device wants them (on a CPU, at a multiple of 64).
    weight = jax.block_until_ready(weight)
    if targets is not None or weight.layout != "canonical":
        for piece in place.pieces:
            for suffix in piece.layer.reads:
                opened.files.release(piece.stored[suffix].name)
    return weight


def _vector(opened: Opened, place: plan.Vector) -> np.ndarray:
    """A norm weight or a bias: float32, copied."""
    values = opened.files.array(place.record.name)
    if place.rows is not None:
        values = values[..., place.rows]
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise CheckpointError(
            "holds values that are not finite",
            file=place.record.file,
            field=place.record.name,
            offset=place.record.offset,
        )
    if place.name.endswith((".k_scale", ".v_scale")):
        values = np.where(values == -1, np.float32(1), values).reshape(place.shape)  # -1: not given
        if not (values > 0).all():
            raise CheckpointError("is not above 0", file=place.record.file, field=place.record.name)
        return values
    if place.name.endswith(".bias"):
        if not opened.rotated_pairs:
            return values
        order = pieces.pair_order(place.name, opened.config)
        return values if order is None else values[order]
    return values + np.float32(opened.norm_offset)
