"""The choice of experts against its definition, one token after the other in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.layers.router import RouterConfig, route

CONFIGS = {
    "mixtral": RouterConfig(16, 4),
    "deepseek-v2-lite": RouterConfig(16, 4, normalize=False),
    "deepseek-v2": RouterConfig(
        16, 4, normalize=False, weight_scale=16.0, num_groups=4, top_groups=2
    ),
    "deepseek-v3": RouterConfig(
        16,
        4,
        "sigmoid",
        weight_scale=2.5,
        num_groups=4,
        top_groups=2,
        group_best=2,
        correction_bias=True,
    ),
    "not normalized": RouterConfig(
        16, 4, "sigmoid", False, num_groups=2, top_groups=1, group_best=2, correction_bias=True
    ),
}


def chosen(logits, config, bias):
    """expert -> weight for one token."""
    scores = np.exp(logits) / np.exp(logits).sum()
    if config.scoring == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    choice = scores + bias
    groups = np.split(np.arange(config.num_experts), config.num_groups)
    groups.sort(key=lambda group: -np.sort(choice[group])[-config.group_best :].sum())
    allowed = np.concatenate(groups[: config.top_groups])
    best = sorted(allowed, key=lambda expert: -choice[expert])[: config.top_k]
    total = scores[best].sum() if config.normalize else 1.0
    return {int(e): config.weight_scale * scores[e] / total for e in best}


@pytest.mark.parametrize("name", CONFIGS)
def test_experts_and_weights(name):
    config, rng = CONFIGS[name], np.random.default_rng(0)
    logits = rng.normal(size=(64, 16)).astype(np.float32)
    bias = rng.normal(size=16).astype(np.float32) * np.float32(config.correction_bias)
    weights, experts = route(
        jnp.asarray(logits), config, jnp.asarray(bias) if config.correction_bias else None
    )
    assert weights.shape == experts.shape == (64, 4)
    for row, w, e in zip(logits.astype(np.float64), weights, experts, strict=True):
        wanted = chosen(row, config, bias.astype(np.float64))
        assert list(wanted) == e.tolist()
        np.testing.assert_allclose(np.asarray(w), list(wanted.values()), rtol=2e-6)


def test_scores_that_vanish_give_no_nan():
    weights, _ = route(jnp.full((1, 16), -200.0), CONFIGS["deepseek-v3"], jnp.arange(16.0))
    assert (np.asarray(weights) == 0).all()
