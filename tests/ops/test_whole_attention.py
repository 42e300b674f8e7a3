"""Attention without a cache, and its gradients, against float64 numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import AttentionSpec
from qjax.ops import whole_attention
from qjax.ops.whole_attention import attend_whole

SEQUENCES, LENGTH, HEADS, KV, SIZE = 2, 7, 4, 2, 6
NOTHING = {"rope": None, "q_norm": None, "k_norm": None, "norm_eps": 0.0}


def reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, spec: AttentionSpec, sinks: np.ndarray | None
) -> np.ndarray:
    out = np.zeros((SEQUENCES, LENGTH, HEADS, SIZE))
    q, k, v = (x.reshape(SEQUENCES, LENGTH, -1, SIZE) for x in (q, k, v))
    for s, t, h in np.ndindex(SEQUENCES, LENGTH, HEADS):
        first = 0 if spec.sliding_window is None else max(0, t + 1 - spec.sliding_window)
        kv = h // (HEADS // KV)
        scores = k[s, first : t + 1, kv] @ q[s, t, h] * spec.scale
        if spec.soft_cap is not None:
            scores = spec.soft_cap * np.tanh(scores / spec.soft_cap)
        shares = np.exp(scores)
        shares /= shares.sum() + (0 if sinks is None else np.exp(sinks[h]))
        out[s, t, h] = shares @ v[s, first : t + 1, kv]
    return out.reshape(SEQUENCES * LENGTH, -1)


@pytest.mark.parametrize("tile", [64, 2])
@pytest.mark.parametrize(
    ("window", "cap", "sinks"), [(None, None, False), (3, None, True), (None, 2.0, False)]
)
def test_values_and_gradients(
    window: int | None,
    cap: float | None,
    sinks: bool,
    tile: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(whole_attention, "_TILE", tile)
    random = np.random.default_rng(1)
    tokens = SEQUENCES * LENGTH
    arrays = [random.normal(size=(tokens, heads * SIZE)) for heads in (HEADS, KV, KV)]
    spec = AttentionSpec(HEADS, KV, SIZE, 0, 0.4, window, cap)
    sink = random.normal(size=HEADS) if sinks else None
    pull = random.normal(size=(tokens, HEADS * SIZE))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        held = None if sink is None else jnp.asarray(sink)
        return attend_whole(q, k, v, SEQUENCES, spec, sinks=held, **NOTHING)

    q, k, v = (jnp.asarray(a, jnp.float32) for a in arrays)
    expected = reference(arrays[0], arrays[1], arrays[2], spec, sink)
    np.testing.assert_allclose(attend(q, k, v), expected, atol=2e-6)
    slopes = jax.grad(lambda *a: (attend(*a) * pull).sum(), argnums=(0, 1, 2))(q, k, v)
    for i, slope in enumerate(slopes):
        way = random.normal(size=slope.shape)

        def at(step: float, i: int = i, way: np.ndarray = way) -> float:
            q, k, v = (a + step * way if i == j else a for j, a in enumerate(arrays))
            return float((reference(q, k, v, spec, sink) * pull).sum())

        expected = (at(1e-5) - at(-1e-5)) / 2e-5
        np.testing.assert_allclose((np.asarray(slope) * way).sum(), expected, rtol=1e-4, atol=1e-4)
