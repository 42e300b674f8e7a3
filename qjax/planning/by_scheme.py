"""A model's weights without their numbers, as a quantization scheme would make them.

That takes its config alone: no checkpoint of it need be here, or exist.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.codes import row_bytes
from pallas_kernels.matmul.spec import WeightSpec
from qjax.checkpoint import native
from qjax.checkpoint.detect import read_json
from qjax.checkpoint.gguf_io import read_gguf
from qjax.checkpoint.opened import gguf_model
from qjax.checkpoint.source import resolve_config
from qjax.compress.grid import Grid
from qjax.compress.recipe import parse
from qjax.compress.rounding import grid_of
from qjax.compress.shorthand import modifiers_for
from qjax.compress.steps import plan
from qjax.formats.ct_config import act_spec
from qjax.models.config import ModelConfig, model_config
from qjax.models.functional import parameter_shapes
from qjax.planning.hollow import hollow
from qjax.qarray import QArray
from qjax.qtypes import QTYPES
from qjax.scheme import QuantizationScheme

_DENSE = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def by_scheme(
    source: str | os.PathLike[str], scheme: str, group_size: int | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """A model's config, and its `hollow_tree`, quantized to nearest by a preset.

    Args:
      source: as of `qjax.load`, or a config.json; of a name on the hub only that is fetched.
      scheme: "W4A16", "FP8_DYNAMIC", "Q4_K_M" ..., or "UNQUANTIZED".
      group_size: of the scheme's groups, where it is another.

    Raises:
      RecipeError: there is no such scheme, or it does not divide a layer.
      CheckpointError, UnsupportedError, DownloadError: as by `qjax.load`.
    """
    file = resolve_config(source)
    fields: Mapping[str, Any] = {}
    if file.suffix == ".gguf":
        with read_gguf(file) as files:
            config = gguf_model(files)
    else:
        fields = read_json(file)
        config = model_config(fields, file=os.fspath(file))
    inner = fields.get("text_config") or {}
    told = [each.get(name) for each in (fields, inner) for name in ("dtype", "torch_dtype")]
    dtype = next((each for each in told if each in _DENSE), "bfloat16")
    (step,) = plan(parse(modifiers_for(scheme, group_size=group_size)), config)
    tree: dict[str, Any] = {}
    known: dict[tuple, QArray] = {}
    for name, shape in parameter_shapes(config).items():
        module = name.removesuffix(".weight")
        qtype, own = step.types.get(module), step.schemes.get(module)
        if name == module or len(shape) < 2:
            leaf = hollow(shape, np.float32)
        elif (key := (shape, qtype, own)) in known:
            leaf = known[key]
        elif qtype is None and own is not None:
            leaf = known[key] = _coded(shape, own, dtype)
        else:
            leaf = known[key] = _blocks(shape, qtype or _DENSE[dtype])
        native.put(tree, name.split("."), leaf)
    return config, tree


def _blocks(shape: tuple[int, ...], qtype: str) -> QArray:
    *lead, n, k = shape
    return QArray(hollow((*lead, n, QTYPES[qtype].row_bytes(k)), np.uint8), qtype, (n, k))


def _coded(shape: tuple[int, ...], scheme: QuantizationScheme, dtype: str) -> QArray:
    *lead, n, k = shape
    grid: Grid = grid_of(scheme, shape, dtype)
    spec = WeightSpec(grid.qtype, (n, k), group=grid.group)
    scales = (*lead, *spec.scale_shape)
    stored = {"e8m0": "float8_e8m0fnu", "fp8_e4m3": "float8_e4m3fn"}.get(grid.scale, grid.scale)
    aux = {}
    if grid.scale == "fp8_e4m3":
        aux["global_scale"] = hollow((*lead, 1, 1), np.float32)
    act = None
    if scheme.input_activations is not None:
        act = act_spec(scheme.input_activations)
        if act.scale == "fp8_e4m3":
            aux["act_global_scale"] = hollow((*lead, 1, 1), np.float32)
        elif not act.dynamic:
            aux["act_scale"] = hollow((*lead, 1, 1), np.float32)
            if not act.symmetric:
                aux["act_zero_point"] = hollow((*lead, 1, 1), np.float32)
    return QArray(
        hollow((*lead, n, row_bytes(grid.qtype, k)), np.uint8),
        grid.qtype,
        (n, k),
        scale=hollow(scales, jnp.dtype(stored)),
        zero_point=None if grid.symmetric else hollow(scales, np.uint8),
        aux=aux,
        group=grid.group,
        act=act,
    )
