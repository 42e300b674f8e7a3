"""Which quantization method a checkpoint uses, and what its configuration says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qjax.checkpoint.mapped import TensorFiles
from qjax.errors import CheckpointError, UnsupportedError
from qjax.formats.base import Checkpoint, Dense, QuantizationConfig
from qjax.registry import quantization_config

_LARGEST_JSON = 1 << 24
# Files beside config.json that hold what it may leave out, in the order in which they are tried.
SIDE_FILES = (
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
)
# What a file beside config.json must say too, where both say it: without these, weights are read
# wrongly.
_AGREED = frozenset(
    {
        *("bits", "group_size", "sym", "desc_act", "zero_point"),
        *("checkpoint_format", "packing_format", "quant_algo", "kv_cache_quant_algo"),
    }
)


def quantization(
    folder: Path, fields: Mapping[str, Any], files: TensorFiles, online: str | None
) -> QuantizationConfig:
    """The format of a folder of safetensors.

    Args:
      fields: of its config.json.
      online: a method to apply to full-precision weights while they are read, or None.

    Raises:
      CheckpointError: the configuration is damaged or contradicts itself.
      UnsupportedError: the method, or one of its settings, is not supported.
    """
    found, file = find(folder, fields)
    if found is None and online is None:
        return Dense()
    if found is not None and online is not None:
        raise CheckpointError(
            f"is quantized already; quantization={online!r} needs full-precision weights", file=file
        )
    method = _method(found, file) if found is not None else str(online)
    dtype = fields.get("dtype") or fields.get("torch_dtype") or ""
    checkpoint = Checkpoint(
        str(file),
        files.tensors,
        files.metadata,
        files.array,
        str(fields.get("model_type", "")),
        str(dtype).removeprefix("torch."),
    )
    read = quantization_config(method, str(file)).from_config(found or {}, checkpoint)
    if found is None and not read.quantizes_weights:
        raise UnsupportedError(
            f"quantization={online!r}: a checkpoint must say what {online} is to do; 'fp8' says it "
            "all, and `qjax quantize` makes the others"
        )
    return read


def find(folder: Path, fields: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, Path]:
    """A folder's quantization config, or None, and the file that holds it."""
    file = folder / "config.json"
    text = fields.get("text_config")
    for found in (
        fields.get("quantization_config"),
        text.get("quantization_config") if isinstance(text, Mapping) else None,
        fields.get("compression_config"),
    ):
        if found is not None:
            if not isinstance(found, Mapping):
                raise CheckpointError(
                    "must be a mapping of names to values", file=file, field="quantization_config"
                )
            _require_agreement(folder, found)
            return found, file
    for name in SIDE_FILES:
        if (folder / name).is_file():
            return read_json(folder / name), folder / name
    return None, file


def _require_agreement(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuses a file beside config.json that says something else of what both speak of."""
    for name in SIDE_FILES:
        if not (folder / name).is_file():
            continue
        beside = read_json(folder / name)
        section = beside.get("quantization")  # of ModelOpt
        beside = {**beside, **(section if isinstance(section, Mapping) else {})}
        for key in _AGREED & config.keys() & beside.keys():
            if _folded(config[key]) != _folded(beside[key]):
                raise CheckpointError(
                    f"is {beside[key]!r:.80}, but config.json says {config[key]!r:.80}",
                    file=folder / name,
                    field=key,
                )


def _folded(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _method(config: Mapping[str, Any], file: Path) -> str:
    """The method's name, also where old files do not give it."""
    method = config.get("quant_method")
    if method is None:
        producer = config.get("producer")
        if isinstance(producer, Mapping) and producer.get("name") == "modelopt":
            return "modelopt"
        if str(config.get("quant_library", "")).lower() == "modelopt":
            return "modelopt"
        if "config_groups" in config or isinstance(config.get("quantization_config"), Mapping):
            return "compressed-tensors"  # in compression_config, which needs no name
        if config.get("is_marlin_format"):
            return "marlin"
        if config.get("load_in_4bit") or config.get("load_in_8bit"):
            return "bitsandbytes"
        if file.name == "quantize_config.json" and "bits" in config:
            return "gptq"
        if file.name == "quant_config.json" and {"w_bit", "bits"} & config.keys():
            return "awq"
        if "group_size" in config and {"bits", "mode"} & config.keys():
            raise UnsupportedError(
                f"{file}: a checkpoint that mlx-lm has quantized, which qjax does not read; take "
                "the model that it was made of, or what `mlx_lm.convert --dequantize` makes of it"
            )
    if not isinstance(method, str):
        raise CheckpointError(
            f"{method!r:.80} does not name a method", file=file, field="quant_method"
        )
    return method


def read_json(file: Path) -> dict[str, Any]:
    try:
        with open(file, "rb") as stream:
            data = stream.read(_LARGEST_JSON + 1)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=file) from error
    if len(data) > _LARGEST_JSON:
        raise CheckpointError(f"is larger than {_LARGEST_JSON} bytes", file=file)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not valid JSON: {error}", file=file) from error
    if not isinstance(content, dict):
        raise CheckpointError("is not a JSON object", file=file)
    return content


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
