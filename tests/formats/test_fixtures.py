"""Checkpoints that the tools of the field wrote, against the logits of these tools.

A few small ones lie in tests/golden; the folder that QJAX_FIXTURES names may hold more, and every
one that is there is run. `reference_weightonly.npz` holds logits with unrounded activations and
cache, where a method rounds them; `reference.npz` those of the method as it is.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from pallas_kernels import platform
from qjax import ops
from qjax.forward import forward
from qjax.params import Params
from qjax.qarray import QArray

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
OUTSIDE = Path(os.environ.get("QJAX_FIXTURES", GOLDEN))

# Where the only reference is llama.cpp's own, with activations in 8 bits.
ROUNDED = (
    "gguf-Q1_0",
    "gguf-Q2_0",
    "gguf-gemma3-Q5_0",
    "gguf-qwen3moe-Q8_0",
    "gguf-gptoss-MXFP4_MOE",
)
# Where the only reference rounds activations as the method wants it.
AS_IT_IS = ("ar-fp8-static", "ar-mxfp4", "ar-nvfp4", "ct09-fp8-static-kv8", "quark-nvfp4")
# Where the tool computes in float16, or casts scales to bfloat16.
HALF = ("ar-mixed-bits", "ar-w2g32", "ar-w3g32", "ar-w4g32-asym", "ar-w4g32-asym-awq")
# ModelOpt's exporter divides by scales in bfloat16, so that some codes in the file are others than
# its reference had; and weights of "w4a8" were rounded to fp8 there before they were to int4.
EXPORTED = {
    **dict.fromkeys(("mo-fp8", "mo-fp8-kv8"), 0.02),
    **dict.fromkeys(("mo-fp8-pb-wo", "mo-fp8-pc-pt"), 0.003),
    "mo-int4-awq": 0.01,
    "mo-w4a8-awq": 0.05,
}
# The reference without rounded activations is of no use: weights were dequantized there after the
# tool's CPU kernel had reordered their bytes. The other one is the tool's run in bfloat16.
NO_WEIGHT_ONLY = ("bnb-fp4", "bnb-nf4", "bnb-nf4-dq", "bnb-nf4-storage-bf16", "bnb-mixtral-nf4")


def checkpoints() -> list[str]:
    found = {
        file.parent.name for root in (GOLDEN, OUTSIDE) for file in root.glob("*/reference.npz")
    }
    return sorted(name for name in found if not name.startswith(("tiny-", "base-")))


def folder(name: str) -> Path:
    return GOLDEN / name if (GOLDEN / name).is_dir() else OUTSIDE / name


def weight_only(path: Path) -> Path:
    """The reference with unrounded activations, where there is one."""
    file = path / "reference_weightonly.npz"
    return file if file.exists() and path.name not in NO_WEIGHT_ONLY else path / "reference.npz"


def logits_of(params: Params, prompts: list[np.ndarray]) -> np.ndarray:
    """Logits of all prompts in one call; what follows a prompt's end does not change it."""
    tokens = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, ids in zip(tokens, prompts, strict=True):
        row[: len(ids)] = ids
    return np.asarray(jax.jit(forward)(params, jnp.asarray(tokens)))


def compare(params: Params, file: Path) -> tuple[float, float, float]:
    """Largest relative error of a prompt's logits, mean absolute difference by their standard
    deviation, share of equal top tokens."""
    with np.load(file) as reference:
        prompts = [reference[f"ids_{i}"] for i in range(3)]
        errors, means, tops = [], [], []
        for i, logits in enumerate(logits_of(params, prompts)):
            ours, theirs = logits[reference[f"pos_{i}"]], reference[f"logits_{i}"]
            errors.append(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
            means.append(np.abs(ours - theirs).mean() / theirs.std())
            tops.append((ours.argmax(-1) == theirs.argmax(-1)).mean())
    return max(errors), max(means), float(np.mean(tops))


@pytest.mark.parametrize("name", checkpoints())
def test_weights(name):
    """Logits with unrounded activations; the bytes that the weights take in memory."""
    path = folder(name)
    params = qjax.load(path, quantize_activations=name in AS_IT_IS)
    error, mean, _ = compare(params, weight_only(path))
    if name in (*ROUNDED, *AS_IT_IS, *NO_WEIGHT_ONLY):
        assert mean < 0.03
    else:
        assert error < EXPORTED.get(name, 2e-3 if name in HALF else 1e-4)
    stored = sum(
        file.stat().st_size
        for pattern in ("*.safetensors", "*.gguf", "*.bin")
        for file in path.glob(pattern)
    )
    assert params.nbytes <= 1.05 * stored


@pytest.mark.parametrize(
    "name", [n for n in checkpoints() if (folder(n) / "reference_weightonly.npz").exists()]
)
def test_rounded_activations(name):
    """The method as it is: values at the edge between two codes may fall to either side."""
    path = folder(name)
    _, mean, top = compare(qjax.load(path), path / "reference.npz")
    assert mean < 0.1
    assert top > 0.8


def laid_out(params: Params, device: str) -> Params:
    """The model with its weights as an accelerator holds them; XLA multiplies with them here."""

    def lay_out(w: Any) -> Any:
        if not isinstance(w, QArray):
            return w
        canonical = ops.unprepare(w)
        with platform.assume(device):
            return jax.tree.map(jnp.asarray, ops.prepare(canonical))

    tree = jax.tree.map(lay_out, params.tree, is_leaf=lambda node: isinstance(node, QArray))
    return replace(params, tree=tree)


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("gguf-Q2_K", "gpu"),
        ("gguf-h128-Q4_K_M-fallback", "tpu"),
        ("ct-qwen3moe-w4a16-g32", "tpu"),
        ("ct-int8-w8a8-dyn-asym", "gpu"),
    ],
)
def test_layouts_of_accelerators(name, device):
    """The same numbers; quantized activations meet them as codes."""
    path = folder(name)
    params = laid_out(qjax.load(path), device)
    if name == "ct-int8-w8a8-dyn-asym":
        _, mean, top = compare(params, path / "reference.npz")
        assert mean < 0.1
        assert top > 0.8
    else:
        error, _, _ = compare(params, weight_only(path))
        assert error < 1e-4


def continued() -> list[str]:
    """Those whose reference has a continuation."""
    found = []
    for name in checkpoints():
        with np.load(weight_only(folder(name))) as reference:
            found += [name] if "greedy_0" in reference else []
    return found


@pytest.mark.parametrize("name", continued())
def test_greedy(name):
    """The tool's own continuation, as far as its choices were clear."""
    path = folder(name)
    with np.load(weight_only(path)) as reference:
        prompts = [reference[f"ids_{i}"].tolist() for i in range(3)]
        wanted = [reference[f"greedy_{i}"] for i in range(3)]
        margins = [reference[f"greedy_margin_{i}"] for i in range(3)]
    params = qjax.load(path, quantize_activations=name in AS_IT_IS)
    results = qjax.generate(
        params, prompts, max_tokens=len(wanted[0]), ignore_eos=True, numerics="exact"
    )
    rough = (*ROUNDED, *AS_IT_IS, *EXPORTED, *NO_WEIGHT_ONLY)
    tolerance = 0.3 if name in rough else 5e-2 if name in HALF else 2e-3
    for result, tokens, margin in zip(results, wanted, margins, strict=True):
        clear = len(tokens) if (margin > tolerance).all() else int((margin <= tolerance).argmax())
        assert list(result.token_ids[:clear]) == tokens[:clear].tolist()


def test_provenance_is_told():
    for name in checkpoints():
        told = json.loads((folder(name) / "provenance.json").read_text())
        assert told.get("tool") or told.get("what") or told.get("name")
