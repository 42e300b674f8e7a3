"""Models as trees of float weights, for tests that change these."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax import ops
from qjax.forward import forward
from qjax.params import Params
from qjax.qarray import QArray


def floats(tree: Any) -> Any:
    """Every weight as float32."""
    if isinstance(tree, dict):
        return {key: floats(value) for key, value in tree.items()}
    if isinstance(tree, QArray):
        return np.asarray(ops.unprepare(jax.tree.map(np.asarray, tree)).dequantize())
    return np.asarray(tree)


def weights(tree: Any, norm: bool = False) -> Any:
    """Back to what a model runs on."""
    if isinstance(tree, dict):
        return {k: weights(v, "norm" in k or (norm and k == "weight")) for k, v in tree.items()}
    return tree if norm or tree.ndim < 2 else QArray.from_dense(tree)


def flat(tree: dict, at: str = "") -> dict[str, Any]:
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{at}{key}.") if isinstance(value, dict) else {at + key: value}
    return found


def put(tree: dict, name: str, value: Any) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        tree = tree[parent]
    tree[last] = value


def logits(params: Params, tree: dict) -> np.ndarray:
    tokens = jnp.arange(3, 27, dtype=jnp.int32).reshape(1, 24)
    return np.asarray(jax.jit(forward)(replace(params, tree=weights(tree)), tokens))
