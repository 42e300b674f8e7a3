"""The mixes of llama-quantize, against files that it made and what it says it would make."""

import json

import pytest

from qjax.checkpoint import names
from qjax.checkpoint.gguf_io import read_gguf
from qjax.checkpoint.opened import gguf_model
from qjax.compress.gguf_mixes import MIXES, mix_types
from qjax.errors import UnsupportedError
from qjax.models import functional
from qjax.models.config import model_config


def weights(config):
    """Shapes of weights by module."""
    shapes = functional.parameter_shapes(config).items()
    return {n.removesuffix(".weight"): s for n, s in shapes if n.endswith(".weight") and s[1:]}


@pytest.mark.parametrize(
    ("name", "mix"),
    [
        ("gguf-Q2_K", "Q2_K"),
        ("gguf-Q4_1", "q4_1"),
        ("gguf-gemma3-Q5_0", "Q5_0"),
        ("gguf-qwen2-Q4_0", "Q4_0"),
        ("gguf-h128-Q4_K_M-fallback", "Q4_K"),
    ],
)
def test_types_of_files_by_llama_quantize(golden, name, mix):
    file = read_gguf(golden / name / "model.gguf")
    config = gguf_model(file)
    importance = "quantize.imatrix.file" in file.metadata
    types = mix_types(mix, config, weights(config), importance=importance)
    stored = {m: file.tensors[names.gguf_tensor(f"{m}.weight", config)].qtype for m in types}
    assert types == stored


# Of the models in gguf_mixes.json.
SIZES = {
    "llama-24-gqa4": {"num_hidden_layers": 24, "num_attention_heads": 8},
    "llama-17-gqa2-tied": {
        "num_hidden_layers": 17,
        "num_attention_heads": 4,
        "tie_word_embeddings": True,
    },
    "mixtral-9": {
        "num_hidden_layers": 9,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "model_type": "mixtral",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}
SIZE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 64, "num_key_value_heads": 2}


@pytest.mark.parametrize("name", SIZES)
def test_types_that_llama_quantize_announces(golden, name):
    said = json.loads((golden / "gguf_mixes.json").read_text())
    config = model_config({"model_type": "llama"} | SIZE | SIZES[name])
    shapes = weights(config)
    assert {key.partition("/")[0] for key in said[name]} == MIXES.keys() - {"F32"}
    for key, parts in said[name].items():
        mix, _, given = key.partition("/")
        types = mix_types(mix, config, shapes, importance=given == "importance")
        for module, qtype in types.items():
            *layer, part = (
                names.gguf_tensor(f"{module}.weight", config)
                .removeprefix("blk.")
                .removesuffix(".weight")
                .split(".")
            )
            letter = parts[part][int(layer[0]) if layer else 0]
            assert qtype == said["types"][ord(letter) - ord("a")], (key, module)


def test_unknown_mix(golden):
    config = gguf_model(read_gguf(golden / "gguf-Q2_K" / "model.gguf"))
    with pytest.raises(UnsupportedError, match="no GGUF mix 'Q4_X'; these are: F32, F16"):
        mix_types("Q4_X", config, weights(config))
    with pytest.raises(UnsupportedError, match="no place"):
        mix_types("Q4_0", config, {"model.vision": (8, 64)})


@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_divides_every_row(golden, mix):
    config = gguf_model(read_gguf(golden / "gguf-h128-Q4_K_M-fallback" / "model.gguf"))
    shapes = weights(config)
    for qtype, shape in zip(mix_types(mix, config, shapes).values(), shapes.values(), strict=True):
        assert qtype in ("f32", "f16", "bf16") or qtype.startswith(("q", "iq", "tq")), shape
