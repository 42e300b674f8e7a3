"""llama.cpp's importance matrices: the mean square of every input column of every weight.

llama-imatrix sums the squares of what each matrix is multiplied by over a text, and llama-quantize
weights rounding errors with the means. Files of today are GGUF: of each tensor the sums,
"<name>.in_sum2" float32 [K], or [experts, K], and the numbers of rows summed, "<name>.counts"
float32 [1], or [experts, 1]. Older ones (".dat") hold, little-endian, int32
entries, and of each int32 length and bytes of its name, int32 calls, int32 values, and float32
values, which are means times calls; then maybe int32 chunks, and int32 length and bytes of the name
of the text.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from qjax.checkpoint.gguf_io import MAGIC, read_gguf
from qjax.checkpoint.gguf_stream import GGUFStream
from qjax.checkpoint.mapped import map_file
from qjax.checkpoint.names import gguf_tensor
from qjax.errors import CheckpointError, UnsupportedError
from qjax.models import functional
from qjax.models.config import ModelConfig

_SUMS, _COUNTS = ".in_sum2", ".counts"
_INT = struct.Struct("<i")


class Squares(NamedTuple):
    """Of the inputs of one weight.

    Attributes:
      mean: float32 [K], or [experts, K].
      rows: how many, float32 [] or [experts].
    """

    mean: np.ndarray
    rows: np.ndarray


def read_imatrix(path: str | os.PathLike[str], config: ModelConfig) -> dict[str, Squares]:
    """Reads a file of either kind.

    Args:
      config: of the model that it was made with.

    Returns:
      By module ("model.layers.0.mlp.down_proj"), for those that the file knows. An expert that no
      row went to has means of 1, as in llama-quantize. (Of a ".dat" file rows are calls.)

    Raises:
      CheckpointError: the file is damaged, or of another model.
    """
    path = Path(path)
    with open(path, "rb") if path.is_file() else _missing(path) as file:
        magic = file.read(len(MAGIC))
    entries = _from_gguf(path) if magic == MAGIC else _from_dat(path)
    found: dict[str, Squares] = {}
    used: set[str] = set()
    for name, shape in functional.parameter_shapes(config).items():
        tensor = gguf_tensor(name, config)
        if not name.endswith(".weight") or len(shape) < 2 or tensor not in entries:
            continue
        used.add(tensor)
        sums, counts = entries[tensor]
        wanted = (*shape[:-2], shape[-1])
        if sums.size != int(np.prod(wanted)) or len(counts) not in (1, *shape[:-2]):
            raise CheckpointError(
                f"has {sums.size} values of {len(counts)} matrices where the model's weight "
                f"{shape} asks for {int(np.prod(wanted))}",
                file=path,
                field=tensor,
            )
        if not (np.isfinite(sums).all() and (sums >= 0).all() and (counts >= 0).all()):
            raise CheckpointError(
                "a sum of squares is negative or not finite", file=path, field=tensor
            )
        rows = np.broadcast_to(counts, shape[:-2]) if len(shape) > 2 else counts.reshape(())
        per = rows[..., None]
        mean = np.where(per > 0, sums.reshape(wanted) / np.where(per > 0, per, 1), 1)
        found[name.removesuffix(".weight")] = Squares(mean.astype(np.float32), rows)
    strange = sorted(entries.keys() - used)
    if strange or not found:
        what = strange[0] if strange else None
        raise CheckpointError(
            f"has no place in a {config.model_type} model of {config.num_layers} layers",
            file=path,
            field=what,
        )
    return found


def write_imatrix(
    path: str | os.PathLike[str],
    squares: Mapping[str, Squares],
    config: ModelConfig,
    *,
    datasets: Sequence[str] = (),
    chunk_size: int = 512,
) -> None:
    """Writes a file of today's kind, which llama-quantize reads.

    Args:
      squares: by module.
      datasets: names of the texts.
      chunk_size: tokens of a sample.

    Raises:
      CheckpointError: the file exists.
      UnsupportedError: a module that no GGUF file of such a model has.
    """
    path = Path(path)
    if path.exists():
        raise CheckpointError("exists: nothing written", file=path)
    arrays: dict[str, np.ndarray] = {}
    for module, (mean, rows) in squares.items():
        tensor = gguf_tensor(f"{module}.weight", config)
        if tensor is None:
            raise UnsupportedError(
                f"{module}: GGUF files of {config.model_type} have no place for it"
            )
        counts = np.asarray(rows, np.float32)[..., None]
        arrays[tensor + _SUMS] = np.asarray(mean, np.float32) * counts
        arrays[tensor + _COUNTS] = counts
    most = max((float(np.max(rows)) for _, rows in squares.values()), default=0)
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": list(datasets),
        "imatrix.chunk_count": -(-int(most) // chunk_size),
        "imatrix.chunk_size": chunk_size,
    }
    shapes = [(name, array.shape) for name, array in arrays.items()]
    with GGUFStream(path, metadata, shapes) as stream:
        for name, array in arrays.items():
            stream.add(name, "f32", array)


def _missing(path: Path) -> NoReturn:
    raise CheckpointError("no such file", file=path)


def _from_gguf(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Sums [all values] and counts [matrices] by tensor."""
    with read_gguf(path) as file:
        entries = {}
        for name, record in file.tensors.items():
            if not name.endswith(_SUMS):
                continue
            tensor = name.removesuffix(_SUMS)
            other = file.tensors.get(tensor + _COUNTS)
            if other is None or {record.qtype, other.qtype} != {"f32"}:
                raise CheckpointError("has no counts, or is not float32", file=path, field=name)
            sums, counts = (np.array(file.array(n)).ravel() for n in (name, tensor + _COUNTS))
            entries[tensor] = sums, counts
    if not entries:
        raise CheckpointError(
            f"holds no tensors {_SUMS!r}: a GGUF file, but no importance matrix", file=path
        )
    return entries


def _from_dat(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    buffer = map_file(path, _INT.size)
    at = 0

    def fail(reason: str) -> NoReturn:
        raise CheckpointError(f"{reason}: no importance matrix", file=path, offset=at)

    def take(size: int) -> bytes:
        nonlocal at
        if not 0 <= size <= len(buffer) - at:
            fail(f"{size} bytes where {len(buffer) - at} are left")
        at += size
        return buffer[at - size : at]

    def integer() -> int:
        return _INT.unpack(take(_INT.size))[0]

    entries: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    count = integer()
    if not 0 < count <= len(buffer) // 16:
        fail(f"announces {count} entries")
    for _ in range(count):
        name = take(integer())
        calls, values = integer(), integer()
        sums = np.frombuffer(take(4 * values), "<f4").astype(np.float32)
        try:
            entries[name.decode()] = sums, np.array([calls], np.float32)
        except UnicodeDecodeError:
            fail("a name is not UTF-8")
    buffer.close()
    return entries
