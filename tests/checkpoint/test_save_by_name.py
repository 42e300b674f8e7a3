"""Formats by their names: settings derived from the weights, as the tools that wrote these say."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import deserialize

import qjax
from qjax import ops
from qjax.checkpoint import saver
from qjax.checkpoint.loader import load
from qjax.errors import CheckpointError, UnsupportedError
from qjax.ops.dense import dequantized
from qjax.qarray import QArray
from qjax.scheme import is_ignored, scheme_for, targets_of

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
OUTSIDE = Path(os.environ.get("QJAX_FIXTURES", GOLDEN))
METHOD_OF = {
    **dict.fromkeys(("ct", "ct09"), "compressed-tensors"),
    **dict.fromkeys(("awq", "autoawq"), "awq"),
    **dict.fromkeys(("fgfp8", "fbgemm"), "fp8"),
    "gptq": "gptq",
    "bnb": "bitsandbytes",
    "hqq": "hqq",
}
FOLDERS = {
    folder.name: folder
    for root in (OUTSIDE, GOLDEN)
    for folder in sorted(root.glob("*"))
    if folder.name.partition("-")[0] in METHOD_OF and any(folder.glob("*.safetensors"))
}
# Of what is loaded, something is kept otherwise than the tool stored it, but means the same.
OTHERWISE = {
    "autoawq-gemv": "gemm is written",
    "bnb-nf4-dq": "absmax is decoded as it is read",
    "bnb-nf4-storage": "likewise",
    "ct09-w3a16": "packed, where that release had bytes",
    "gptq-": "scales are held in the model's dtype, and packing is the usual one",
    "hqq-4b": "whether the tool had rounded its zero points is not kept",
}


def is_weight(node) -> bool:
    return isinstance(node, QArray)


def numbers(params: qjax.Params) -> list[np.ndarray]:
    """Every array of a model, weights dequantized."""

    def plain(leaf):
        if not is_weight(leaf):
            return np.asarray(leaf)
        weight = ops.unprepare(jax.tree.map(np.asarray, leaf))
        if weight.qvalue.ndim == 2:
            return dequantized(weight)
        experts = range(len(weight.qvalue))
        return np.stack([dequantized(jax.tree.map(lambda a, i=i: a[i], weight)) for i in experts])

    return [plain(leaf) for leaf in jax.tree.leaves(params.tree, is_leaf=is_weight)]


def acts(params: qjax.Params) -> list:
    leaves = jax.tree.leaves(params.tree, is_leaf=is_weight)
    return [leaf.act for leaf in leaves if is_weight(leaf)]


def same_numbers(one: qjax.Params, other: qjax.Params) -> bool:
    return all(map(np.array_equal, numbers(one), numbers(other)))


def stored(folder: Path) -> dict[str, tuple]:
    return {
        name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for file in sorted(folder.glob("*.safetensors"))
        for name, entry in deserialize(file.read_bytes())
    }


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("name", FOLDERS)
def test_own_format_by_its_name(name, tmp_path):
    """The tensors that the tool wrote, byte for byte; the weights that they mean."""
    params = load(FOLDERS[name])
    method = METHOD_OF[name.partition("-")[0]]
    assert qjax.save(params, tmp_path / "saved", method) == tmp_path / "saved"
    saved = load(tmp_path / "saved")
    assert same_numbers(saved, params)
    assert acts(saved) == acts(params)
    assert saved.config == params.config
    if not any(name.startswith(start) for start in OTHERWISE):
        assert stored(tmp_path / "saved") == stored(FOLDERS[name])


@pytest.mark.parametrize("name", [n for n in FOLDERS if n.startswith("ct-")])
def test_config_says_what_the_tool_says(name, tmp_path):
    """Of every layer: the same scheme as in the config that LLM Compressor wrote."""
    params = load(FOLDERS[name])
    qjax.save(params, tmp_path / "saved", "compressed-tensors")
    theirs, ours = (qjax_format(folder) for folder in (FOLDERS[name], tmp_path / "saved"))
    modules = [place.pieces[0].module for n, place in params.host.origin.plan.items()
               if hasattr(place, "pieces")]  # fmt: skip
    for module in modules:
        wanted, found = (said(each, module) for each in (theirs, ours))
        assert found == wanted, module
    kept = ("num_bits", "type", "strategy", "symmetric", "dynamic")
    configs = [config_of(folder) for folder in (FOLDERS[name], tmp_path / "saved")]
    caches = [config["kv_cache_scheme"] for config in configs]
    assert len({json.dumps(c and {key: c[key] for key in kept}) for c in caches}) == 1
    assert configs[0]["format"] == configs[1]["format"]


def qjax_format(folder: Path):
    return load(folder).host.origin.quantization


def said(config, module: str) -> tuple | None:
    if is_ignored(module, config.ignore):
        return None
    scheme = scheme_for(module, config.schemes)
    if scheme is None or module == "model.embed_tokens":
        return None

    def args(found) -> tuple | None:
        if found is None:
            return None
        names = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure")
        return *(getattr(found, name) for name in names), found.dynamic, found.scale_dtype

    return args(scheme.weights), args(scheme.input_activations), scheme.format


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("ct-w4a16-g32-gptq-actorder-weight", "gptq"),
        ("ct-w4a16-g32-gptq-actorder-weight", "awq"),
        ("ct-w4a16-g32-gptq-actorder-weight", "hqq"),
        ("gptq-4b-g32-desc", "compressed-tensors"),
        ("fgfp8-block-64-ue8m0", "safetensors"),
        ("bnb-nf4-dq", "safetensors"),
        ("hqq-4b-g64-axis0", "safetensors"),
        ("gptq-4b-g32-desc", "safetensors"),
    ],
)
def test_other_formats_hold_the_same_numbers(name, method, tmp_path):
    params = load(FOLDERS[name])
    saved = saver.save(params, tmp_path / "saved", method)
    assert not saved.rounded
    loaded = load(tmp_path / "saved")
    assert same_numbers(loaded, params)
    if method == "safetensors":
        assert {leaf.qtype for leaf in jax.tree.leaves(loaded.tree, is_leaf=is_weight)
                if is_weight(leaf)} <= {"f32", "bf16"}  # fmt: skip
        assert "quantization_config" not in json.loads((saved.folder / "config.json").read_text())
    else:
        assert config_of(saved.folder)["quant_method"] == method


def test_dense_in_a_dtype_of_ones_own(tmp_path):
    params = load(FOLDERS["hqq-4b-g64-axis0"])
    saved = saver.save(params, tmp_path / "saved", "safetensors", dtype="bfloat16")
    # bfloat16 keeps 8 bits of a number: half of the last is 2 ** -9 of it at most.
    assert 0 < max(saved.rounded.values()) <= 2.0**-8
    assert json.loads((saved.folder / "config.json").read_text())["dtype"] == "bfloat16"
    tensors = stored(saved.folder)
    assert {dtype for dtype, *_ in tensors.values()} == {"BF16"}
    exact = numbers(params)
    for before, after in zip(exact, numbers(load(saved.folder)), strict=True):
        np.testing.assert_allclose(after, before, rtol=2.0**-8, atol=0)


def test_what_a_format_cannot_hold(tmp_path):
    int8 = load(FOLDERS["ct-int8-w8a8-dyn-asym"])
    with pytest.raises(UnsupportedError, match=r"0\.mlp\.down_proj.*rounded inputs.*could be saved "
                       r"as: compressed-tensors, safetensors"):  # fmt: skip
        qjax.save(int8, tmp_path / "a", "gptq")
    with pytest.raises(UnsupportedError, match=r"another order.*gptq"):
        qjax.save(load(FOLDERS["gptq-4b-g32-desc"]), tmp_path / "a", "awq")
    with pytest.raises(UnsupportedError, match=r"'gtpq'.*compressed-tensors, gptq"):
        qjax.save(int8, tmp_path / "a", "gtpq")
    with pytest.raises(UnsupportedError, match=r"no weight of this model is quantized"):
        qjax.save(load(GOLDEN / "base-tiny-llama"), tmp_path / "a", "awq")
    with pytest.raises(UnsupportedError, match=r"dtype 'int8'"):
        qjax.save(int8, tmp_path / "a", "safetensors", dtype="int8")
    with pytest.raises(UnsupportedError, match=r"'q_proj' names no layer"):
        qjax.save(int8, tmp_path / "a", "compressed-tensors", dense=["q_proj"])
    assert not list(tmp_path.iterdir())


def test_layers_may_be_left_dense(tmp_path):
    params = load(FOLDERS["gptq-4b-g32-desc"])
    config = tmp_path / "saved" / "config.json"
    qjax.save(params, tmp_path / "saved", "gptq", dense=[r"re:.*\.1\.mlp\.", "lm_head"])
    assert same_numbers(load(tmp_path / "saved"), params)
    wanted = {rf"-:^model\.layers\.1\.mlp\.{part}_proj$": {} for part in ("down", "gate", "up")}
    assert json.loads(config.read_text())["quantization_config"]["dynamic"] == wanted


def test_scales_are_rounded_only_where_that_is_asked_for(tmp_path):
    name = "model.layers.0.mlp.up_proj"
    codes = np.arange(256 * 64, dtype=np.uint8).reshape(256, 64)
    scale = np.full((256, 4), np.float32(1 + 2**-20))
    weight = QArray(codes, "uint4b8", (256, 128), scale, group=(1, 32))
    params = with_weight(load(GOLDEN / "base-tiny-llama"), name, weight)
    with pytest.raises(UnsupportedError, match=rf"{name}: its scales are float32.*9\.5e-07.*lossy"):
        qjax.save(params, tmp_path / "awq", "awq")
    saved = saver.save(params, tmp_path / "awq", "awq", lossy=True)
    assert saved.rounded == {name: pytest.approx(2.0**-20, rel=1e-3)}
    assert stored(saved.folder)[f"{name}.scales"][:2] == ("F16", (4, 256))
    saved = saver.save(params, tmp_path / "ct", "compressed-tensors")
    assert not saved.rounded


def with_weight(params: qjax.Params, module: str, weight: QArray) -> qjax.Params:
    node = params.tree
    for key in module.split("."):
        node = node[key]
    node["weight"] = weight
    return params


def test_weights_of_ones_own_need_a_name(tmp_path):
    weight = QArray(np.zeros((256, 128), np.uint8), "int8", (256, 128),
                    np.ones((256, 1), np.float32), group=(1, 128))  # fmt: skip
    params = with_weight(load(GOLDEN / "base-tiny-llama"), "model.layers.0.mlp.up_proj", weight)
    with pytest.raises(UnsupportedError, match=r"0\.mlp\.up_proj.*format"):
        qjax.save(params, tmp_path / "a")
    with pytest.raises(CheckpointError, match="quant_method"):
        qjax.save(params, tmp_path / "a", {"bits": 4})
    qjax.save(params, tmp_path / "a", "compressed-tensors")
    group = config_of(tmp_path / "a")["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    assert group["format"] == "pack-quantized"
    assert len(config_of(tmp_path / "a")["ignore"]) > 6


def test_targets_name_kinds_where_they_can():
    layers = [f"model.layers.{i}.{part}" for i in range(12) for part in ("mlp.up", "attn.q")]
    experts = [f"model.layers.0.mlp.experts.{i}.up" for i in range(3)]
    assert targets_of(layers[0::2], layers[1::2]) == [r"re:.*\bmlp\.up$"]
    assert targets_of(experts, layers) == [r"re:.*\bmlp\.experts\.\d+\.up$"]
    assert targets_of([*layers[1:4:2], "lm_head"], layers[5::2]) == [
        "model.layers.0.attn.q",
        "model.layers.1.attn.q",
        "lm_head",
    ]
