"""`save`: a model becomes a folder that `load`, and other tools of the field, can read.

Each weight goes back to its canonical layout and through the format's `encode`. Only one weight is
held at a time: where the format's settings are to be derived from the weights, these are walked
twice. What was written is planned once more, from its headers, before it is put in place.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qjax.checkpoint import beside, gguf_writer, orbax_folder
from qjax.checkpoint.mapped import TensorFiles
from qjax.checkpoint.opened import open_folder
from qjax.checkpoint.places import Array, Module, each, walk
from qjax.checkpoint.plan import Origin
from qjax.checkpoint.safetensors_io import open_safetensors
from qjax.checkpoint.safetensors_writer import SHARD_BYTES, SafetensorsWriter
from qjax.checkpoint.save_plan import (
    DENSE,
    DTYPES,
    FORMATS,
    GGUF,
    ORBAX,
    STORED,
    Format,
    SavePlan,
    plain_values,
    plan_save,
)
from qjax.errors import CheckpointError, UnsupportedError
from qjax.formats import exact, kv_scales
from qjax.formats.base import Dense, QuantizationConfig, is_plain
from qjax.ops.dense import dequantized
from qjax.params import Params
from qjax.qarray import QArray


@dataclass
class Saved:
    """What was written.

    Attributes:
      folder: where.
      method: by its name, as in `quant_method`.
      exact: how many weights (layers and arrays) mean the same numbers as before.
      rounded: for every other, the largest relative change of one of its numbers.
      weights, nbytes: numbers of the model, and bytes that they take.
    """

    folder: Path
    method: str
    exact: int = 0
    rounded: dict[str, float] = field(default_factory=dict)
    weights: int = 0
    nbytes: int = 0

    def note(self, name: str, change: float, count: int) -> None:
        self.weights += count
        if change:
            self.rounded[name] = change
        else:
            self.exact += 1

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights


def save(
    params: Params,
    folder: str | os.PathLike[str],
    format: Format = None,
    *,
    dtype: str | None = None,
    dense: Sequence[str] = (),
    lossy: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Saved:
    """Writes a model as safetensors with config.json and its tokenizer.

    Args:
      params: from `load`, or with other weights in its tree; its source must still be there (the
        tokenizer is copied from it).
      folder: where to; must not exist, or be empty. It appears when all is written, or not at all.
      format: one of `FORMATS`, whose settings are then derived from the weights; or settings, as
        an object or as the dict of a config.json; None keeps the format that was loaded.
        "safetensors" (or "dense") dequantizes every weight. "gguf" writes one file, in the types
        that hold the same numbers; "orbax" keeps every weight as it is held.
      dtype: "float32", "bfloat16" or "float16": of what is not quantized. None keeps that, with
        float32 for what is dequantized.
      dense: layers to be dequantized: names, "re:" and a pattern, or a class ("Embedding"); each
        has to name one.
      lossy: whether numbers may be rounded to what the format holds (its scales, say).
      shard_bytes: a file of weights is ended before it grows beyond this.

    Raises:
      CheckpointError: the folder holds something, or the source has gone.
      UnsupportedError: the format cannot hold a weight, or is not written; or the model was loaded
        without what its method does to activations.
    """
    folder = Path(folder)
    origin = params.host.origin
    check(params, folder, format, dtype)
    if format == GGUF or (format is None and origin.folder is None):
        return _save_gguf(params, folder, dtype, dense)
    if format == ORBAX or (format is None and _is_native(origin)):
        return _save_native(params, folder, dtype, dense)
    job = plan_save(params, origin, format, dtype, tuple(dense), lossy)
    saved = Saved(folder, job.quantization.name)
    with _in_place(folder) as work:
        _write(job, work, shard_bytes, saved, compare=lossy)
        _check_readable(params, work)
    return saved


@contextmanager
def _in_place(folder: Path) -> Iterator[Path]:
    """A folder to write to, which becomes this one when the block ends, or vanishes if it fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.absolute().parent / f".{folder.name}.{secrets.token_hex(4)}.part"
    work.mkdir()
    try:
        yield work
        os.replace(work, folder)  # an empty folder of this name gives way
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _save_native(params: Params, folder: Path, dtype: str | None, dense: Sequence[str]) -> Saved:
    if dtype is not None or dense:
        raise UnsupportedError("orbax keeps weights as they are: dtype and dense are for others")
    total = params.summary().total
    saved = Saved(folder, ORBAX, total.tensors, weights=total.weights)
    with _in_place(folder) as work:
        beside.write(params.host.origin, work, True, None, None)
        saved.nbytes = orbax_folder.write(params, work)
    return saved


def _is_native(origin: Origin) -> bool:
    return isinstance(origin.quantization, orbax_folder.Native)


def _save_gguf(params: Params, file: Path, dtype: str | None, dense: Sequence[str]) -> Saved:
    if file.suffix != ".gguf":
        raise UnsupportedError(f"{file}: GGUF is one file, whose name has to end in .gguf")
    if dtype is not None or dense:
        raise UnsupportedError("GGUF: dtype and dense go with formats that are folders")
    gguf_writer.write(params, file)
    total = params.summary().total
    return Saved(file, GGUF, total.tensors, weights=total.weights, nbytes=file.stat().st_size)


def check(params: Params, folder: Path, format: Format, dtype: str | None = None) -> None:
    """Raises what `save` would before it looks at a weight."""
    origin = params.host.origin
    if isinstance(format, str) and format not in (*FORMATS, *DENSE):
        raise UnsupportedError(
            f"format {format!r:.80} is not one that is saved by name; these are: "
            f"{', '.join(FORMATS)}"
        )
    if format is not None and (format == GGUF) != (folder.suffix == ".gguf"):
        raise UnsupportedError(
            f"{folder}: format gguf is one file, whose name has to end in .gguf"
            if format == GGUF
            else f"{folder}: {format!r:.80} makes a folder, whose name cannot end in .gguf"
        )
    if dtype is not None and dtype not in DTYPES:
        raise UnsupportedError(f"dtype {dtype!r:.80} is not supported; {', '.join(DTYPES)} are")
    if dtype is not None and format in (GGUF, ORBAX):
        raise UnsupportedError(f"dtype: {format} keeps weights as they are; leave it out")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError("exists and is not an empty folder: nothing written", file=folder)
    if origin is None:
        where = params.source or "a model made in memory"
        raise UnsupportedError(
            f"{where}: only models that were loaded from files can be saved, since config and "
            "tokenizer are taken from there"
        )
    source = origin.folder or origin.file
    if not source.exists():
        raise CheckpointError(
            "has gone: config and tokenizer are taken from where the model was loaded", file=source
        )
    if not origin.quantize_activations and type(origin.quantization) is not Dense:
        raise UnsupportedError(
            f"{params.source}: was loaded with quantize_activations=False, so what its method does "
            "to activations would be lost; load it again to save it"
        )


def _write(job: SavePlan, work: Path, shard_bytes: int, saved: Saved, *, compare: bool) -> None:
    origin = job.origin
    quantization = None
    if job.changed and type(job.quantization) is not Dense:
        quantization = {"quant_method": job.quantization.name} | job.quantization.to_config()
    dtype = job.dtype
    if dtype is None and job.dense == ("re:.*",):
        dtype = "float32"
    beside.write(origin, work, job.changed, quantization, dtype)
    with closing(_open(origin)) as files:
        texts = {} if job.changed or origin.folder is None else files.metadata
        kept = {key: text for key, text in texts.items() if isinstance(text, str)}
        writer = SafetensorsWriter(work, {"format": "pt"} | kept, shard_bytes)
        try:
            for name, array in _tensors(job, files, saved, compare):
                writer.add(name, array)
                saved.nbytes += array.nbytes
            for name in sorted(origin.ignored):
                if origin.folder is not None and not (job.changed and kv_scales.is_other(name)):
                    writer.add(name, files.array(name))
            writer.close()
        finally:
            writer.abandon()


def _open(origin: Origin) -> TensorFiles:
    if origin.folder is None:
        from qjax.checkpoint.gguf_io import read_gguf

        return read_gguf(Path(str(origin.file)))
    if _is_native(origin):
        return TensorFiles(origin.folder, {}, {}, {})
    if any(origin.folder.glob("*.safetensors")):
        return open_safetensors(origin.folder)
    from qjax.checkpoint.unpickle import open_pickled

    return open_pickled(origin.folder)


def _tensors(
    job: SavePlan, files: TensorFiles, saved: Saved, compare: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the model by the name it is stored under."""
    config = job.params.config
    # Gemma's files hold its norms less one.
    origin = job.origin
    as_stored = origin.folder is not None and not _is_native(origin)
    offset = origin.norm_offset if as_stored else float(config.post_norms)
    for place, value in walk(job.params, job.places):
        if isinstance(place, Array):
            array = _array(place, value, np.float32(offset), job.dtype)
            saved.note(place.tensor, 0.0, array.size)
            yield place.tensor, array
            continue
        for module, weight in each(place, value):
            stored = job.written(module.name, weight)
            change = _change(weight, stored) if compare or is_plain(stored) else 0.0
            saved.note(module.name, change, weight.shape[0] * weight.shape[1])
            written = _encode(module, stored, job.quantization)
            for suffix, array in written.items():
                yield module.tensor(suffix), array
            # What is not needed here, other engines may read.
            for suffix in () if job.changed else module.unread:
                if suffix in module.tensors and suffix not in written:
                    name = module.tensors[suffix]
                    yield name, files.array(name)


def _array(place: Array, values: np.ndarray, offset: np.float32, dtype: str | None) -> np.ndarray:
    """A norm, a bias or a scale in the dtype that was asked for, or that it had; as float32 where
    that would change it, as it does what a scale was folded into."""
    values = values.astype(np.float32).reshape(place.shape)
    last = place.tensor.rpartition(".")[2]
    scale = last in ("k_scale", "v_scale")
    plain = scale or last in ("bias", "sinks") or not offset
    less = values if plain else values - offset
    stored = less.astype(DTYPES[STORED[place.qtype] if scale else dtype or STORED[place.qtype]])
    back = stored.astype(np.float32)
    same = np.array_equal(back if plain else back + offset, values)
    return stored if same or (dtype and not scale) else less


def _change(before: QArray, after: QArray) -> float:
    """The largest relative change of a number of a weight by being stored otherwise."""
    if after is before:
        return 0.0
    return exact.relative_change(dequantized(before), dequantized(after))


def _encode(
    module: Module, weight: QArray, quantization: QuantizationConfig
) -> dict[str, np.ndarray]:
    if not is_plain(weight):
        return quantization.encode(module.name, weight)
    values = plain_values(weight)
    return {"weight": values.swapaxes(-1, -2) if module.transposed else values}


def _check_readable(params: Params, work: Path) -> None:
    """Plans what was written: no files are left that their own format would refuse."""
    origin = params.host.origin
    opened = open_folder(work, None, origin.quantize_activations, pickled=False)
    with closing(opened.files):
        opened.places()
