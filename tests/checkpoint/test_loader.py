"""The loader against logits of other tools from the same files, and damaged checkpoints."""

import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qjax.checkpoint.loader import load
from qjax.errors import CheckpointError, UnsupportedError
from qjax.params import Params
from tests.programs import forward

# Small ones that the suite brings along: GGUF with the row order of Llama, with biases, with norms
# stored whole, with several types in one file; safetensors with fused weights and norms less one.
BROUGHT = (
    "gguf-Q4_1",
    "gguf-Q2_K",
    "gguf-qwen2-Q4_0",
    "gguf-gemma3-Q5_0",
    "gguf-h128-Q4_K_M-fallback",
    "base-tiny-llama",
    "base-tiny-gemma3",
    "base-tiny-phi3",
)
# More of the kind, in the folder that QJAX_FIXTURES names.
OUTSIDE = (
    *(f"gguf-{kind}" for kind in ("BF16", "Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS")),
    *(f"gguf-{kind}" for kind in ("Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "mixed-types")),
    *(f"base-tiny-{kind}" for kind in ("llama256", "llama-s1", "qwen2", "qwen3")),
)
# Where the reference is llama.cpp's own, with activations in 8 bits.
ROUNDED = ("gguf-gemma3-Q5_0",)


@pytest.fixture(params=[*BROUGHT, *OUTSIDE])
def checkpoint(request, golden) -> Path:
    if request.param in BROUGHT:
        return golden / request.param
    folder = os.environ.get("QJAX_FIXTURES")
    if not folder:
        pytest.skip("QJAX_FIXTURES names no folder of further checkpoints")
    return Path(folder) / request.param


def logits_of(params: Params, prompts: list[np.ndarray]) -> np.ndarray:
    """Logits of all prompts in one call; what follows a prompt's end does not change it."""
    tokens = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, ids in zip(tokens, prompts, strict=True):
        row[: len(ids)] = ids
    return np.asarray(forward(params, jnp.asarray(tokens)))


def test_logits_equal_those_of_other_tools(checkpoint):
    params = load(checkpoint)
    with np.load(checkpoint / "reference.npz") as reference:
        prompts = [reference[f"ids_{i}"] for i in range(3)]
        found = logits_of(params, prompts)
        for i, logits in enumerate(found):
            ours, theirs = logits[reference[f"pos_{i}"]], reference[f"logits_{i}"]
            if checkpoint.name in ROUNDED:
                assert np.abs(ours - theirs).mean() < 0.03 * theirs.std()
            else:
                error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
                assert error < 2e-5


@pytest.fixture
def plain(golden, tmp_path) -> Path:
    """A copy of a small safetensors checkpoint, to be damaged."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(golden / "base-tiny-llama" / name, tmp_path)
    return tmp_path


def change_config(folder: Path, **fields) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def change_tensors(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_weights_stay_as_they_are_stored(golden):
    params = load(golden / "gguf-Q4_1" / "model.gguf")
    layer = params.tree["model"]["layers"]["0"]
    weight = layer["self_attn"]["q_proj"]["weight"]
    assert (weight.qtype, weight.shape) == ("q4_1", (256, 256))
    assert 5.0 <= weight.bits_per_weight < 5.2
    assert params.source
    assert params.generation_config == {}


def test_generation_config_is_read(golden):
    assert load(golden / "base-tiny-gemma3").generation_config["eos_token_id"] == 1


def missing(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def superfluous(tensors):
    tensors["model.layers.1.mlp.side_proj.weight"] = np.zeros((2, 2), np.float32)


def one_layer_too_many(tensors):
    name = "model.layers.{}.input_layernorm.weight"
    tensors[name.format(3)] = tensors[name.format(2)]


def turned(tensors):
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)


def not_finite(tensors):
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)


def twice(tensors):
    tensors["layers.0.input_layernorm.weight"] = tensors["model.layers.0.input_layernorm.weight"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (missing, "model.layers.1.mlp.up_proj.weight"),
        (superfluous, "model.layers.1.mlp.side_proj.weight"),
        (one_layer_too_many, "model.layers.3.input_layernorm.weight"),
        (turned, "model.layers.0.mlp.down_proj.weight"),
        (not_finite, "model.norm.weight"),
    ],
)
def test_each_tensor_must_have_its_place(plain, change, field):
    change_tensors(plain, change)
    with pytest.raises(CheckpointError) as caught:
        load(plain)
    assert caught.value.field == field
    assert str(plain) in str(caught.value.file)


def test_two_tensors_for_one_parameter(plain):
    change_tensors(plain, twice)
    with pytest.raises(CheckpointError, match=r"layers\.0\.input_layernorm\.weight"):
        load(plain)


def test_type_of_a_tensor_that_is_no_float(plain):
    def as_int(tensors):
        name = "model.layers.0.mlp.down_proj.weight"
        tensors[name] = tensors[name].astype(np.int8)

    change_tensors(plain, as_int)
    with pytest.raises(UnsupportedError, match=r"down_proj.*i8.*bf16"):
        load(plain)


def test_quantized_safetensors_name_their_method(plain):
    change_config(plain, quantization_config={"quant_method": "unheard_of", "bits": 4})
    with pytest.raises(UnsupportedError, match="'unheard_of' is not supported; supported are"):
        load(plain)


def test_checkpoint_of_mlx_is_refused_by_its_name(plain):
    settings = {"group_size": 64, "bits": 4, "mode": "affine"}  # as mlx-lm writes it, twice
    change_config(plain, quantization=settings, quantization_config=settings)
    with pytest.raises(UnsupportedError, match=r"mlx-lm .* `mlx_lm\.convert --dequantize`"):
        load(plain)


@pytest.mark.parametrize("method", ["compressed-tensors", "quark"])
def test_method_that_only_a_checkpoint_can_explain_is_no_way_to_load_another(plain, method):
    with pytest.raises(UnsupportedError, match=f"quantization='{method}'.*'fp8' says it all"):
        load(plain, quantization=method)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_config_that_is_no_json_object(plain, content):
    (plain / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(plain)


def test_sizes_that_contradict_the_tensors(plain):
    change_config(plain, intermediate_size=512)
    with pytest.raises(CheckpointError, match=r"mlp\..*shape"):
        load(plain)


def test_wrapped_names_and_a_tied_head_stored_twice(plain):
    expected = load(plain)
    change_config(plain, tie_word_embeddings=True)

    def wrap(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        for name in list(tensors):
            if name.startswith("model."):
                rest = name.removeprefix("model.")
                tensors[f"model.language_model.{rest}"] = tensors.pop(name)
        tensors["model.language_model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(
            4, np.float32
        )

    change_tensors(plain, wrap)
    tree = load(plain).tree
    assert "lm_head" not in tree
    assert tree["model"].keys() == expected.tree["model"].keys()


def rename_in(file: Path, target: Path, old: bytes, new: bytes) -> Path:
    data = file.read_bytes()
    assert len(old) == len(new)
    assert data.count(old) == 1
    target.write_bytes(data.replace(old, new))
    return target


def test_gguf_tensor_of_no_supported_model(golden, tmp_path):
    file = golden / "gguf-qwen2-Q4_0" / "model.gguf"
    renamed = rename_in(file, tmp_path / "m.gguf", b"blk.1.ffn_up.weight", b"blk.1.ffn_zz.weight")
    with pytest.raises(CheckpointError, match="has no place") as caught:
        load(renamed)
    assert caught.value.field == "blk.1.ffn_zz.weight"
    assert caught.value.offset


def test_gguf_architecture_that_is_not_supported(golden, tmp_path):
    file = golden / "gguf-qwen2-Q4_0" / "model.gguf"
    key = b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0"
    renamed = rename_in(file, tmp_path / "m.gguf", key + b"qwen2", key + b"mamba")
    with pytest.raises(UnsupportedError, match=r"mamba.*llama, qwen2"):
        load(renamed)


def test_gguf_key_that_is_missing_is_named_as_the_file_names_it(golden, tmp_path):
    file = golden / "gguf-qwen2-Q4_0" / "model.gguf"
    renamed = rename_in(file, tmp_path / "m.gguf", b"qwen2.block_count", b"qwen2.blockxcount")
    with pytest.raises(CheckpointError, match="missing") as caught:
        load(renamed)
    assert caught.value.field == "qwen2.block_count"
