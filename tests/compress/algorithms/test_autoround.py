"""AutoRound: its gradients against float64 numpy, and what it gains on a tiny model."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.compress import grid as grids
from qjax.compress import layers, steps
from qjax.compress.algorithms import autoround
from qjax.compress.grid import Grid, Scales
from qjax.compress.hidden import Hidden
from qjax.compress.modifiers import AutoRoundModifier, GPTQModifier, QuantizationModifier
from qjax.errors import UnsupportedError
from qjax.scheme import QuantizationArgs, QuantizationScheme
from tests.programs import forward

GOLDEN = Path(__file__).parents[2] / "golden"
TOKENS = np.random.default_rng(3).integers(0, 250, (12, 48)).astype(np.int32)
N, K, GROUP = 6, 32, 8
SYMMETRIC = Grid.of(QuantizationArgs(3, group_size=GROUP), (N, K))
ASYMMETRIC = Grid.of(QuantizationArgs(3, symmetric=False, group_size=GROUP), (N, K))
WHOLE = Grid.of(QuantizationArgs(8, strategy="channel"), (N, K), signed=True)
BFLOAT = Grid.of(QuantizationArgs(2, group_size=GROUP), (N, K), "bfloat16")


def case(grid: Grid) -> tuple[np.ndarray, jax.Array, Scales]:
    """A weight, any codes of it, and scales that are too small for some."""
    random = np.random.default_rng(grid.half)
    w = random.normal(size=(N, K)).astype(np.float32)
    scales = grids.minmax(jnp.asarray(w), grid)
    scale = grids.nearest_scale(scales.scale * 0.7, scales, grid)
    ends = (-128, 128) if grid.qtype == "int8" else (0, 2 * grid.half)
    return w, jnp.asarray(random.integers(*ends, (N, K)), jnp.float32), Scales(scale, scales.zero)


@pytest.mark.parametrize("grid", [SYMMETRIC, ASYMMETRIC, WHOLE, BFLOAT], ids=lambda g: g.qtype)
def test_starts_from_what_it_is_given(grid: Grid) -> None:
    w, codes, scales = case(grid)
    start, learned = autoround.start(jnp.asarray(w), codes, scales, grid)
    found, held = autoround.rounded(start, learned, grid)
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_allclose(held.scale, scales.scale, rtol=1e-6)
    if scales.zero is not None and held.zero is not None:
        np.testing.assert_array_equal(held.zero, scales.zero)


def test_gradients_pass_through_rounding() -> None:
    """Those of s * clip(round(u / h + v)) with s = s0 h, by u / h as if it were not rounded."""
    random = np.random.default_rng(5)
    w, _, scales = case(SYMMETRIC)
    codes = grids.nearest(jnp.asarray(w), jnp.repeat(scales.scale, GROUP, 1), None, SYMMETRIC)
    start, learned = autoround.start(jnp.asarray(w), codes, scales, SYMMETRIC)
    offsets = random.uniform(-1, 1, (N, K)).astype(np.float32)
    factor = random.uniform(0.8, 1.2, scales.scale.shape).astype(np.float32)
    learned = learned._replace(offsets=jnp.asarray(offsets), high=jnp.asarray(factor))
    pull = random.normal(size=(N, K))

    def projected(learned: autoround.Learned) -> jax.Array:
        return (autoround.dense(start, learned, SYMMETRIC) * pull).sum()

    found = jax.grad(projected)(learned)
    base = np.repeat(np.asarray(scales.scale, np.float64), GROUP, 1)
    wide = np.repeat(factor.astype(np.float64), GROUP, 1)
    points = np.asarray(start.points, np.float64)
    free = np.rint(points / wide + offsets)
    inside = (free >= -4) & (free <= 3)
    assert 10 < (~inside).sum() < N * K / 2
    np.testing.assert_allclose(found.offsets, pull * base * wide * inside, rtol=1e-5, atol=1e-6)
    each = pull * base * (np.clip(free, -4, 3) - points / wide * inside)
    expected = each.reshape(N, -1, GROUP).sum(-1)
    np.testing.assert_allclose(found.high, expected, rtol=1e-4, atol=1e-5)


def scheme(bits: int, symmetric: bool = True) -> QuantizationScheme:
    args = QuantizationArgs(bits, symmetric=symmetric, group_size=32)
    return QuantizationScheme(("Linear",), args)


@pytest.fixture(scope="module")
def llama() -> qjax.Params:
    return qjax.load(GOLDEN / "base-tiny-llama")


@pytest.mark.parametrize(("bits", "symmetric"), [(2, False)])
def test_loses_less_than_gptq(llama: qjax.Params, bits: int, symmetric: bool) -> None:
    samples, config = Hidden.embedded(llama, TOKENS[:8]), llama.config
    others = Hidden.embedded(llama, TOKENS[8:])
    floats = layers.floats_of(layers.stored_layer(llama, 0))
    stats = samples.statistics(0, floats)
    common = {"scheme": scheme(bits, symmetric), "ignore": ["lm_head"]}
    losses = []
    for modifier in (
        QuantizationModifier(**common, weight_observer="memoryless_minmax"),
        GPTQModifier(**common),
        AutoRoundModifier(**common, iters=60, batch_size=4),
    ):
        layer = steps.Layer(0, layers.prefix(0), dict(floats), dict(stats))
        steps.apply(layer, steps.plan((modifier,), config), samples, config, "bfloat16")
        assert all(0 < error < 1 for error in layer.errors.values())
        losses.append(
            [
                float(np.square(h.outputs(0, layer.floats) - h.outputs(0, floats)).mean())
                for h in (samples, others)
            ]
        )
    nearest, gptq, learned = np.array(losses)
    assert learned[0] < 0.9 * gptq[0]
    assert learned[0] < 0.6 * nearest[0]
    assert learned[1] < nearest[1]


def test_experts_are_learned() -> None:
    base = qjax.load(GOLDEN / "base-tiny-qwen3moe")
    recipe = AutoRoundModifier(
        scheme=scheme(4), ignore=["lm_head", "re:.*mlp[.]gate$"], iters=4, batch_size=2
    )
    found = qjax.oneshot(base, recipe, TOKENS[:4], progress=False)
    expert = found.tree["model"]["layers"]["0"]["mlp"]["experts"]["down_proj"]["weight"]
    assert expert.qtype == "uint4b8"
    a, b = (np.asarray(forward(p, jnp.asarray(TOKENS)), np.float64) for p in (found, base))
    assert ((a - b) ** 2).sum() < 0.02 * (b**2).sum()


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (AutoRoundModifier(scheme=scheme(4)), "lm_head: not in a decoder layer"),
        (AutoRoundModifier(scheme="W8A8", ignore=["lm_head"]), "its inputs are rounded"),
        (AutoRoundModifier(scheme="NVFP4A16", ignore=["lm_head"]), "only integers"),
    ],
)
def test_what_it_cannot_learn(llama: qjax.Params, recipe: AutoRoundModifier, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        steps.plan((recipe,), llama.config)
