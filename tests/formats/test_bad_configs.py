"""Quantization configs that contradict themselves: an error of qjax that names the place."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import qjax
from qjax.errors import QjaxError

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
GROUP = ("config_groups", "group_0")


def changed(
    tmp_path: Path, name: str, keys: tuple[str, ...], value: Any, start: Any = None
) -> Path:
    """A copy of a checkpoint with one value of its quantization config replaced."""
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder)
    file = folder / "config.json"
    config = json.loads(file.read_text("utf-8"))
    node = config.setdefault("quantization_config", {} if start is None else start)
    for key in keys[:-1]:
        node = node.setdefault(key, {})
    node[keys[-1]] = value
    file.write_text(json.dumps(config), "utf-8")
    return folder


@pytest.mark.parametrize(
    ("name", "keys", "value", "told"),
    [
        ("ct-mxfp4", GROUP, None, "config_groups.group_0.targets"),
        ("ct-mxfp4", GROUP, "W4A4", "config_groups.group_0"),
        ("ct-mxfp4", (*GROUP, "targets"), [], "config_groups.group_0.targets"),
        ("ct-mxfp4", (*GROUP, "weights", "num_bits"), "4", "num_bits"),
        ("ct-mxfp4", (*GROUP, "weights", "num_bits"), 7, "7"),
        ("ct-mxfp4", (*GROUP, "weights", "new_key"), 1, "new_key"),
        ("ct-mxfp4", (*GROUP, "weights", "dynamic"), 0, "dynamic"),
        ("ct-mxfp4", ("config_groups",), [], "config_groups"),
        ("ct-mxfp4", ("ignore",), ["re:("], "'re:('"),
        ("ct-mxfp4", ("format",), "zip", "'zip'"),
        ("ct-mxfp4", ("transform_config",), {"config_groups": {"u": {"apply": ["x"]}}}, "u."),
        ("ct-mxfp4", ("sparsity_config",), {"format": "sparse-24-bitmask"}, "sparse-24-bitmask"),
        ("ct-nvfp4a16", (*GROUP, "weights", "type"), "int", "int"),
        ("quark-int8", ("exclude",), ["re:("], "'re:('"),
        ("quark-int8", ("global_quant_config",), None, "the config excludes"),
        ("mo-mxfp8", ("quant_algo",), "FP5", "FP5"),
        ("mo-mxfp8", ("quantized_layers",), {"a": None}, "quantized_layers.a."),
        ("gptq-4b-g32-desc", ("dynamic",), {"x": {"group_size": None}}, "dynamic.x.group_size"),
        ("mo-mxfp8", ("ignore",), "lm_head", "ignore"),
        ("fgfp8-block-64-ue8m0", ("weight_block_size",), [64], "weight_block_size"),
        ("fgfp8-block-64-ue8m0", ("weight_block_size",), [0, 64], "weight_block_size"),
        ("gptoss-mxfp4", ("new_key",), 1, "new_key"),
        ("gptoss-mxfp4", ("quant_method",), ["mxfp4"], "quant_method"),
        ("bnb-nf4-dq", ("bnb_4bit_quant_type",), "nf5", "nf5"),
        # The file beside config.json still says MXFP8.
        ("mo-mxfp8", ("quant_algo",), "FP8", "hf_quant_config.json, quant_algo"),
    ],
)
def test_is_told(tmp_path, name, keys, value, told):
    with pytest.raises(QjaxError) as error:
        qjax.load(changed(tmp_path, name, keys, value))
    assert told in str(error.value)


def test_a_method_of_which_no_weight_is_quantized(tmp_path):
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    folder = changed(tmp_path, "base-tiny-llama", ("quant_method",), "compressed-tensors", config)
    with pytest.raises(QjaxError, match="quantization_config: names compressed-tensors"):
        qjax.load(folder)


@pytest.mark.parametrize(
    ("scheme", "told"),
    [({"num_bits": 8, "type": "int"}, "int8"), ({"num_bits": 8, "type": "float"}, "no scales")],
)
def test_a_cache_that_is_not_rounded_as_told(tmp_path, scheme, told):
    folder = changed(tmp_path, "ct-mxfp4", ("kv_cache_scheme",), scheme)
    if told == "no scales":
        with pytest.warns(UserWarning, match=told):
            qjax.load(folder)
    else:
        with pytest.raises(QjaxError, match=told):
            qjax.load(folder)
    qjax.load(folder, quantize_activations=False)
