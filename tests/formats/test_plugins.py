"""Formats that come from outside: a plugin that is installed, one that is broken, taken names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import qjax
from qjax import registry

PLUGIN = Path(__file__).with_name("flip5.py")
ROOT = Path(__file__).resolve().parent.parent.parent


def install(site: Path, name: str, source: str, target: str) -> None:
    """What pip leaves behind of a package of one module, with its entry point."""
    (site / f"{name}.py").write_text(source)
    info = site / f"qjax_{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: qjax-{name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[qjax.plugins]\n{name} = {target}\n")


def run(site: Path, code: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_an_installed_plugin_loads_runs_and_saves(golden: Path, tmp_path: Path) -> None:
    install(tmp_path, "flip5", PLUGIN.read_text(), "flip5")
    code = f"""
import jax, numpy as np, qjax
from safetensors.numpy import load_file

source, folder = {str(golden / "base-tiny-llama")!r}, {str(tmp_path / "saved")!r}
made = qjax.load(source, quantization="flip5")
qjax.save(made, folder)
read = qjax.load(folder)
for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(read), strict=True):
    np.testing.assert_array_equal(one, other)
first, second = (qjax.generate(p, "hello", max_tokens=4).token_ids for p in (made, read))
assert first == second and len(first) == 4

# The stored numbers mean the plain ones, as the format's description says.
stored = load_file(folder + "/model.safetensors")
plain = qjax.load(source).tree["model"]["layers"]["0"]["mlp"]["up_proj"]["weight"]
name = "model.layers.0.mlp.up_proj."
low, high, scale = (stored[name + suffix] for suffix in ("low", "high", "scale"))
n, k = len(low), 2 * low.shape[1]
weights = np.empty((n, k))
for j in range(k):
    code = low[:, j % (k // 2)] >> (0 if j < k // 2 else 4) & 15
    code = code | (high[:, j // 8] >> j % 8 & 1) << 4
    weights[:, j] = (16.0 - code) * scale[:, j // 32].astype(float)
from qjax import ops
expected = np.asarray(ops.unprepare(plain).dequantize())
limit = np.repeat(np.abs(scale.astype(float)), 32, axis=1) * 0.6
assert (np.abs(weights - expected) <= limit).all()
"""
    done = run(tmp_path, code)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


def test_a_broken_plugin_is_named_and_left_out(golden: Path, tmp_path: Path) -> None:
    install(tmp_path, "wrecked", "raise RuntimeError('no such luck')", "wrecked")
    code = f"""
import qjax
params = qjax.load({str(golden / "base-tiny-llama")!r}, quantization="fp8")
assert params.nbytes
try:
    qjax.load({str(golden / "base-tiny-llama")!r}, quantization="unheard_of")
except qjax.UnsupportedError as error:
    print(error)
"""
    done = run(tmp_path, code)
    assert done.returncode == 0, done.stderr
    told = "'wrecked' of qjax-wrecked"
    assert done.stderr.count(told) == 1
    assert "RuntimeError: no such luck" in done.stderr
    assert "'unheard_of' is not supported" in done.stdout
    assert told in done.stdout


def test_importing_qjax_imports_no_plugin_and_no_format(tmp_path: Path) -> None:
    install(tmp_path, "wrecked", "raise RuntimeError('no such luck')", "wrecked")
    code = "import sys, qjax; print([m for m in sys.modules if m.startswith(('qjax.', 'jax'))])"
    done = run(tmp_path, code)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def config_class(module: str, name: str = "Mine") -> type:
    return type(name, (qjax.QuantizationConfig,), {"__module__": module, "__qualname__": name})


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize("taken", ["gptq", "Compressed-Tensors", "mine", "other"])
def test_taken_names_are_refused(taken: str) -> None:
    qjax.register_quantization_config("mine", "other")(config_class("theirs"))
    with pytest.raises(ValueError, match=f"{taken.lower()!r} is taken"):
        qjax.register_quantization_config("new", taken)(config_class("ours"))
    assert "new" not in registry._registered


@pytest.mark.usefixtures("names")
def test_a_class_may_be_defined_again() -> None:
    first, second = config_class("__main__"), config_class("__main__")
    for each in (first, second):
        assert qjax.register_quantization_config("mine", "other")(each) is each
    assert registry.quantization_config("OTHER") is second
    assert second.name == "mine"


@pytest.mark.usefixtures("names")
def test_only_formats_are_registered() -> None:
    with pytest.raises(TypeError, match=r"derive from qjax\.QuantizationConfig"):
        qjax.register_quantization_config("mine")(type("Mine", (), {}))
