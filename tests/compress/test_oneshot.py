"""The walk through a model, on tiny ones."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

import qjax
from qjax.compress import layers, state
from qjax.compress.modifiers import GPTQModifier, QuantizationModifier
from qjax.compress.state import Finished
from qjax.scheme import QuantizationArgs, QuantizationScheme

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENS = np.random.default_rng(3).integers(0, 250, (4, 48)).astype(np.int32)
GROUPS = QuantizationScheme(("Linear",), QuantizationArgs(4, group_size=32))
GPTQ = GPTQModifier(scheme=GROUPS, ignore=["lm_head"])


@pytest.fixture(scope="module")
def llama() -> qjax.Params:
    return qjax.load(GOLDEN / "base-tiny-llama")


def weights_of(params: qjax.Params) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(layers.dense(leaf))
        for name, leaf in layers.flat(params.tree).items()
        if isinstance(leaf, qjax.QArray)
    }


def logits_error(params: qjax.Params, base: qjax.Params) -> float:
    a, b = (np.asarray(qjax.forward(p, TOKENS), np.float64) for p in (params, base))
    return float(((a - b) ** 2).sum() / (b**2).sum())


def test_gptq_loses_less_than_nearest(llama: qjax.Params) -> None:
    seen: list[Finished] = []
    found = qjax.oneshot(llama, GPTQ, TOKENS, progress=False, on_layer=seen.append)
    plain = qjax.oneshot(
        llama, QuantizationModifier(scheme=GROUPS, ignore=["lm_head"]), progress=False
    )
    assert logits_error(found, llama) < 0.5 * logits_error(plain, llama)
    assert [done.index for done in seen] == list(range(llama.config.num_layers))
    assert all(0 < error < 0.01 for done in seen for error in done.errors.values())
    kinds = {
        name.rpartition("layers")[2]: leaf.qtype
        for name, leaf in layers.flat(found.tree).items()
        if isinstance(leaf, qjax.QArray)
    }
    assert {k for n, k in kinds.items() if "proj" in n} == {"uint4b8"}
    assert found.tree["lm_head"]["weight"] is llama.tree["lm_head"]["weight"]
    assert qjax.generate(found, "a", max_tokens=2).token_ids


def test_experts() -> None:
    base = qjax.load(GOLDEN / "base-tiny-qwen3moe")
    recipe = GPTQModifier(scheme=GROUPS, ignore=["lm_head", "re:.*mlp[.]gate$"])
    found = qjax.oneshot(base, recipe, TOKENS, progress=False)
    plain = qjax.oneshot(
        base,
        QuantizationModifier(scheme=GROUPS, ignore=["lm_head", "re:.*mlp[.]gate$"]),
        progress=False,
    )
    expert = found.tree["model"]["layers"]["0"]["mlp"]["experts"]["down_proj"]["weight"]
    assert expert.qtype == "uint4b8"
    assert logits_error(found, base) < 0.7 * logits_error(plain, base)


def test_damaged_state_is_told(tmp_path: Path) -> None:
    kept = state.State(tmp_path)
    kept.keep(Finished(0, {"a": np.zeros(3, np.float32)}, {}), np.zeros((1, 2, 3), np.float32))
    file = next(tmp_path.glob("layer-*"))
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(qjax.CheckpointError, match="to begin anew"):
        kept.layer(0)


def test_not_finite_is_told(llama: qjax.Params) -> None:
    tree = jax.tree.map(lambda leaf: leaf, llama.tree)
    norm = tree["model"]["layers"]["1"]["input_layernorm"]
    norm["weight"] = norm["weight"].at[0].set(np.nan)
    broken = qjax.Params(tree, llama.config, llama.host)
    with pytest.raises(qjax.CalibrationError, match=r"layers\.1\..*not finite"):
        qjax.oneshot(broken, GPTQ, TOKENS, progress=False)


def test_output_that_holds_something(llama: qjax.Params, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(qjax.CheckpointError, match="not an empty folder"):
        qjax.oneshot(llama, GPTQ, TOKENS, tmp_path)


def test_dense_layers_are_seen_with_their_inputs(llama: qjax.Params) -> None:
    """Statistics of a layer are those of the inputs that its weights meet."""
    flat = layers.floats_of(layers.stored_layer(llama, 0))
    x = np.random.default_rng(0).normal(size=(2, 40, llama.config.hidden_size))
    found = layers.input_stats(llama.config, 0, flat, x.astype(np.float32))
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + llama.config.rms_norm_eps)
    rows = (normed * np.asarray(flat["input_layernorm.weight"])).reshape(80, -1)
    np.testing.assert_allclose(
        found["self_attn.k_proj"].moment, rows.T @ rows / 80, rtol=1e-3, atol=1e-4
    )
    assert sorted(found) == [
        *("mlp.down_proj", "mlp.gate_proj"),
        *("self_attn.k_proj", "self_attn.o_proj"),
    ]
