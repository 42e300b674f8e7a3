"""How much an error in each output of a linear layer matters to the decoder layer around it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qjax.compress.layers import Flat, run_uncached
from qjax.engine.exact_jit import exact_jit
from qjax.models.config import ModelConfig
from qjax.ops import floats


@exact_jit(static_argnames=("config", "index"))
def output_weights(
    config: ModelConfig, index: int, layer: Flat, x: jax.Array, key: jax.Array
) -> dict[str, jax.Array]:
    """What the squared error of each output adds to that of the decoder layer's outputs.

    With signs r drawn at random for all outputs y of the layer, the gradient of r . y by an output
    of a product inside is, squared and on the average over r, the energy that a unit error there
    has in y (Hutchinson's estimate of the diagonal of J^T J). Its mean over all rows is taken.

    Args:
      index: of a layer that computes the same, see `functional.same_layer`.
      layer: float32 weights by name.
      x: float32 [S, T, E], hidden states of whole sequences.

    Returns:
      float32 [N] for each module; of the networks of experts, for none.
    """
    names = {id(weight): name.removesuffix(".weight") for name, weight in layer.items()}
    with floats.watch() as seen:
        run_uncached(config, index, layer, x)
    shifts = [
        None
        if product.sizes is not None
        else tuple(jnp.zeros((len(product.inputs), len(w))) for w in product.weights)
        for product in seen
    ]
    signs = jax.random.rademacher(key, x.shape, jnp.float32)

    def projected(shifts: list[tuple[jax.Array, ...] | None]) -> jax.Array:
        with floats.shifted(shifts):
            return (run_uncached(config, index, layer, x) * signs).sum()

    gradients = jax.grad(projected)(shifts)
    return {
        names[id(weight)]: jnp.square(gradient).mean(0)
        for product, each in zip(seen, gradients, strict=True)
        if each is not None
        for weight, gradient in zip(product.weights, each, strict=True)
    }
