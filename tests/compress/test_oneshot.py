"""The walk through a model, on tiny ones."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest

import qjax
from qjax.checkpoint.imatrix import Squares, write_imatrix
from qjax.checkpoint.places import leaf_of
from qjax.compress import grid as grids
from qjax.compress import layers, state, walk
from qjax.compress.algorithms import ggml
from qjax.compress.modifiers import (
    AWQModifier,
    GPTQModifier,
    QuantizationMixin,
    QuantizationModifier,
    SmoothQuantModifier,
    SpinQuantModifier,
)
from qjax.compress.rounding import register_modifier, with_codes
from qjax.compress.state import Finished
from qjax.scheme import QuantizationArgs, QuantizationScheme
from tests.programs import forward

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
    a, b = (np.asarray(forward(p, jax.numpy.asarray(TOKENS)), np.float64) for p in (params, base))
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


@pytest.fixture(scope="module")
def uneven(llama: qjax.Params) -> qjax.Params:
    """A model whose inputs differ much in size, as those of trained models do."""
    tree = jax.tree.map(lambda leaf: leaf, llama.tree)
    random = np.random.default_rng(5)
    for layer in tree["model"]["layers"].values():
        for name in ("input_layernorm", "post_attention_layernorm"):
            weight = layer[name]["weight"]
            layer[name]["weight"] = weight * np.exp(random.normal(size=len(weight)))
    return qjax.Params(jax.tree.map(jax.numpy.asarray, tree), llama.config, llama.host)


@pytest.mark.parametrize(
    ("mappings", "changed"),
    [
        (None, "input_layernorm.weight"),
        # Heads that share values share their scales.
        ([[["re:.*o_proj"], "re:.*v_proj"]], "self_attn.v_proj.weight"),
    ],
)
def test_smoothing_changes_nothing_but_rounding(
    uneven: qjax.Params, mappings: list | None, changed: str
) -> None:
    fine = QuantizationScheme(("Linear",), QuantizationArgs(8, group_size=8))
    smooth = SmoothQuantModifier(mappings=mappings)
    recipe = [smooth, QuantizationModifier(scheme=fine, ignore=["lm_head"])]
    found = qjax.oneshot(uneven, recipe, TOKENS, progress=False)
    assert logits_error(found, uneven) < 1e-3
    first = [layers.floats_of(layers.stored_layer(p, 0))[changed] for p in (found, uneven)]
    assert not np.allclose(*first, rtol=0.1, atol=0.01)


def test_a_folder_gives_what_its_loaded_model_gives(llama: qjax.Params) -> None:
    """Without samples it is read as it is stored; kernels get the result all the same."""
    nearest = QuantizationModifier(scheme=GROUPS, ignore=["lm_head"])
    from_folder = qjax.oneshot(GOLDEN / "base-tiny-llama", nearest, progress=False)
    expected = qjax.oneshot(llama, nearest, progress=False)
    assert jax.tree.structure(from_folder.tree) == jax.tree.structure(expected.tree)
    jax.tree.map(np.testing.assert_array_equal, from_folder.tree, expected.tree)


def test_awq_loses_less_than_nearest(uneven: qjax.Params) -> None:
    awq = [AWQModifier(), QuantizationModifier(scheme=GROUPS, ignore=["lm_head"])]
    found = qjax.oneshot(uneven, awq, TOKENS, progress=False)
    plain = qjax.oneshot(uneven, awq[1], progress=False)
    assert logits_error(found, uneven) < 0.8 * logits_error(plain, uneven)


def test_ranges_of_inputs_are_those_of_the_model_itself(llama: qjax.Params, tmp_path: Path) -> None:
    """Rounding alone is made for the inputs that each layer has in the model as it is; so it is in
    a walk that was stopped and goes on."""
    found = qjax.oneshot(llama, "FP8", TOKENS, progress=False, shuffle_calibration_samples=False)
    x = np.asarray(llama.tree["model"]["embed_tokens"]["weight"].dequantize())[TOKENS]
    for index in range(llama.config.num_layers):
        floats = layers.floats_of(layers.stored_layer(llama, index))
        stats = layers.input_stats(llama.config, index, floats, x)
        for module in ("self_attn.k_proj", "mlp.down_proj"):
            scale = leaf_of(found, f"model.layers.{index}.{module}.weight").aux["act_scale"]
            np.testing.assert_allclose(scale, stats[module].absmax.max() / 448, rtol=1e-5)
        x = layers.outputs(llama.config, index, floats, x)

    def stop(done: Finished) -> None:
        if done.index == 1:
            raise KeyboardInterrupt

    out = tmp_path / "model"
    same = {"progress": False, "shuffle_calibration_samples": False}
    with pytest.raises(KeyboardInterrupt):
        qjax.oneshot(llama, "FP8", TOKENS, out, on_layer=stop, **same)
    resumed = qjax.oneshot(llama, "FP8", TOKENS, out, **same)
    jax.tree.map(np.testing.assert_array_equal, resumed.tree, found.tree)


def test_a_stopped_walk_goes_on_to_the_same_end(
    llama: qjax.Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = weights_of(qjax.oneshot(llama, GPTQ, TOKENS, progress=False))

    class Stopped(Exception):
        pass

    def stop(done: Finished) -> None:
        if done.index == 1:
            raise Stopped

    out = tmp_path / "model"
    with pytest.raises(Stopped):
        qjax.oneshot(llama, GPTQ, TOKENS, out, progress=False, on_layer=stop)
    assert not out.exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".model.")
    made: list[int] = []
    real = layers.stored_layer
    monkeypatch.setattr(
        walk.layers, "stored_layer", lambda p, index: made.append(index) or real(p, index)
    )
    found = weights_of(qjax.oneshot(llama, GPTQ, TOKENS, out, progress=False))
    assert made == [0, 1, 2, 2]  # one sample through all, then what was left
    assert found.keys() == whole.keys()
    assert all(np.array_equal(found[name], whole[name]) for name in whole)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


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
    with pytest.raises(qjax.CalibrationError, match=r"layers\.1: .*not finite"):
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


def test_rotations_change_nothing_but_rounding(uneven: qjax.Params) -> None:
    fine = QuantizationScheme(("Linear",), QuantizationArgs(8, group_size=8))
    rounding = QuantizationModifier(scheme=fine, ignore=["lm_head"], weight_observer="imatrix_mse")
    found = qjax.oneshot(uneven, [SpinQuantModifier(), rounding], TOKENS, progress=False)
    assert logits_error(found, uneven) < 1e-3
    norm = found.tree["model"]["layers"]["0"]["input_layernorm"]["weight"]
    assert np.array_equal(norm, np.ones_like(norm))


def test_rotations_that_do_not_come_first(llama: qjax.Params) -> None:
    with pytest.raises(qjax.RecipeError, match="put it first"):
        qjax.oneshot(llama, [GPTQ, SpinQuantModifier()], TOKENS)


@pytest.mark.parametrize("target", [3.5, 5.0])
def test_target_bits(uneven: qjax.Params, target: float) -> None:
    recipe = QuantizationModifier(scheme=GROUPS, ignore=["lm_head"], target_bits=target)
    found = qjax.oneshot(uneven, recipe, TOKENS, progress=False)
    matrices = {
        name: leaf
        for name, leaf in layers.flat(found.tree["model"]["layers"]).items()
        if isinstance(leaf, qjax.QArray)
    }
    weights = {name: np.prod(leaf.shape) for name, leaf in matrices.items()}
    bits = sum(matrices[name].bits_per_weight * weights[name] for name in matrices)
    assert target - 0.3 < bits / sum(weights.values()) <= target
    assert len({leaf.qtype for leaf in matrices.values()}) > 1
    q, k = (matrices[f"0.self_attn.{name}_proj.weight"].qtype for name in "qk")
    assert q == k  # runtimes join them


def test_neighbours_of_one_kind_keep_their_own_inputs(llama: qjax.Params) -> None:
    """q and k take the same inputs and the same codes, but only k rounds its inputs."""
    weights = QuantizationArgs(8, strategy="channel")
    tokens = QuantizationArgs(8, strategy="token", dynamic=True)
    groups = {
        "plain": QuantizationScheme(("re:.*q_proj",), weights),
        "rounded": QuantizationScheme(("re:.*k_proj",), weights, tokens),
    }
    found = qjax.oneshot(llama, QuantizationModifier(config_groups=groups), progress=False)
    q, k = (leaf_of(found, f"model.layers.0.self_attn.{name}_proj.weight") for name in ("q", "k"))
    assert (q.act, q.qtype) == (None, "uint8b128")
    assert (k.act.dtype, k.qtype) == ("int8", "int8")


def test_importance_matrix_of_a_file(llama: qjax.Params, tmp_path: Path) -> None:
    name, file = "model.layers.0.mlp.down_proj", tmp_path / "imatrix.gguf"
    weight = np.asarray(layers.dense(leaf_of(llama, f"{name}.weight")))
    mean = np.exp(np.random.default_rng(0).normal(size=weight.shape[1])).astype(np.float32)
    write_imatrix(file, {name: Squares(mean, np.array(64, np.float32))}, llama.config)
    found = qjax.oneshot(llama, "Q4_0", imatrix=file, progress=False)
    wanted = qjax.QArray(ggml.quantize(weight, "q4_0", mean), "q4_0", weight.shape)
    assert np.array_equal(weights_of(found)[f"{name}.weight"], wanted.dequantize())
    assert not np.array_equal(ggml.quantize(weight, "q4_0"), wanted.qvalue)
    with pytest.raises(qjax.RecipeError, match="no type of GGUF"):
        qjax.oneshot(llama, "FP8_DYNAMIC", imatrix=file)


ON_FOUR_DEVICES = """
import sys, jax, numpy as np, qjax
from qjax.compress import layers
assert jax.local_device_count() == 4
folder, ids, out = sys.argv[1:]
groups = {"num_bits": 4, "group_size": 32, "strategy": "group"}
groups = {"group_0": {"targets": ["Linear"], "weights": groups}}
recipe = {"GPTQModifier": {"config_groups": groups, "ignore": ["lm_head"]}}
found = qjax.oneshot(folder, recipe, np.load(ids), shuffle_calibration_samples=False)
named = layers.flat(found.tree["model"]["layers"])
np.savez(out, **{k: layers.dense(v) for k, v in named.items() if isinstance(v, qjax.QArray)})
"""


def test_several_devices_share_the_work(tmp_path: Path) -> None:
    """Samples and rows are shared out; only sums are in another order."""
    ids, out, folder = tmp_path / "ids.npy", tmp_path / "out.npz", GOLDEN / "base-tiny-llama"
    tokens = np.random.default_rng(0).integers(0, 250, (5, 1200)).astype(np.int32)
    np.save(ids, tokens)
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    script = [sys.executable, "-c", ON_FOUR_DEVICES, str(folder), str(ids), str(out)]
    done = subprocess.run(script, env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    alone = qjax.oneshot(folder, GPTQ, tokens, progress=False, shuffle_calibration_samples=False)
    own = weights_of(alone)
    with np.load(out) as found:
        shares = [np.isclose(found[name], own[f"model.layers.{name}"]).mean() for name in found]
    assert min(shares) > 0.97


def test_a_modifier_of_ones_own(llama: qjax.Params) -> None:
    def to_sixtyfourths(values, like, grid, modifier, names):
        scale = np.full((len(values), 1), 1 / 64, np.float32)
        return with_codes(values, grids.Scales(scale), grid)

    with pytest.raises(qjax.RecipeError, match="no such modifier"):
        qjax.oneshot(llama, "s_stage: {m_modifiers: {SixtyFourthsModifier: {scheme: W8A8}}}")

    @register_modifier(to_sixtyfourths)
    @dataclass(frozen=True, kw_only=True)
    class SixtyFourthsModifier(QuantizationMixin):
        pass

    found = qjax.oneshot(
        llama,
        "s_stage: {m_modifiers: {SixtyFourthsModifier: {scheme: W8A8, ignore: [lm_head]}}}",
        progress=False,
    )
    name = "model.layers.0.mlp.up_proj.weight"
    before, after = weights_of(llama)[name], weights_of(found)[name]
    np.testing.assert_array_equal(after, np.clip(np.rint(before * 64), -128, 127) / 64)
    with pytest.raises(ValueError, match="'GPTQModifier' is taken"):
        register_modifier(to_sixtyfourths)(type("GPTQModifier", (QuantizationMixin,), {}))
    with pytest.raises(TypeError, match="must derive"):
        register_modifier(to_sixtyfourths)(SmoothQuantModifier)  # type: ignore[type-var]
