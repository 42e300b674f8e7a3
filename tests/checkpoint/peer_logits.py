"""Logits of another engine, by its own Python: python peer_logits.py TOOL FOLDER IDS.npy OUT.npy.

Computed in float32 on a CPU, from the weights that the tool itself makes of the folder.
"""

# pyright: reportMissingImports=false
import sys
from collections.abc import Callable

import numpy as np
import torch
from transformers import AutoModelForCausalLM

Dequantized = Callable[[torch.nn.Module], torch.Tensor | None]


def transformers_model(folder: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")


def gptqmodel_model(folder: str) -> torch.nn.Module:
    """Layers as GPTQModel dequantizes them, since its kernels compute in 16 bits."""
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    def dequantized(module: torch.nn.Module) -> torch.Tensor | None:
        if not hasattr(module, "qweight"):
            return None
        module.scales = module.scales.float()
        if hasattr(module, "dequantize_weight"):
            return module.dequantize_weight().T
        codes = (module.qweight, module.qzeros, module.scales)
        return dequantize_gemm(*codes, module.bits, module.group_size).T

    model = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH).model
    return replaced(model, dequantized)


def bitsandbytes_model(folder: str) -> torch.nn.Module:
    """Layers as bitsandbytes dequantizes them: its kernels for a CPU compute in bfloat16."""
    from bitsandbytes.functional import dequantize_4bit

    def dequantized(module: torch.nn.Module) -> torch.Tensor | None:
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        return None if state is None else dequantize_4bit(module.weight.data, state)

    return replaced(transformers_model(folder), dequantized)


def replaced(model: torch.nn.Module, dequantized: Dequantized) -> torch.nn.Module:
    """The model with plain layers of these weights [N, K], in float32."""
    for name, module in list(model.named_modules()):
        weight = dequantized(module)
        if weight is None:
            continue
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None)
        linear.weight.data = weight.float().contiguous()
        if module.bias is not None:
            linear.bias.data = module.bias.data.float()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, linear)
    for values in (*model.parameters(), *model.buffers()):
        if values.is_floating_point():
            values.data = values.data.float()
    return model


tool, folder, ids, out = sys.argv[1:]
MODELS = {
    "transformers": transformers_model,
    "gptqmodel": gptqmodel_model,
    "bitsandbytes": bitsandbytes_model,
}
model = MODELS[tool](folder).eval()
with torch.no_grad():
    logits = model(torch.from_numpy(np.load(ids))[None]).logits[0]
np.save(out, logits.float().numpy())
