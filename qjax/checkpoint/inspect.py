"""What a checkpoint is and what it will take to run it, from its headers alone."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from qjax.checkpoint.gguf_config import gguf_config
from qjax.checkpoint.gguf_io import GGUFFile, read_gguf
from qjax.checkpoint.mapped import TensorFiles
from qjax.checkpoint.safetensors_io import open_safetensors, parse_json
from qjax.checkpoint.source import Source, resolve
from qjax.errors import UnsupportedError
from qjax.models.config import ModelConfig, model_config
from qjax.qtypes import QTYPES

_CGROUP = Path("/sys/fs/cgroup")
_BF16_BYTES = 2


@dataclass(frozen=True)
class TypeUse:
    """All tensors of one stored type: how many, with how many elements, in how many bytes."""

    qtype: str
    tensors: int
    elements: int
    nbytes: int


@dataclass(frozen=True)
class Summary:
    """A checkpoint in numbers.

    Attributes:
      source: where it was found.
      architecture: as the file names it, "" where it does not.
      license: "" where unknown.
      types: by stored type, the one that takes most bytes first.
      parameters: elements of all tensors.
      nbytes: bytes of all tensors, which is what the weights take in memory.
      context_length: tokens the model was trained for, or None.
      kv_bytes_per_token: of a bfloat16 cache, over all layers, or None.
      free_memory: bytes that this process may still take, or None where the system does not say.
      problem: why qjax cannot run it, or None.
    """

    source: Source
    architecture: str
    license: str
    types: tuple[TypeUse, ...]
    parameters: int
    nbytes: int
    context_length: int | None
    kv_bytes_per_token: int | None
    free_memory: int | None
    problem: str | None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each element, scales and padding included."""
        return 8 * self.nbytes / max(1, self.parameters)

    @property
    def tokens_that_fit(self) -> int | None:
        """Tokens of context, over all sequences, that fit in the free memory beside the weights."""
        if self.free_memory is None or self.kv_bytes_per_token is None:
            return None
        return max(0, self.free_memory - self.nbytes) // self.kv_bytes_per_token


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

    config, problem = None, None
    try:
        config = _config(source, files)
        unknown = [use.qtype for use in types if use.qtype not in QTYPES]
        if unknown:
            problem = f"tensors of type {', '.join(unknown)} are not supported"
    except UnsupportedError as error:
        problem = str(error)
    architecture = files.metadata.get("general.architecture", "")
    return Summary(
        source=source,
        architecture=architecture or (config.model_type if config else ""),
        license=source.license or files.metadata.get("general.license", ""),
        types=tuple(types),
        parameters=sum(use.elements for use in types),
        nbytes=sum(use.nbytes for use in types),
        context_length=config.max_position_embeddings if config else None,
        kv_bytes_per_token=_kv_bytes_per_token(config) if config else None,
        free_memory=free_memory(),
        problem=problem,
    )


def _config(source: Source, files: TensorFiles) -> ModelConfig:
    if isinstance(files, GGUFFile):
        fields, shown = gguf_config(files)
        return model_config(fields, file=files.path, shown=shown)
    folder = source.path if source.path.is_dir() else source.path.parent
    file = folder / "config.json"
    if not file.is_file():
        raise UnsupportedError(f"{folder} has no config.json, which says what the model is")
    return model_config(parse_json(file.read_bytes(), file, "config", 0), file=os.fspath(file))


def _kv_bytes_per_token(config: ModelConfig) -> int:
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * _BF16_BYTES


def free_memory() -> int | None:
    """Bytes that can be taken without swapping: of the machine, and of the container if less."""
    amounts = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                amounts.append(int(line.split()[1]) * 1024)
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            used = int((_CGROUP / "memory.current").read_text())
            # Pages of files are given up before the limit is met.
            statistics = (_CGROUP / "memory.stat").read_text().split()
            used -= int(statistics[statistics.index("inactive_file") + 1])
            amounts.append(max(0, int(limit) - used))
    except (OSError, ValueError, IndexError):
        pass  # another system, or a container that hides it
    return min(amounts, default=None)
