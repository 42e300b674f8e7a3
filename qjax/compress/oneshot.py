"""`oneshot`: a model and a recipe in, a quantized model out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qjax import ops
from qjax.checkpoint import saver
from qjax.checkpoint.imatrix import read_imatrix
from qjax.checkpoint.loader import load
from qjax.checkpoint.save_plan import DENSE, GGUF, ORBAX
from qjax.compress import dataset as datasets
from qjax.compress import layers
from qjax.compress.algorithms import ggml
from qjax.compress.budget import within_budget
from qjax.compress.hidden import TOKENS
from qjax.compress.modifiers import Modifier, QuantizationMixin
from qjax.compress.presets import is_preset
from qjax.compress.recipe import parse
from qjax.compress.rotation import folded
from qjax.compress.shorthand import modifiers_for
from qjax.compress.state import Finished, State
from qjax.compress.steps import Step, plan, touches
from qjax.compress.walk import check, walk
from qjax.engine import compile_cache
from qjax.errors import RecipeError, UnsupportedError
from qjax.models.config import ModelConfig
from qjax.params import PLAIN, Params
from qjax.qarray import QArray

# What scales of integers are stored as: by format, else as the model's own weights are, and where
# these do not tell as bfloat16.
_SCALES = {"gptq": "float16", "awq": "float16"}
_DTYPES = ("float32", "bfloat16", "float16")


def oneshot(
    model: Params | str | os.PathLike[str],
    recipe: Any,
    dataset: Any = None,
    output_dir: str | os.PathLike[str] | None = None,
    *,
    num_calibration_samples: int | None = None,
    max_seq_length: int | None = None,
    shuffle_calibration_samples: bool = True,
    text_column: str = "text",
    splits: str | Mapping[str, str] | None = None,
    dataset_config_name: str | None = None,
    seed: int = 0,
    imatrix: str | os.PathLike[str] | None = None,
    format: str | None = None,
    dtype: str | None = None,
    progress: bool = True,
    on_layer: Callable[[Finished], None] | None = None,
) -> Params:
    """Quantizes a model.

    Layer by layer: each one is looked at with the samples, quantized, and run once more, so that
    the next one is made for the inputs that it will have. Rounding to nearest that only needs
    ranges of inputs looks at the model as it is. Recipes that need no samples are done without.

    Args:
      model: from `qjax.load`, or what that takes. Weights that are quantized already are taken as
        the numbers that they stand for.
      recipe: in the schema of LLM Compressor: YAML text, a file, a dict, a modifier, or a list of
        modifiers; or the name of a preset ("W4A16", "FP8_DYNAMIC", "Q4_K_M").
      dataset: samples, see `qjax.compress.dataset.tokens`: a text or jsonl file, token ids, a list
        of strings, a data set on the hub; None for text that the model itself writes.
      output_dir: where the model is saved; must not exist, or be empty. If this run is stopped,
        the same call goes on where it was; None saves nothing.
      num_calibration_samples, max_seq_length, shuffle_calibration_samples, text_column, splits,
        dataset_config_name, seed: of the samples.
      imatrix: an importance matrix of llama.cpp, by which types of GGUF weigh columns instead of by
        samples.
      format: what it is saved as, see `qjax.save`; None for GGUF where the recipe has types of it,
        else "compressed-tensors".
      dtype: of what is saved and not quantized, see `qjax.save`; None leaves it, with float32 for
        what came quantized.
      progress: shows a bar, and after each layer what it lost.
      on_layer: called with each layer that is finished.

    Returns:
      The quantized model, to run, save or evaluate.

    Raises:
      RecipeError: the recipe does not fit the model or contradicts itself; found before any work.
      CalibrationError: the samples are of no use to a method.
      CheckpointError: `output_dir` holds something.
      UnsupportedError: the model is split over a mesh.
    """
    compile_cache.enable()
    modifiers = _modifiers(recipe)
    folder = None if output_dir is None else Path(output_dir)
    sampled = any(modifier.requires_calibration_data for modifier in modifiers)
    # Without samples the model does not run, and only its weights are wanted.
    params = model if isinstance(model, Params) else load(model, prepare=sampled)
    if params.mesh is not None:
        raise UnsupportedError(
            f"{params.source}: is split over several devices; load it without a mesh to quantize "
            "it (batches are shared out among all devices of this process anyway)"
        )
    rotations = folded(modifiers, params.config)
    squares = {}
    if imatrix is not None:
        read = read_imatrix(imatrix, params.config)
        squares = {module: each.mean for module, each in read.items()}
    steps = plan(modifiers, params.config, squares)
    if imatrix is not None and not any(step.types for step in steps):
        raise RecipeError("imatrix: this recipe has no type of GGUF, which alone goes by it")
    chosen = format or _format(steps)
    if folder is not None:
        saver.check(params, folder, chosen, dtype)
    few = all(each.few_samples_do for each in modifiers)
    tokens = None
    if sampled:
        tokens = datasets.tokens(
            params,
            dataset,
            num_calibration_samples,
            max_seq_length,
            shuffle=shuffle_calibration_samples,
            seed=seed,
            text_column=text_column,
            splits=splits,
            dataset_config_name=dataset_config_name,
            few=few,
            progress=progress,
        )
        if not few or tokens.size > TOKENS:  # else the walk tells as soon
            check(params, tokens[0])
    cache = _cache_scheme(modifiers)
    scale_dtype = _SCALES.get(chosen) or _own_dtype(params)
    steps = within_budget(steps, params, tokens, rotations, scale_dtype, progress)
    shapes = layers.modules(params.config)
    ggml.compile_ahead(
        {(kind, shapes[name]) for step in steps for name, kind in step.types.items()}
    )
    state = None
    if folder is not None:
        state = State.beside(folder, _fingerprint(params, modifiers, tokens, scale_dtype))
    walked = walk(
        params,
        steps,
        tokens,
        scale_dtype=scale_dtype,
        cache_scales=cache,
        state=state,
        rotations=rotations,
        as_it_is=few and not cache,
    )
    config = params.config
    if cache:
        config = replace(config, kv_scales=1)
    if rotations is not None and rotations.stream is not None:
        config = replace(config, tie_word_embeddings=False)
    with closing(walked) as finished:  # if it is interrupted, what is being kept is kept first
        result = _collected(params, _shown(finished, params, progress, on_layer), config)
    if folder is not None:
        dense = _left_alone(result, steps, chosen)
        saver.save(result, folder, format=chosen, dtype=dtype, dense=dense)
    if state is not None:
        state.remove()
    return result


def _own_dtype(params: Params) -> str:
    """The dtype in the model's config.json."""
    fields = {} if params.host.origin is None else params.host.origin.fields
    inner = fields.get("text_config") or {}
    told = (each.get(name) for each in (fields, inner) for name in ("dtype", "torch_dtype"))
    return next((dtype for dtype in told if dtype in _DTYPES), "bfloat16")


def _modifiers(recipe: Any) -> tuple[Modifier, ...]:
    if isinstance(recipe, str) and is_preset(recipe):
        return parse(modifiers_for(recipe))
    return parse(recipe)


def _format(steps: Sequence[Step]) -> str:
    return "gguf" if any(step.types for step in steps) else "compressed-tensors"


def _left_alone(params: Params, steps: Sequence[Step], format: str) -> list[str]:
    """Layers that came quantized and that no step rounds; most formats hold but one kind of codes,
    and get their numbers as floats."""
    if format in (*DENSE, GGUF, ORBAX):
        return []
    held = layers.flat(params.tree).items()
    quantized = [n for n, leaf in held if isinstance(leaf, QArray) and leaf.qtype not in PLAIN]
    names = [name.removesuffix(".weight") for name in quantized]
    return [name for name in names if not touches(steps, name)]


def _cache_scheme(modifiers: Sequence[Modifier]) -> bool:
    """Whether keys and values get scales."""
    return any(
        isinstance(modifier, QuantizationMixin) and modifier.kv_cache_scheme is not None
        for modifier in modifiers
    )


def _fingerprint(
    params: Params, modifiers: Sequence[Modifier], tokens: np.ndarray | None, scale_dtype: str
) -> str:
    """Tells runs apart that do not come to the same."""
    found = hashlib.sha256(repr((modifiers, scale_dtype, params.source, params.config)).encode())
    if tokens is not None:
        found.update(str(tokens.shape).encode() + np.ascontiguousarray(tokens).tobytes())
    # The weights themselves would take too long to read: some of each will do.
    for leaf in jax.tree.leaves(params.tree):
        on_host = np.asarray(leaf) if jax.default_backend() == "cpu" else leaf  # without a copy
        found.update(np.asarray(on_host.reshape(-1)[:64]).tobytes())
    return found.hexdigest()[:12]


def _shown(
    finished: Iterator[Finished],
    params: Params,
    progress: bool,
    on_layer: Callable[[Finished], None] | None,
) -> Iterator[Finished]:
    """The same, with a bar that shows the error of the last layer."""
    from tqdm import tqdm

    # Shown on a terminal only (disable=None).
    with tqdm(
        total=params.config.num_layers, desc="quantizing", disable=None if progress else True
    ) as bar:
        for done in finished:
            if on_layer is not None:
                on_layer(done)
            if done.errors:
                worst = max(done.errors, key=lambda name: done.errors[name])
                bar.set_postfix_str(f"{worst} {done.errors[worst]:.2e}")
            if done.index is not None:
                bar.update()
            yield done


def _collected(params: Params, finished: Iterator[Finished], config: ModelConfig) -> Params:
    """The model with its new weights, where its kernels want them."""
    new: dict[str, Any] = {}
    for done in finished:
        new |= {name: _ready(name, leaf, config) for name, leaf in done.tree.items()}
    old = layers.flat(params.tree)
    kept = {n: new[n] if n in new else _ready(n, leaf, config) for n, leaf in old.items()}
    tree = layers.nested(kept | new)
    return Params(tree, config, replace(params.host, key_bases={}))


def _ready(name: str, leaf: Any, config: ModelConfig) -> Any:
    if not isinstance(leaf, QArray):
        return jax.numpy.asarray(leaf)
    if leaf.layout != "canonical":
        return leaf  # as it was
    if name == f"{layers.EMBEDDING}.weight" and not config.tie_word_embeddings:
        return jax.device_put(leaf)  # only looked up
    return jax.device_put(ops.prepare(jax.tree.map(np.asarray, leaf)))
