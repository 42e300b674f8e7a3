"""What a process takes to load its part of a model: no more for what the others load."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from qjax.checkpoint.gguf_stream import GGUFStream
from tests.distributed.test_processes import free_address, programs, started

HIDDEN, INNER, LAYERS, VOCABULARY, HEADS, KV_HEADS, GROUP = 2048, 8192, 8, 32000, 16, 4, 128
LINEAR = {
    "self_attn.q_proj": ("attn_q", (HIDDEN, HIDDEN)),
    "self_attn.k_proj": ("attn_k", (HIDDEN // 4, HIDDEN)),
    "self_attn.v_proj": ("attn_v", (HIDDEN // 4, HIDDEN)),
    "self_attn.o_proj": ("attn_output", (HIDDEN, HIDDEN)),
    "mlp.gate_proj": ("ffn_gate", (INNER, HIDDEN)),
    "mlp.up_proj": ("ffn_up", (INNER, HIDDEN)),
    "mlp.down_proj": ("ffn_down", (HIDDEN, INNER)),
}
CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
METADATA = {
    "general.architecture": "llama",
    "llama.block_count": LAYERS,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": INNER,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.context_length": 4096,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": VOCABULARY,
}
_WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
METHODS = {
    "gptq": {"bits": 4, "group_size": GROUP, "sym": True, "desc_act": False},
    "awq": {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    "compressed-tensors": {
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": _WEIGHTS | {"group_size": GROUP}}
        },
    },
}
RANDOM = np.random.default_rng(0)


def words(*shape):
    return RANDOM.integers(0, 256, 4 * int(np.prod(shape)), np.uint8).view(np.int32).reshape(shape)


def floats(*shape, dtype=ml_dtypes.bfloat16):
    return np.full(shape, 0.01, dtype)


def stored(method, n, k):
    if method == "compressed-tensors":
        return {"weight_packed": words(n, k // 8), "weight_scale": floats(n, k // GROUP)}
    both = {"scales": floats(k // GROUP, n, dtype=np.float16), "qzeros": words(k // GROUP, n // 8)}
    return both | {"qweight": words(k // 8, n) if method == "gptq" else words(k, n // 8)}


def write_folder(method, folder):
    tensors = {
        "model.embed_tokens.weight": floats(VOCABULARY, HIDDEN),
        "lm_head.weight": floats(VOCABULARY, HIDDEN),
        "model.norm.weight": floats(HIDDEN),
    }
    for layer in (f"model.layers.{i}." for i in range(LAYERS)):
        tensors[layer + "input_layernorm.weight"] = floats(HIDDEN)
        tensors[layer + "post_attention_layernorm.weight"] = floats(HIDDEN)
        for name, (_, (n, k)) in LINEAR.items():
            parts = stored(method, n, k)
            tensors |= {f"{layer}{name}.{suffix}": array for suffix, array in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    quantization = {"quant_method": method} | METHODS[method]
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quantization}))
    return folder


def write_gguf(folder):
    shapes = {
        "token_embd.weight": (VOCABULARY, HIDDEN),
        "output.weight": (VOCABULARY, HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    for layer in (f"blk.{i}." for i in range(LAYERS)):
        shapes |= {layer + "attn_norm.weight": (HIDDEN,), layer + "ffn_norm.weight": (HIDDEN,)}
        shapes |= {f"{layer}{name}.weight": shape for name, shape in LINEAR.values()}
    file = folder / "model.gguf"
    with GGUFStream(file, METADATA, list(shapes.items())) as stream:
        for name, shape in shapes.items():
            if len(shape) == 1:
                stream.add(name, "f32", floats(*shape, dtype=np.float32))
            elif not name.startswith("blk"):
                stream.add(name, "bf16", floats(*shape).view(np.uint8))
            else:
                blocks = RANDOM.integers(0, 256, (shape[0] * shape[1] // 256, 144), np.uint8)
                blocks[:, :4] = floats(2, dtype=np.float16).view(np.uint8)
                stream.add(name, "q4_k", blocks)
    return file


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("method", [*METHODS, "gguf"])
def test_one_of_four_processes_takes_a_quarter(method, tmp_path):
    """A quarter of the weights, and what four weights take that are read at the same time."""
    model = write_gguf(tmp_path) if method == "gguf" else write_folder(method, tmp_path)
    where = ["-m", "tests.distributed.peak", free_address(), "4"]
    with started([[*where, str(number), str(model)] for number in range(4)]) as processes:
        outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    for output, _ in outputs:
        found = json.loads(output)
        assert found["whole"] > 480 << 20
        assert found["own"] < 0.26 * found["whole"]
        assert found["peak"] - found["before"] < 0.25 * found["whole"] + (64 << 20)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_so_it_does_to_run_it(golden, tmp_path):
    """Beside its weights, 256 MB for compiled programs and what is computed."""
    model = write_folder("gptq", tmp_path)
    shutil.copy(golden / "gptq-4b-g32-desc" / "tokenizer.json", model)
    with started(programs(4, str(model), "split-memory")) as processes:
        outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    for output, _ in outputs:
        found = json.loads(output.splitlines()[-1])
        assert found["peak"] - found["before"] < 0.25 * found["whole"] + (256 << 20)
