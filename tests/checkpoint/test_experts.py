"""Quantized experts, stored one by one as GPTQ and AWQ write them, against the same in full
precision."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qjax
from tests.formats import test_awq, test_gptq
from tests.programs import forward

SIZE = 16
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": SIZE, "sym": False, "desc_act": True}
AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": SIZE, "zero_point": True}
# Beside experts, networks that all tokens go to, and those of layers without experts.
NAMES = ("tiny-qwen2moe", "tiny-deepseek-v3", "tiny-deepseek-v2")


def gptq(n, k, seed):
    """Columns of groups lie apart, but in every fourth layer."""
    order = np.random.default_rng(seed).permutation(k)
    g_idx = np.arange(k) // SIZE if seed % 4 == 0 else order // SIZE
    return test_gptq.layer(4, n, k, SIZE, g_idx=g_idx, seed=seed)


def awq(n, k, seed):
    values, zero, scale, weight = test_awq.layer(n, k, SIZE, seed)
    return test_awq.gemm(values, zero, scale), weight


def write(golden, name, folder, tensors, **fields):
    shutil.copytree(golden / name, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((golden / name / "config.json").read_text())
    # Scales of GPTQ are read in the dtype of the model.
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"} | fields))
    save_file(tensors, folder / "model.safetensors")
    return folder


def checkpoints(golden, name, folder, layer, method):
    """Two folders with the networks of a model replaced: by random quantized ones, and by what
    these mean."""
    stored, plain, small = {}, {}, np.float16(2.0**-7)
    for seed, (key, value) in enumerate(load_file(golden / name / "model.safetensors").items()):
        stored[key] = plain[key] = value
        if ".mlp." in key and "_proj" in key:
            tensors, weight = layer(*value.shape, seed)
            tensors["scales"] = tensors["scales"] * small
            module = key.removesuffix("weight")
            del stored[key]
            stored |= {module + suffix: array for suffix, array in tensors.items()}
            plain[key] = (weight * small).astype(np.float32)
    quantized = write(golden, name, folder / "quantized", stored, quantization_config=method)
    return quantized, write(golden, name, folder / "plain", plain)


@pytest.mark.parametrize(("layer", "method"), [(gptq, GPTQ), (awq, AWQ)], ids=["gptq", "awq"])
@pytest.mark.parametrize("name", NAMES)
def test_experts_of_one_layer(golden, tmp_path, name, layer, method):
    quantized, plain = checkpoints(golden, name, tmp_path, layer, method)
    params = qjax.load(quantized)
    last = params.tree["model"]["layers"]["2"]["mlp"]
    for weight in (last["experts"]["down_proj"]["weight"], last["gate"]["weight"]):
        assert weight.qtype == ("bf16" if weight is last["gate"]["weight"] else "uint4")
    ids = jnp.arange(2, 42)
    ours, wanted = (np.asarray(forward(each, ids)) for each in (params, qjax.load(plain)))
    assert np.linalg.norm(ours - wanted) < 2e-5 * np.linalg.norm(wanted)
