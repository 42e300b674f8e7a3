"""Eight devices, of which two heads of keys are held four times each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import qjax
from qjax.models.config import model_config
from qjax.models.functional import parameter_shapes
from tests.parallel import cases

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "attention_bias": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("eight") / "model"
    found.mkdir()
    random = np.random.default_rng(0)
    tensors = {
        name: (
            1 + random.normal(size=shape) / 4 if "norm" in name else random.normal(size=shape)
        ).astype(np.float32)
        for name, shape in parameter_shapes(model_config(CONFIG)).items()
    }
    for array in tensors.values():
        if array.ndim == 2:
            array /= np.sqrt(array.shape[1])
    save_file(tensors, found / "model.safetensors")
    (found / "config.json").write_text(json.dumps(CONFIG))
    tokenizer = cases.GOLDEN / "ct-qwen3moe-w4a16-g32" / "tokenizer.json"
    (found / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return found


@pytest.mark.parametrize("tensor", [2, 8])
def test_floats(folder: Path, tensor: int) -> None:
    sampling = cases.ALL if tensor == 8 else None
    whole = cases.found(qjax.load(folder), sampling)
    cases.check(whole, cases.found(cases.split(folder, tensor), sampling))


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "Q4_0"])
def test_quantized(folder: Path, scheme: str, tmp_path: Path) -> None:
    """Scales of whole rows of inputs; blocks of 32."""
    saved = tmp_path / ("model.gguf" if scheme == "Q4_0" else "model")
    qjax.oneshot(folder, scheme, output_dir=saved, progress=False)
    cases.check(cases.found(qjax.load(saved)), cases.found(cases.split(saved, 8)))
