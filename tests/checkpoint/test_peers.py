"""Other engines load what is saved, and give our logits."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.checkpoint import saver
from qjax.checkpoint.loader import load

SCRIPT = Path(__file__).with_name("peer_logits.py")
# By the Python that a variable names, where it is another: of transformers with
# compressed-tensors, of GPTQModel, and of transformers with bitsandbytes.
PYTHONS = {
    "transformers": "QJAX_TRANSFORMERS_PYTHON",
    "gptqmodel": "QJAX_GPTQMODEL_PYTHON",
    "bitsandbytes": "QJAX_BITSANDBYTES_PYTHON",
}


@pytest.mark.peer
@pytest.mark.parametrize(
    ("name", "method", "dense", "tool"),
    [
        ("ct-w4a16-g32-gptq-actorder-weight", "compressed-tensors", (), "transformers"),
        ("gguf-qwen2-Q4_0", "compressed-tensors", ("Embedding",), "transformers"),
        ("gguf-Q4_1", "safetensors", (), "transformers"),
        ("gguf-gemma3-Q5_0", "safetensors", (), "transformers"),
        ("ct-w4a16-g32-gptq-actorder-weight", "gptq", (), "gptqmodel"),
        ("gptq-4b-g32-desc", "gptq", (), "gptqmodel"),
        ("ct-w4a16-g32-gptq-actorder-weight", "awq", (), "gptqmodel"),
        ("bnb-nf4-dq", "bitsandbytes", (), "bitsandbytes"),
    ],
)
def test_other_engines_give_our_logits(name, method, dense, tool, golden, tmp_path):
    params = load(golden / name)
    saved = saver.save(params, tmp_path / "saved", method, dense=dense)
    ids = np.random.default_rng(0).integers(4, params.config.vocab_size, 24)
    np.save(tmp_path / "ids.npy", ids)
    python = os.environ.get(PYTHONS[tool], sys.executable)
    files = (saved.folder, tmp_path / "ids.npy", tmp_path / "logits.npy")
    subprocess.run([python, SCRIPT, tool, *map(str, files)], check=True, timeout=600)
    theirs = np.load(tmp_path / "logits.npy")
    np.testing.assert_allclose(theirs, qjax.forward(params, jnp.asarray(ids)), atol=1e-3, rtol=0)
