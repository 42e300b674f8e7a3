"""Makes the tiny-* checkpoints: random models of transformers, with its logits.

Written with the versions that each provenance.json names. Run by hand, where torch and transformers
are installed: `python tests/golden/make_models.py`, with names behind it for some of them alone.

The fixtures named base-* come from trained models; these fill in what those lack: model types and
rope scalings. Weights are stored in bfloat16 and multiplied in float32. They are large enough, and
the windows, caps and original lengths small enough, that each feature moves the logits.
"""

import json
import platform
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "attn_implementation": "eager",
}
# Sizes of latent attention, no two alike; a dense layer and two with experts.
DEEPSEEK = SIZES | {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "n_group": 4,
    "topk_group": 2,
    "experts_implementation": "eager",
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
        "mscale": 0.707,
        "mscale_all_dim": 1.5,
        "original_max_position_embeddings": 32,
    },
}
DENSE = DEEPSEEK | {"num_hidden_layers": 2, "first_k_dense_replace": 2}
# One prompt that fits the original length and the windows, one that does not.
LENGTHS = (20, 70)

CONFIGS = {
    "tiny-mistral": transformers.MistralConfig(
        **SIZES, head_dim=32, sliding_window=24, tie_word_embeddings=False
    ),
    "tiny-gemma2": transformers.Gemma2Config(
        **SIZES,
        head_dim=32,
        sliding_window=24,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=5.0,
    ),
    "tiny-llama-llama3": transformers.LlamaConfig(
        **SIZES,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "tiny-llama-yarn": transformers.LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
            "original_max_position_embeddings": 32,
        },
    ),
    "tiny-phi3-longrope": transformers.Phi3Config(
        **SIZES,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7],
            "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0],
            "original_max_position_embeddings": 32,
        },
    ),
    # As V2-Lite, without a latent of queries, but with the groups of V2.
    "tiny-deepseek-v2": transformers.DeepseekV2Config(
        **DEEPSEEK,
        q_lora_rank=None,
        n_shared_experts=2,
        topk_method="group_limited_greedy",
        routed_scaling_factor=3.0,
    ),
    "tiny-deepseek-v3": transformers.DeepseekV3Config(
        **DEEPSEEK,
        q_lora_rank=48,
        n_shared_experts=1,
        routed_scaling_factor=2.5,
        num_mtp_layers=0,
    ),
    # Attention alone: no choice of experts that a rounding could turn over.
    "tiny-deepseek-v2-dense": transformers.DeepseekV2Config(**DENSE, q_lora_rank=None),
    "tiny-deepseek-v3-dense": transformers.DeepseekV3Config(
        **DENSE, q_lora_rank=48, attention_bias=True, num_mtp_layers=0
    ),
    # A layer without experts between two with; windows in the first of them alone.
    "tiny-qwen2moe": transformers.Qwen2MoeConfig(
        **SIZES
        | {
            "num_hidden_layers": 3,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 24,
            "max_window_layers": 2,
            "experts_implementation": "eager",
        },
    ),
}
CONTINUED = "tiny-deepseek"  # also greedily, by so many tokens
CONTINUATION = 32


def fill(model: torch.nn.Module) -> None:
    """Random parameters that bfloat16 holds exactly, sized to keep activations near 1."""
    for parameter in model.parameters():
        values = torch.randn(parameter.shape)
        if parameter.ndim >= 2:
            values *= 1.5 / parameter.shape[-1] ** 0.5
        else:
            values = parameter.data + 0.3 * values
        parameter.data = values.to(torch.bfloat16).to(torch.float32)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.2 * torch.randn(buffer.shape).to(torch.bfloat16))


def continuation(model: torch.nn.Module, ids: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The most likely next tokens, and by how much each one's logit leads."""
    tokens, margins = [], []
    for _ in range(CONTINUATION):
        with torch.no_grad():
            top = model(ids, use_cache=False).logits[0, -1].topk(2)
        tokens.append(int(top.indices[0]))
        margins.append(float(top.values[0] - top.values[1]))
        ids = torch.cat([ids, top.indices[None, :1]], dim=1)
    return np.array(tokens, np.int32), np.array(margins, np.float32)


def main(wanted: list[str]) -> None:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    for seed, (name, config) in enumerate(CONFIGS.items()):
        if wanted and name not in wanted:
            continue
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        fill(model)
        reference = {}
        for i, length in enumerate(LENGTHS):
            ids = torch.randint(2, config.vocab_size, (1, length))
            with torch.no_grad():
                logits = model(ids, use_cache=False).logits[0]
            reference[f"ids_{i}"] = ids[0].numpy().astype(np.int32)
            reference[f"logits_{i}"] = logits.numpy()
            if name.startswith(CONTINUED):
                reference[f"pos_{i}"] = np.arange(length, dtype=np.int32)
                reference[f"greedy_{i}"], reference[f"greedy_margin_{i}"] = continuation(model, ids)
        folder = Path(__file__).parent / name
        model.to(torch.bfloat16).save_pretrained(folder)
        (folder / "generation_config.json").unlink()
        np.savez_compressed(folder / "reference.npz", **reference)
        provenance = {
            "what": "random weights in bfloat16, logits of transformers computed in float32",
            "made by": Path(__file__).name,
            "versions": versions,
        }
        (folder / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
