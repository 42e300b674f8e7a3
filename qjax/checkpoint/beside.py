"""What lies beside the weights of a saved model: config.json, tokenizer, terms of use."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from qjax.checkpoint import detect
from qjax.checkpoint.gguf_io import read_gguf
from qjax.checkpoint.hf_config import hf_config
from qjax.checkpoint.plan import Origin
from qjax.checkpoint.tokenizer_json import write_tokenizer

_COPIED = (
    *("generation_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template*", "*.model", "*.tiktoken"),
    *("preprocessor_config.json", "processor_config.json", "LICENSE*", "NOTICE*"),
)
_CONFIGS = ("quantization_config", "compression_config")
_DTYPES = ("dtype", "torch_dtype")  # of transformers 5, and before


def model_dtype(origin: Origin) -> str:
    """What a model is computed in, as its config.json says; float32 where nothing does."""
    found = next((origin.fields[key] for key in _DTYPES if origin.fields.get(key)), "float32")
    return str(found).removeprefix("torch.")


def write(
    origin: Origin,
    folder: Path,
    changed: bool,
    quantization: Mapping[str, Any] | None,
    dtype: str | None,
) -> None:
    """Writes all of it.

    Args:
      origin: where the model came from.
      folder: where to.
      changed: whether the format is another than that of the origin.
      quantization: its quantization_config; None for a model that is not quantized.
      dtype: of the model, where it changes.
    """
    if origin.folder is None:
        fields = _from_gguf(Path(str(origin.file)), folder)
    else:
        fields = origin.fields
        _copy(origin.folder, folder, changed)
    if not changed:
        return
    fields = {key: value for key, value in fields.items() if key not in _CONFIGS}
    if isinstance(text := fields.get("text_config"), Mapping):
        fields["text_config"] = {k: v for k, v in text.items() if k not in _CONFIGS}
    if dtype is not None:
        fields |= dict.fromkeys([k for k in _DTYPES if k in fields] or ["dtype"], dtype)
    if quantization is not None:
        fields["quantization_config"] = dict(quantization)
    detect.write_json(folder / "config.json", fields)


def _from_gguf(file: Path, folder: Path) -> dict[str, Any]:
    """Writes the tokenizer of a GGUF file, and gives the fields of config.json."""
    with closing(read_gguf(file)) as gguf:
        write_tokenizer(gguf, folder)
        return hf_config(gguf)


def _copy(source: Path, folder: Path, changed: bool) -> None:
    for file in sorted({file for pattern in _COPIED for file in source.glob(pattern)}):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    if not changed:
        for name in ("config.json", *detect.SIDE_FILES):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
