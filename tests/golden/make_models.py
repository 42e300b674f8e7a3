"""Makes the tiny-* checkpoints: random models of transformers, with its logits.

Written with the versions that each provenance.json names. Run by hand, where torch and transformers
are installed: `python tests/golden/make_models.py`.

The fixtures named base-* come from trained models; these fill in what those lack: model types and
rope scalings. Weights are stored in bfloat16 and multiplied in float32. They are large enough, and
the windows, caps and original lengths small enough, that each feature moves the logits.
"""

import json
import platform
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
}


def fill(model: torch.nn.Module) -> None:
    """Random parameters that bfloat16 holds exactly, sized to keep activations near 1."""
    for parameter in model.parameters():
        values = torch.randn(parameter.shape)
        if parameter.ndim == 2:
            values *= 1.5 / parameter.shape[1] ** 0.5
        else:
            values = parameter.data + 0.3 * values
        parameter.data = values.to(torch.bfloat16).to(torch.float32)


def main() -> None:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    for seed, (name, config) in enumerate(CONFIGS.items()):
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
    main()
