"""What errors inside a layer do to its outputs, against errors that are put there."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax.compress import layers, sensitivity


def test_is_what_errors_do(golden: Path) -> None:
    params = qjax.load(golden / "base-tiny-qwen2")
    layer = layers.floats_of(layers.stored_layer(params, 0))
    x = jax.random.normal(jax.random.key(0), (2, 32, params.config.hidden_size))
    found = [
        sensitivity.output_weights(params.config, 0, layer, x, jax.random.key(i)) for i in range(8)
    ]
    weights = {name: np.mean([each[name] for each in found], 0) for name in found[0]}
    assert weights.keys() == {
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    }
    # An error in the residual stream is what it is.
    np.testing.assert_allclose(weights["mlp.down_proj"], 1, rtol=1e-4)
    y = np.asarray(layers.outputs(params.config, 0, layer, x))
    rng = np.random.default_rng(0)
    for name in ("self_attn.v_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.gate_proj"):
        # A small change of the weight alone, whose errors in the outputs are all alike.
        w = np.asarray(layer[f"{name}.weight"])
        inputs = layers.input_stats(params.config, 0, layer, x)
        stats = next(inputs[g[0]] for g in layers.shared_inputs(weights) if name in g)
        energies = []
        for _ in range(4):
            change = 1e-3 * rng.standard_normal(w.shape) * np.abs(w).mean()
            changed = layer | {f"{name}.weight": jnp.asarray(w + change, jnp.float32)}
            after = np.asarray(layers.outputs(params.config, 0, changed, x))
            lost = np.square((after - y).astype(np.float64)).sum(-1).mean()
            rows = np.einsum("nk,kl,nl->n", change, np.asarray(stats.moment), change)
            energies.append(lost / (rows * weights[name]).sum())
        # Inputs and what their errors do are not independent, which the weights leave out.
        assert 0.4 < np.mean(energies) < 2.5, (name, energies)
