"""What a model's experts are, apart from their layer: reading a config shall not import Flax."""

from __future__ import annotations

from dataclasses import dataclass

from qjax.layers.router import RouterConfig


@dataclass(frozen=True)
class MoEConfig:
    """The feed-forward networks of experts.

    Attributes:
      router: how tokens choose experts.
      layers: for each layer whether it has experts; the others have one network.
      intermediate_size: of an expert.
      bias: whether router and experts have biases.
      module, router_name: of the network of experts in its layer, and of the router in that.
      shared_size: intermediate size of one more network, which all tokens go to; 0: there is none.
      shared_name: of that network.
      shared_gate: a weight for it comes from each token, the sigmoid of one more product.
    """

    router: RouterConfig
    layers: tuple[bool, ...]
    intermediate_size: int
    bias: bool = False
    module: str = "mlp"
    router_name: str = "gate"
    shared_size: int = 0
    shared_name: str = "shared_experts"
    shared_gate: bool = False
