"""What configs say of experts: which layers have them, how large they are, how tokens choose."""

from __future__ import annotations

from qjax.layers.moe_config import MoEConfig
from qjax.layers.router import RouterConfig
from qjax.models import deepseek_config
from qjax.models.fields import Fields

_QWEN = ("qwen2_moe", "qwen3_moe")
MODEL_TYPES = ("mixtral", *_QWEN, "gpt_oss")

_MAX_SIZE = 1 << 24


def read_experts(fields: Fields, model_type: str, num_layers: int) -> MoEConfig | None:
    """The experts of a model; None where no layer has any.

    Raises:
      CheckpointError: a field is missing, of the wrong type or out of range.
      UnsupportedError: experts are chosen in another way than the model type has.
    """
    if model_type in deepseek_config.MODEL_TYPES:
        return _deepseek(fields, model_type, num_layers)
    if model_type not in MODEL_TYPES:
        return None
    name = "num_experts" if "num_experts" in fields else "num_local_experts"
    count = fields.integer(name, 1, 1 << 14)
    top_k = fields.integer("num_experts_per_tok", 1, count)
    normalize = model_type not in _QWEN or fields.flag("norm_topk_prob", False)
    router = RouterConfig(count, top_k, "softmax", normalize)
    if model_type in _QWEN:
        return _qwen(fields, model_type, num_layers, router)
    size = fields.integer("intermediate_size", 1, _MAX_SIZE)
    layers = (True,) * num_layers
    if model_type == "mixtral":
        return MoEConfig(router, layers, size, module="block_sparse_moe")
    return MoEConfig(router, layers, size, bias=True, router_name="router")


def _qwen(fields: Fields, model_type: str, num_layers: int, router: RouterConfig) -> MoEConfig:
    step = fields.integer("decoder_sparse_step", 1, 1 << 30, 1)
    dense = fields.get("mlp_only_layers", [])
    if not isinstance(dense, list | tuple) or not all(type(layer) is int for layer in dense):
        raise fields.error("mlp_only_layers", "must be a list of layers")
    layers = tuple(i not in dense and (i + 1) % step == 0 for i in range(num_layers))
    size = fields.integer("moe_intermediate_size", 1, _MAX_SIZE)
    if model_type == "qwen3_moe":
        return MoEConfig(router, layers, size)
    shared = fields.integer("shared_expert_intermediate_size", 1, _MAX_SIZE)
    return MoEConfig(
        router, layers, size, shared_size=shared, shared_name="shared_expert", shared_gate=True
    )


def _deepseek(fields: Fields, model_type: str, num_layers: int) -> MoEConfig | None:
    layers = deepseek_config.sparse_layers(fields, model_type, num_layers)
    if not any(layers):
        return None
    size = fields.integer("moe_intermediate_size", 1, _MAX_SIZE)
    shared = fields.integer("n_shared_experts", 0, 1 << 10, 0)
    router = deepseek_config.read_router(fields, model_type)
    return MoEConfig(router, layers, size, shared_size=shared * size)
