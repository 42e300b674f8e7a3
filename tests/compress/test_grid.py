"""Grids, against what LLM Compressor wrote for the same weights, and against float64 numpy."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax.checkpoint.safetensors_io import open_safetensors
from qjax.compress import grid as grids
from qjax.compress.grid import Grid, Scales
from qjax.errors import UnsupportedError
from qjax.formats import ct_layouts
from qjax.formats.base import Keys
from qjax.formats.compressed_tensors import read_args
from qjax.scheme import QuantizationArgs

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
OUTSIDE = Path(os.environ.get("QJAX_FIXTURES", GOLDEN))
RECORDED = np.load(GOLDEN / "ct_grids.npz")
SCHEMES = sorted({name.split("/")[0] for name in RECORDED.files})
# Whole checkpoints, where they are there: the folder of the base, or golden's tiny Llama.
BASES = {
    "ct-fp8-block": "base-tiny-llama256",
    "ct-gemma3-fp8-dynamic": "base-tiny-gemma3",
    "ct-qwen2-fp8-dynamic": "base-tiny-qwen2",
    "ct-qwen3-w4a16-g32": "base-tiny-qwen3",
    "ct-phi3-w4a16-g32": "base-tiny-phi3",
}
OTHERS = ("ct-fp8-static", "ct-int8-w8a8-static-asym", "ct-mxfp4", "ct-nvfp4", "ct-w4afp8-g32")
WHOLE = [
    name
    for name in (*(SCHEMES if OUTSIDE != GOLDEN else ()), *OTHERS, *BASES)
    if (OUTSIDE / name).is_dir()
]
FUSED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


def args_of(values: dict) -> QuantizationArgs:
    args = read_args(Keys({"weights": values}, "config.json"), "weights")
    assert args is not None
    return args


def tensors(folder: Path) -> dict[str, np.ndarray]:
    with open_safetensors(folder) as files:
        return {name: np.array(files.array(name)) for name in files.tensors}


@pytest.fixture(scope="module")
def llama() -> dict[str, np.ndarray]:
    return tensors(GOLDEN / "base-tiny-llama")


minmax = jax.jit(grids.minmax, static_argnums=1)
nearest = jax.jit(grids.nearest, static_argnums=3)
rounded = jax.jit(grids.rounded, static_argnums=2)


def written(base: dict[str, np.ndarray], module: str, args: QuantizationArgs, packed: bool) -> dict:
    """The tensors that our rounding gives for a layer, as compressed-tensors stores them."""
    w = jnp.asarray(base[f"{module}.weight"])
    grid = Grid.of(args, (w.shape[0], w.shape[1]), "bfloat16", signed=not packed)
    parent, name = module.rsplit(".", 1)
    fused = next((group for group in FUSED if name in group), {name})
    absmax = max(np.abs(base[f"{parent}.{each}.weight"].astype(np.float32)).max() for each in fused)
    scales = minmax(w, grid, jnp.asarray(absmax, jnp.bfloat16))
    each = grids.spread(scales, grid, (w.shape[0], w.shape[1]))
    codes = nearest(w, each.scale, each.zero, grid)
    assert codes.dtype == np.float32
    encoded = grids.encoded(codes, scales, grid)
    values = grids.values(codes, each.scale, each.zero, grid)
    np.testing.assert_allclose(encoded.dequantize(), values, rtol=3e-7)
    return ct_layouts.encode(module, encoded, packed=packed)


def same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert np.ascontiguousarray(array).tobytes() == theirs[name].tobytes(), name


@pytest.mark.parametrize("name", SCHEMES)
def test_equals_llm_compressor(name: str, llama: dict[str, np.ndarray]) -> None:
    args = args_of(json.loads(str(RECORDED[f"{name}/args"])))
    module = "model.layers.0.self_attn.k_proj"
    theirs = {
        key.rsplit(".", 1)[1]: RECORDED[key]
        for key in RECORDED.files
        if key.startswith(f"{name}/{module}.")
    }
    same(written(llama, module, args, "weight_packed" in theirs), theirs)


@pytest.mark.parametrize("name", WHOLE)
def test_equals_llm_compressor_in_whole_models(name: str, llama: dict[str, np.ndarray]) -> None:
    base = tensors(OUTSIDE / BASES[name]) if name in BASES else llama
    config = json.loads((OUTSIDE / name / "config.json").read_text())["quantization_config"]
    args = args_of(config["config_groups"]["group_0"]["weights"])
    stored = tensors(OUTSIDE / name)
    modules = {key.rsplit(".", 1)[0] for key in stored if key.endswith(".weight_scale")}
    assert modules
    for module in modules:
        theirs = {
            key.rsplit(".", 1)[1]: value
            for key, value in stored.items()
            if key.startswith(f"{module}.weight")
        }
        same(written(base, module, args, "weight_packed" in theirs), theirs)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_against_float64(bits: int, symmetric: bool) -> None:
    w = normal(8, 64) + (0 if symmetric else 0.5)
    args = QuantizationArgs(bits, "int", symmetric, "group", 32)
    grid = Grid.of(args, w.shape)
    assert grid.symmetric == symmetric
    groups = w.astype(np.float64).reshape(8, 2, 32)
    low, high = groups.min(-1), groups.max(-1)
    if symmetric:
        scale, zero = np.maximum(-low, high) * 2 / (2**bits - 1), np.full((8, 2), 2 ** (bits - 1))
    else:
        scale = (high - low) / (2**bits - 1)
        zero = np.rint(-low / scale)
    codes = np.rint(groups / scale[..., None]) + zero[..., None]
    codes = np.clip(codes, 0, 2**bits - 1)
    scales = minmax(jnp.asarray(w), grid)
    np.testing.assert_allclose(scales.scale, scale, rtol=1e-6)
    assert (scales.zero is None) == symmetric
    wanted = ((codes - zero[..., None]) * scale[..., None]).reshape(8, 64)
    # An extreme may lie half way between two codes, where either is right.
    ours = np.asarray(rounded(jnp.asarray(w), scales, grid))
    np.testing.assert_allclose(np.abs(w - ours), np.abs(w - wanted), atol=2e-6)


@pytest.mark.parametrize(
    ("args", "held"),
    [
        (QuantizationArgs(4, "float", True, "tensor_group", 16), ml_dtypes.float4_e2m1fn),
        (QuantizationArgs(8, "float", True, "block", block_structure=(8, 16)), "fp8"),
        (QuantizationArgs(8, "float", True, "tensor"), "fp8"),
    ],
)
def test_floats_against_ml_dtypes(args: QuantizationArgs, held: type | str) -> None:
    dtype = np.dtype(ml_dtypes.float8_e4m3fn if held == "fp8" else held)
    w = normal(20, 64)
    grid = Grid.of(args, w.shape)
    scales = minmax(jnp.asarray(w), grid)
    each = np.asarray(grids.spread(scales, grid, (w.shape[0], w.shape[1])).scale)
    assert each.shape == w.shape
    wanted = np.clip(w / each, -448, 448).astype(dtype).astype(np.float32) * each
    np.testing.assert_array_equal(rounded(jnp.asarray(w), scales, grid), wanted)


def test_global_scales_are_reciprocals() -> None:
    """Formats store the reciprocal: what a less exact division found is brought to one."""
    grid = Grid("fp4_e2m1", (1, 16), "fp8_e4m3")
    w = normal(4, 32)
    scales = minmax(jnp.asarray(w), grid)
    exact = np.asarray(scales.global_scale)
    # Below 1 in its octave reciprocals lie further apart than these numbers: some are none.
    near = [np.nextafter(exact, np.float32(up)) for up in (0, 1)]
    tried = [*near, *(np.float32(part) * exact for part in np.linspace(1, 2, 40))]
    off = [one for one in tried if 1 / (1 / one) != one]
    assert off
    for one in off:
        codes = np.zeros((4, 32), np.float32)
        found = grids.encoded(codes, scales._replace(global_scale=one), grid)
        assert ct_layouts.with_divisors("layer", found, lossy=False) is not None
        np.testing.assert_allclose(found.aux["global_scale"], one, rtol=1.3e-7)


def test_experts_are_stacked() -> None:
    w = normal(3, 8, 64)
    grid = Grid.of(QuantizationArgs(4, "float", True, "tensor_group", 16), (8, 64))

    def one(w: jax.Array) -> tuple[jax.Array, Scales]:
        scales = grids.minmax(w, grid)
        each = grids.spread(scales, grid, (w.shape[0], w.shape[1]))
        return grids.nearest(w, each.scale, None, grid), scales

    codes, scales = jax.jit(jax.vmap(one))(jnp.asarray(w))
    stacked = grids.encoded(codes, scales, grid)
    assert stacked.qvalue.shape == (3, 8, 32)
    error = np.square(stacked.dequantize() - w).mean((1, 2))
    assert (error < 0.02).all()


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (QuantizationArgs(4, "int", True, "group", 128), "these do: 8, 9, 12, 16, 18, 24"),
        (QuantizationArgs(8, "int", True, "token"), "'token' is not one of weights"),
        (QuantizationArgs(9, "int", True, "channel"), "'int' of 2 to 8 bits"),
        (QuantizationArgs(6, "float", True, "channel"), "symmetric 6-bit floats"),
        (QuantizationArgs(8, "float", False, "channel"), "asymmetric 8-bit floats"),
        (QuantizationArgs(4, "float", True, "channel"), "NVFP4"),
    ],
)
def test_impossible_grids(args: QuantizationArgs, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        Grid.of(args, (576, 576))


def test_bits_per_weight() -> None:
    grid = Grid.of(QuantizationArgs(4, "int", False, "group", 64), (64, 128), "bfloat16")
    assert grid.bits_per_weight((64, 128)) == 4 + 20 / 64
