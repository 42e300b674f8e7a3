"""Checkpoints of any size that take no room: headers, and a hole where the numbers would be."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# As in the config.json of Llama 3.1 70B.
LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}


def llama_shapes(fields: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, vocabulary = (
        fields[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    size = hidden // fields["num_attention_heads"]
    keys = fields["num_key_value_heads"] * size
    for name in ("model.embed_tokens", "lm_head"):
        yield f"{name}.weight", (vocabulary, hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(fields["num_hidden_layers"]):
        for name, shape in {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items():
            yield f"model.layers.{layer}.{name}.weight", shape


def write_llama(folder: Path, fields: Mapping[str, Any]) -> Path:
    """A bfloat16 checkpoint of a Llama."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in llama_shapes(fields):
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder
