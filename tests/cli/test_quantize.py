"""`qjax quantize`: what it makes of its options, what it prints, and what it leaves behind."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from tests.programs import forward

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model(golden: Path) -> str:
    return str(golden / "base-tiny-llama")


def test_scheme(run, model, tmp_path):
    out = tmp_path / "out"
    options = ("--q-group-size", 32, "--ignore", "re:.*down.*", "--dtype", "float32")
    code, printed, err = run("quantize", model, out, "W4A16", *options)
    assert code == 0, err
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert (group["weights"]["num_bits"], group["weights"]["group_size"]) == (4, 32)
    # Those are 4 bits and a scale of 16 bits for each 32 weights: all but down_proj.
    uses = {use.qtype: use for use in qjax.load(out).summary().uses}
    assert uses["uint4b8"].tensors == 3 * 6
    assert uses["uint4b8"].bits_per_weight == 4.5
    assert set(uses) == {"uint4b8", "f32", "float32"}
    line = next(line.split() for line in printed.splitlines() if line.startswith("uint4b8"))
    assert line[-1] == "4.50"
    weights = sum(use.weights for use in qjax.load(out).summary().uses)
    bits = 8 * (out / "model.safetensors").stat().st_size / weights
    assert f"{bits:.2f} bits a weight (was" in printed
    assert err.count("error") == 3


def test_recipe_with_samples(run, model, tmp_path):
    """The same as in Python; what has been there is not overwritten."""
    out = tmp_path / "out"
    recipe = ROOT / "configs" / "recipes" / "fp8.yaml"
    samples = ("--calibration", ROOT / "LICENSE", "--num-samples", 4, "--seq-len", 32)
    code, _, err = run("quantize", model, out, "--recipe", recipe, *samples)
    assert code == 0, err
    text = str(ROOT / "LICENSE")
    settings = {"num_calibration_samples": 4, "max_seq_length": 32, "progress": False}
    again = qjax.oneshot(qjax.load(model), recipe, text, **settings)
    tokens = jnp.arange(16)
    found = forward(qjax.load(out), tokens)
    np.testing.assert_allclose(found, forward(again, tokens), rtol=0, atol=1e-5)
    code, _, err = run("quantize", model, out, "FP8_DYNAMIC")
    assert code == 1
    assert "not an empty folder" in err


BAD = [
    (("W8A8", "--format", "gptg"), "'gptg' is not one that is saved"),
    (("Q4_K_M",), "has to end in .gguf"),
    (("W8A8", "--dtype", "int8"), "dtype 'int8' is not supported"),
    ((), "say what to"),
    (("W4A61",), "did you mean 'W4A16'"),
    (("W4A16", "--scheme", "W8A8"), "give the scheme once"),
    (("W4A16", "--method", "gptg"), "did you mean 'gptq'"),
    (("Q4_K_M", "--method", "gptq"), "rtn and imatrix, not gptq"),
    (("FP8", "--group-size", "64"), "groups of its own"),
    (("W8A8", "--calibration", "text.txt"), "--calibration: this recipe takes no samples"),
    (("W8A8", "--seq-len", "64"), "--seq-len: this recipe takes no samples"),
    (("--recipe", "missing.yaml"), "cannot read the recipe missing.yaml"),
    (("--recipe", "a.yaml", "--group-size", "32"), "leave out --group-size"),
    (("W4A16", "--method", "gptq", "--calibration", "missing.txt"), "missing.txt' is no file"),
    (("W8A8", "--ignore", "lm_haed"), "did you mean 'lm_head'"),
    (("W4A16", "--group-size", "48"), "groups of 48 do not divide its 256 inputs"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options(run, model, tmp_path, options, message):
    code, out, err = run("quantize", model, tmp_path / "out", *options)
    assert code == 1
    assert message in err
    assert not out
    assert not list(tmp_path.iterdir())
