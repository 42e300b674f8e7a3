"""Makes the gguf-*-F32 checkpoints: random models with experts, with the logits of llama.cpp.

Run by hand, where the packages gguf and llama-cpp-python are installed:
`python tests/golden/make_gguf_models.py`, with names behind it for some of them alone. Names and
shapes are those that llama.cpp's converter writes: the matrices of latent attention apart (V3) or
joined (V2), the gate of a shared network as a vector. Weights and cache are float32, since
llama.cpp rounds activations for every other type. Sizes are those that no kernel pads.
"""

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

LAYERS, HIDDEN, WIDE, HEADS, VOCAB = 2, 32, 64, 4, 96
EXPERTS, USED, NARROW = 6, 2, 32
BETAS = (4.0, 0.5)
LENGTHS = (12, 24, 48)

COMMON = {
    "block_count": LAYERS,
    "context_length": 64,
    "embedding_length": HIDDEN,
    "feed_forward_length": WIDE,
    "attention.head_count": HEADS,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 10000.0,
    "expert_count": EXPERTS,
    "expert_used_count": USED,
}
GROUPED = {"attention.head_count_kv": 2, "attention.key_length": 8, "attention.value_length": 8}
GROUPED |= {"rope.dimension_count": 8}
ATTENTION = {"attn_q": (32, HIDDEN), "attn_k": (16, HIDDEN), "attn_v": (16, HIDDEN)}
ATTENTION |= {"attn_output": (HIDDEN, 32)}
LATENT = {
    "attention.q_lora_rank": 32,
    "attention.kv_lora_rank": 64,
    "rope.dimension_count": 16,
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 16,
    "rope.scaling.yarn_log_multiplier": 0.12,
    "rope.scaling.yarn_beta_fast": BETAS[0],
    "rope.scaling.yarn_beta_slow": BETAS[1],
    "leading_dense_block_count": 1,
    "expert_feed_forward_length": NARROW,
    "expert_weights_scale": 2.5,
    "expert_group_count": 3,
    "expert_group_used_count": 2,
}
APART = {"head_count_kv": 1, "key_length": 80, "value_length": 64}
APART |= {"key_length_mla": 48, "value_length_mla": 16}
JOINED = {"head_count_kv": HEADS, "key_length": 48, "value_length": 16}
LATENT_ATTENTION = {
    "attn_q_a": (32, HIDDEN),
    "attn_q_a_norm": (32,),
    "attn_q_b": (HEADS * 48, 32),
    "attn_kv_a_mqa": (80, HIDDEN),
    "attn_kv_a_norm": (64,),
    "attn_output": (HIDDEN, HEADS * 16),
}


def network(suffix: str, size: int, *lead: int) -> dict[str, tuple[int, ...]]:
    down = (*lead, HIDDEN, size)
    up = dict.fromkeys((f"ffn_gate{suffix}", f"ffn_up{suffix}"), (*lead, size, HIDDEN))
    return up | {f"ffn_down{suffix}": down}


def experts(size: int) -> dict[str, tuple[int, ...]]:
    return {"ffn_gate_inp": (EXPERTS, HIDDEN)} | network("_exps", size, EXPERTS)


def attention(keys: dict) -> dict:
    return {f"attention.{key}": value for key, value in keys.items()}


# name -> (architecture, keys, tensors of the first layer, tensors of the others)
MIXTRAL = ATTENTION | experts(32)
QWEN = ATTENTION | {"attn_q.bias": (32,), "attn_k.bias": (16,), "attn_v.bias": (16,)}
QWEN |= experts(NARROW) | network("_shexp", 64) | {"ffn_gate_inp_shexp": (HIDDEN,)}
V2 = LATENT_ATTENTION | {"attn_kv_b": (HEADS * 48, 64)}
V3 = LATENT_ATTENTION | {"attn_k_b": (HEADS, 64, 32), "attn_v_b": (HEADS, 16, 64)}
V2_EXPERTS = experts(NARROW) | network("_shexp", 2 * NARROW)
V3_EXPERTS = experts(NARROW) | network("_shexp", NARROW) | {"exp_probs_b.bias": (EXPERTS,)}
# llama.cpp rounds the bounds of yarn's bands to whole pairs, which config.json may say not to do:
# of these sizes that shows.
GPT_OSS = ATTENTION | experts(NARROW) | {"attn_sinks": (HEADS,), "post_attention_norm": (HIDDEN,)}
GPT_OSS |= {"attn_q.bias": (32,), "attn_k.bias": (16,), "attn_v.bias": (16,)}
GPT_OSS |= {"attn_output.bias": (HIDDEN,), "ffn_gate_inp.bias": (EXPERTS,)}
GPT_OSS |= dict.fromkeys(("ffn_gate_exps.bias", "ffn_up_exps.bias"), (EXPERTS, NARROW))
GPT_OSS |= {"ffn_down_exps.bias": (EXPERTS, HIDDEN)}
YARN = {key: value for key, value in LATENT.items() if key.startswith("rope.scaling.")}
YARN = {key: value for key, value in YARN.items() if not key.endswith("yarn_log_multiplier")}
YARN["rope.scaling.original_context_length"] = 64
MODELS = {
    "gguf-mixtral-F32": ("llama", COMMON | GROUPED | {"feed_forward_length": 32}, MIXTRAL, MIXTRAL),
    "gguf-qwen2moe-F32": (
        "qwen2moe",
        COMMON
        | GROUPED
        | {"expert_feed_forward_length": NARROW, "expert_shared_feed_forward_length": 64},
        QWEN,
        QWEN,
    ),
    "gguf-deepseek-v2-F32": (
        "deepseek2",
        COMMON | LATENT | attention(JOINED) | {"expert_shared_count": 2},
        V2 | network("", WIDE),
        V2 | V2_EXPERTS,
    ),
    "gguf-deepseek-v3-F32": (
        "deepseek2",
        COMMON
        | LATENT
        | attention(APART)
        | {"expert_shared_count": 1, "expert_weights_norm": True, "expert_gating_func": 2},
        V3 | network("", WIDE),
        V3 | V3_EXPERTS,
    ),
    "gguf-gptoss-F32": (
        "gpt-oss",
        COMMON
        | GROUPED
        | YARN
        | dict.fromkeys(("feed_forward_length", "expert_feed_forward_length"), NARROW)
        | {"attention.sliding_window": 16},
        GPT_OSS,
        GPT_OSS,
    ),
}


def values(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Sized to keep activations near 1."""
    drawn = rng.normal(size=shape)
    if "norm" in name:
        drawn = 1 + 0.3 * drawn
    elif name.endswith("bias"):
        drawn *= 0.2
    else:
        drawn *= 1.5 / shape[-1] ** 0.5
    return drawn.astype(np.float32)


def write(file: Path, name: str, rng: np.random.Generator) -> None:
    architecture, keys, first, others = MODELS[name]
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in keys.items():
        kind = {bool: "bool", int: "uint32", float: "float32", str: "string"}[type(value)]
        getattr(writer, f"add_{kind}")(f"{architecture}.{key}", value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(VOCAB)])
    writer.add_token_scores([0.0] * VOCAB)
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCAB)
    shapes = {"token_embd": (VOCAB, HIDDEN), "output_norm": (HIDDEN,), "output": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        norms = {"attn_norm": (HIDDEN,)}
        if "post_attention_norm" not in first:
            norms["ffn_norm"] = (HIDDEN,)
        for part, shape in (norms | (others if layer else first)).items():
            shapes[f"blk.{layer}.{part}"] = shape
    for tensor, shape in shapes.items():
        stored = tensor if tensor.endswith(".bias") else f"{tensor}.weight"
        writer.add_tensor(stored, values(tensor, shape, rng))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(file: Path, rng: np.random.Generator) -> dict[str, np.ndarray]:
    # Without these, the package's own bands of yarn stand in for those of the file.
    bands = {"yarn_beta_fast": BETAS[0], "yarn_beta_slow": BETAS[1]}
    model = llama_cpp.Llama(
        str(file), n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0, **bands
    )
    found = {}
    for i, length in enumerate(LENGTHS):
        ids = rng.integers(2, VOCAB, length).astype(np.int32)
        model.reset()
        model.eval(ids.tolist())
        found[f"ids_{i}"], found[f"pos_{i}"] = ids, np.arange(length, dtype=np.int32)
        found[f"logits_{i}"] = np.array(model.scores[:length], np.float32)
    return found


def main(wanted: list[str]) -> None:
    versions = {each: version(each) for each in ("gguf", "llama_cpp_python", "numpy")}
    for seed, name in enumerate(MODELS):
        if wanted and name not in wanted:
            continue
        folder = Path(__file__).parent / name
        folder.mkdir(exist_ok=True)
        rng = np.random.default_rng(seed)
        write(folder / "model.gguf", name, rng)
        np.savez_compressed(folder / "reference.npz", **logits(folder / "model.gguf", rng))
        told = {
            "what": "random weights in float32, logits of llama.cpp",
            "made by": Path(__file__).name,
            "versions": {"python": platform.python_version()} | versions,
        }
        (folder / "provenance.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
