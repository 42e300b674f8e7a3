from types import SimpleNamespace
from typing import Any

import pytest

from qjax.checkpoint import names

LAYER = "model.layers.0"


@pytest.mark.parametrize(
    ("model_type", "stored", "wanted"),
    [
        ("llama", "layers.0.mlp.up_proj.weight", f"{LAYER}.mlp.up_proj.weight"),
        # Mixtral as it was published, and as transformers 5 and GPTQModel call it.
        *(
            ("mixtral", stored, f"{LAYER}.block_sparse_moe.experts.3.{part}.qweight")
            for stored, part in (
                (f"{LAYER}.block_sparse_moe.experts.3.w1.qweight", "gate_proj"),
                (f"{LAYER}.block_sparse_moe.experts.3.w2.qweight", "down_proj"),
                (f"{LAYER}.mlp.experts.3.gate_proj.qweight", "gate_proj"),
                (f"{LAYER}.mlp.experts.3.w3.qweight", "up_proj"),
            )
        ),
        ("mixtral", f"{LAYER}.mlp.gate.weight", f"{LAYER}.block_sparse_moe.gate.weight"),
        ("qwen3_moe", f"{LAYER}.mlp.gate.weight", f"{LAYER}.mlp.gate.weight"),
        # Parameters that have no module of their own.
        *(
            ("qwen3_moe", f"{LAYER}.mlp.experts.{stored}", f"{LAYER}.mlp.experts.{wanted}")
            for stored, wanted in (
                ("gate_up_proj", "gate_up_proj.weight"),
                ("down_proj_blocks", "down_proj.blocks"),
                ("gate_up_proj_scale_inv", "gate_up_proj.weight_scale_inv"),
                ("down_proj_activation_scale", "down_proj.activation_scale"),
            )
        ),
    ],
)
def test_names(model_type, stored, wanted):
    config: Any = SimpleNamespace(model_type=model_type)
    assert names.hf_name(stored, config) == wanted
