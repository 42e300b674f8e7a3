"""What GGUF metadata must satisfy for a model to be built from it, beyond being well-formed.

Loaders index tables with these values (token ids, layer counts, head counts), so they are held
against each other once, where the file is read. Keys that a file lacks are no fault here: whoever
needs one says so.
"""

from __future__ import annotations

import math
import re
from typing import Any, NoReturn

import numpy as np

from qjax.errors import CheckpointError

_MOST_LAYERS = 512
_LARGEST_SIZE = (1 << 31) - 1
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_BYTE_TYPE = 6

# Keys below "<architecture>.": sizes, positive integers (or one for each layer where the file has
# an array).
_SIZES = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
)
# Positive finite numbers.
_POSITIVE = (
    "attention.layer_norm_rms_epsilon",
    "attention.layer_norm_epsilon",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scaling.factor",
)
_STRINGS = (
    "general.architecture",
    "general.name",
    "general.license",
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.chat_template",
)


def check_metadata(metadata: dict[str, Any], offsets: dict[str, int], file: str) -> None:
    """Checks the values that loaders rely on.

    Args:
      metadata: key -> value, as GGUFFile has them.
      offsets: key -> where it stands in the file, in bytes, for messages.
      file: path, for messages.

    Raises:
      CheckpointError: a value is of the wrong kind, out of range, or contradicts another.
    """

    def fail(key: str, reason: str) -> NoReturn:
        raise CheckpointError(reason, file=file, field=key, offset=offsets.get(key))

    for key in _STRINGS:
        if not isinstance(metadata.get(key, ""), str):
            fail(key, f"is not a string but {_kind(metadata[key])}")
    architecture = metadata.get("general.architecture")
    if architecture is not None:
        _check_architecture(metadata, architecture, fail)
    _check_vocabulary(metadata, fail)


def _check_architecture(metadata: dict[str, Any], architecture: str, fail) -> None:
    def value(name: str) -> Any:
        return metadata.get(f"{architecture}.{name}")

    for name in _SIZES:
        found = value(name)
        if found is None:
            continue
        # Hybrid models give heads and widths for each layer; a layer without attention has zero
        # there.
        per_layer = isinstance(found, np.ndarray) and found.size > 0
        numbers = found if per_layer else np.asarray(found)
        if numbers.dtype.kind not in "iu":
            fail(f"{architecture}.{name}", f"is not an integer but {_kind(found)}")
        low, high = int(numbers.min()), int(numbers.max())
        if low < (0 if per_layer else 1) or high == 0 or high > _LARGEST_SIZE:
            fail(f"{architecture}.{name}", f"is {low if low < 1 else high}; it must be positive")
    for name in _POSITIVE:
        found = value(name)
        if found is None:
            continue
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            fail(f"{architecture}.{name}", f"is not a number but {_kind(found)}")
        if not math.isfinite(found) or found <= 0:
            fail(f"{architecture}.{name}", f"is {found}; it must be positive and finite")

    layers = value("block_count")
    if isinstance(layers, np.ndarray) or (layers or 0) > _MOST_LAYERS:
        fail(f"{architecture}.block_count", f"is {layers}; 1 to {_MOST_LAYERS} layers are possible")
    for name in _SIZES:
        found = value(name)
        if isinstance(found, np.ndarray) and layers is not None and len(found) != layers:
            fail(f"{architecture}.{name}", f"has {len(found)} values for {layers} layers")
    heads, kv_heads = value("attention.head_count"), value("attention.head_count_kv")
    if isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads:
        fail(
            f"{architecture}.attention.head_count_kv",
            f"is {kv_heads}, which does not divide {heads} heads",
        )


def _check_vocabulary(metadata: dict[str, Any], fail) -> None:
    prefix = "tokenizer.ggml."
    tokens = metadata.get(prefix + "tokens")
    if tokens is not None and (not isinstance(tokens, list) or not tokens):
        fail(prefix + "tokens", f"is not a list of strings but {_kind(tokens)}")
    size = None if tokens is None else len(tokens)

    for name, kinds in (("scores", "f"), ("token_type", "iu")):
        found = metadata.get(prefix + name)
        if found is None:
            continue
        if not isinstance(found, np.ndarray) or found.dtype.kind not in kinds:
            wanted = "floats" if kinds == "f" else "integers"
            fail(prefix + name, f"is not an array of {wanted} but {_kind(found)}")
        if size is not None and len(found) != size:
            fail(prefix + name, f"has {len(found)} values for {size} tokens")
    merges = metadata.get(prefix + "merges")
    if merges is not None and not isinstance(merges, list):
        fail(prefix + "merges", f"is not a list of strings but {_kind(merges)}")

    for key, found in metadata.items():
        if not key.startswith(prefix) or not key.endswith("_token_id"):
            continue
        if isinstance(found, bool) or not isinstance(found, int):
            fail(key, f"is not a token id but {_kind(found)}")
        if found < 0 or (size is not None and found >= size):
            fail(key, f"is {found}, which is not one of the {size} tokens")

    types = metadata.get(prefix + "token_type")
    if tokens and types is not None and metadata.get(prefix + "model") == "llama":
        for index in np.flatnonzero(types == _BYTE_TYPE):
            if not _BYTE_TOKEN.fullmatch(tokens[index]):
                fail(
                    prefix + "tokens",
                    f"token {index}, {tokens[index][:40]!r}, is marked as a byte but is not <0x..>",
                )


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype.name}"
    if isinstance(value, list):
        return "a list of strings" if value else "an empty list"
    return f"{type(value).__name__} {str(value)[:40]!r}"
