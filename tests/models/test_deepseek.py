"""DeepSeek-V2 and V3 against transformers: latent attention, choice of experts, FP8 in blocks.

The golden checkpoints are random (golden/make_models.py). V2 has no latent of queries and chooses
experts by softmax within groups; V3 has one, with biases, and chooses by biased sigmoids.
"""

import json
import shutil
from dataclasses import replace
from functools import cache, partial
from itertools import product

import ml_dtypes
import numpy as np
import pytest
from safetensors import deserialize
from safetensors.numpy import load_file, save_file

import qjax
from qjax import kv_cache, ops
from qjax.errors import CheckpointError, UnsupportedError
from qjax.models.config import model_config
from qjax.params import Params
from tests.programs import forward

TOLERANCE = 2e-5
DENSE = ("tiny-deepseek-v2-dense", "tiny-deepseek-v3-dense")
NAMES = ("tiny-deepseek-v2", "tiny-deepseek-v3", *DENSE)


@pytest.fixture(scope="module")
def model(golden):
    def load(name):
        folder = golden / name
        return qjax.load(folder / "model.gguf" if name.startswith("gguf") else folder)

    return cache(load)


def reference(golden, name, prompt):
    with np.load(golden / name / "reference.npz") as file:
        return file[f"ids_{prompt}"], file[f"logits_{prompt}"]


def fields_of(golden, name):
    return json.loads((golden / name / "config.json").read_text())


def difference(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize("prompt", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers(model, golden, name, prompt):
    ids, logits = reference(golden, name, prompt)
    assert difference(forward(model(name), ids), logits) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_batches_continue_as_transformers(model, golden, name):
    """Both prompts in one batch, through the paged cache."""
    params = model(name)
    # Its tokenizer serves to have one; tokens go in and come out as numbers.
    params = Params(params.tree, params.config, model("base-tiny-llama").host)
    with np.load(golden / name / "reference.npz") as file:
        prompts = [file[f"ids_{i}"].tolist() for i in range(2)]
        wanted = [file[f"greedy_{i}"].tolist() for i in range(2)]
    results = qjax.generate(
        params, prompts, max_tokens=len(wanted[0]), ignore_eos=True, numerics="exact"
    )
    assert [list(result.token_ids) for result in results] == wanted


# Random weights multiply what rounding does, but what has nothing to do with the reference differs
# from it by about 1.4. These two have no experts, of which a rounding may choose others.
@pytest.mark.parametrize(("dtype", "tolerance"), [("int8", 0.2), ("fp8", 0.35), ("int4", 0.7)])
@pytest.mark.parametrize("name", ["tiny-deepseek-v2-dense", "gguf-deepseek-v3-F32"])
def test_quantized_caches(model, golden, name, dtype, tolerance):
    """Of keys and values of all heads, and of latent ones."""
    params = model(name)
    assert params.config.mla.split == name.startswith("gguf")
    ids, logits = reference(golden, name, 1)
    rounded = forward(params, ids, kv_cache_dtype=dtype)
    assert 1e-3 < difference(rounded, logits) < tolerance
    # The first token is all that it sees.
    assert difference(rounded[0], logits[0]) < tolerance / 4
    width = {"int8": params.config.head_dim + 2, "fp8": params.config.head_dim}
    width["int4"] = params.config.head_dim // 2 + 3
    heads = 1 if params.config.mla.split else params.config.num_heads
    size = kv_cache.bytes_per_token(params.config, "fp8_e4m3" if dtype == "fp8" else dtype)
    assert size == 2 * params.config.num_layers * heads * width[dtype]


def test_scales_of_what_is_not_cached(golden, tmp_path):
    """Those of plain keys and values would not fit what latent attention caches."""
    folder = tmp_path / "scaled"
    shutil.copytree(golden / "tiny-deepseek-v2-dense", folder)
    stored = load_file(folder / "model.safetensors")
    layers = len({name.split(".")[2] for name in stored if ".layers." in name})
    for layer, which in product(range(layers), "kv"):
        stored[f"model.layers.{layer}.self_attn.{which}_scale"] = np.array(0.1, np.float32)
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(UnsupportedError, match="quantize_activations=False loads it"):
        qjax.load(folder)
    assert qjax.load(folder, quantize_activations=False).config.kv_scales == 0


def with_mla(config, **changes):
    return replace(config, mla=replace(config.mla, **changes))


def with_rope(config, **changes):
    return replace(config, rope=tuple((kind, replace(r, **changes)) for kind, r in config.rope))


@pytest.mark.parametrize(
    "change",
    [
        partial(with_mla, rope_interleave=False),
        partial(with_rope, rope_type="default"),
        partial(with_rope, attention_factor=1.0),
        partial(replace, query_scale=48**-0.5),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_references_tell_each_feature(model, golden, name, change):
    """A reference that a feature does not move would prove nothing about it."""
    ids, logits = reference(golden, name, 1)
    params = model(name)
    changed = Params(params.tree, change(params.config))
    assert difference(forward(changed, ids), logits) > 100 * TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_sizes_of_the_published_models(golden, name):
    """As their config.json has them: no head_dim, rope in the old keys."""
    fields = fields_of(golden, name)
    del fields["head_dim"], fields["rope_parameters"], fields["qk_head_dim"]
    published = {
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "hidden_size": 7168,
        "max_position_embeddings": 163_840,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 4096,
        },
    }
    config = model_config(fields | published)
    rope = config.rope[0][1]
    assert (rope.rotary_dim, rope.factor, rope.attention_factor) == (64, 40.0, 1.0)
    # The root of 1/192, by the square of yarn's mscale of a factor of 40, 1.3689.
    assert config.query_scale == pytest.approx(0.135233779)
    assert kv_cache.bytes_per_token(config, "bfloat16") == 2 * config.num_layers * 128 * 192 * 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_key_value_heads", 2),
        ("kv_lora_rank", None),
        ("kv_lora_rank", 1 << 40),
        ("q_lora_rank", "48"),
        ("qk_rope_head_dim", 15),
        ("v_head_dim", 0),
        ("rope_interleave", 1),
        ("n_group", 3),
        ("topk_group", 5),
        ("topk_group", 1),
        ("num_experts_per_tok", 9),
        ("routed_scaling_factor", -1.0),
        ("n_shared_experts", -1),
        ("moe_intermediate_size", None),
        ("num_nextn_predict_layers", -1),
    ],
)
def test_hostile_values_name_the_field(golden, field, value):
    with pytest.raises(CheckpointError) as caught:
        model_config(fields_of(golden, "tiny-deepseek-v3") | {field: value}, file="config.json")
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("tiny-deepseek-v2", {"norm_topk_prob": True}),
        ("tiny-deepseek-v2", {"topk_method": "noaux_tc"}),
        ("tiny-deepseek-v3", {"scoring_func": "softmax"}),
    ],
)
def test_unsupported_choices_of_experts(golden, name, fields):
    with pytest.raises(UnsupportedError, match=next(iter(fields))):
        model_config(fields_of(golden, name) | fields)


def copied(golden, name, folder, tensors, **fields):
    """A checkpoint with other tensors and other fields in its config."""
    shutil.copytree(golden / name, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "config.json").write_text(json.dumps(fields_of(golden, name) | fields))
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_layers_that_predict_further_tokens_are_left_out(model, golden, tmp_path):
    name = "tiny-deepseek-v3-dense"
    tensors = load_file(golden / name / "model.safetensors")
    last = {k.replace(".1.", ".2.", 1): v for k, v in tensors.items() if ".layers.1." in k}
    assert last
    last["model.layers.2.eh_proj.weight"] = np.zeros((64, 128), ml_dtypes.bfloat16)
    with_layer = copied(golden, name, tmp_path / "1", tensors | last, num_nextn_predict_layers=1)
    ids, _ = reference(golden, name, 0)
    assert (forward(qjax.load(with_layer), ids) == forward(model(name), ids)).all()
    with pytest.raises(CheckpointError, match=r"layers\.2\."):
        qjax.load(copied(golden, name, tmp_path / "0", tensors | last, num_nextn_predict_layers=0))


def rounded_in_blocks(weight, size):
    """Codes fp8_e4m3, scales of blocks, some of them partial at the edges, and what they mean."""
    weight = np.asarray(weight, np.float32)
    padded = np.pad(weight, [(0, -n % size) for n in weight.shape])
    rows, columns = (n // size for n in padded.shape)
    largest = np.abs(padded).reshape(rows, size, columns, size).max((1, 3))
    scale = (largest / 448).astype(np.float32)
    spread = scale.repeat(size, 0).repeat(size, 1)[: weight.shape[0], : weight.shape[1]]
    codes = (weight / spread).astype(ml_dtypes.float8_e4m3fn)
    return codes, scale, codes.astype(np.float32) * spread


def fp8_in_blocks(golden, folder, name, size, further=()):
    """A checkpoint as DeepSeek publishes its models, `weight_scale_inv` and a router that stays
    whole; and its tensors in full precision. `further` tensors are stored as they are."""
    plain, stored = {}, dict(further)
    for key, value in load_file(golden / name / "model.safetensors").items():
        plain[key] = stored[key] = value
        if "proj" in key and value.ndim == 2:
            stored[key], stored[key + "_scale_inv"], plain[key] = rounded_in_blocks(value, size)
    method = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [size, size],
    }
    # So many layers behind the last are published; none of them is where nothing is stored.
    fields = {"num_nextn_predict_layers": 1, "quantization_config": method}
    return copied(golden, name, folder, stored, **fields), plain


@pytest.mark.parametrize(("name", "size"), [(DENSE[0], 128), (DENSE[1], 32)])
def test_fp8_in_blocks(golden, tmp_path, name, size):
    folder, plain = fp8_in_blocks(golden, tmp_path / "fp8", name, size)
    params = qjax.load(folder, quantize_activations=False)
    latent = params.tree["model"]["layers"]["1"]["self_attn"]["kv_a_proj_with_mqa"]["weight"]
    module = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    assert latent.shape == (56, 64)
    assert (np.asarray(ops.unprepare(latent).dequantize()) == plain[module]).all()
    assert latent.qtype == "fp8_e4m3"
    ids, logits = reference(golden, name, 1)
    exact = forward(qjax.load(copied(golden, name, tmp_path / "plain", plain)), ids)
    assert difference(forward(params, ids), exact) < TOLERANCE
    assert 100 * TOLERANCE < difference(exact, logits) < 0.3


def test_fp8_experts(golden, tmp_path):
    """Those of V3 as it is published, with a layer behind the last that predicts further tokens."""
    name, layer = "tiny-deepseek-v3", "model.layers.3"
    codes, scale, _ = rounded_in_blocks(np.ones((48, 64)), 32)
    further = {
        f"{layer}.embed_tokens.weight": np.ones((160, 64), ml_dtypes.bfloat16),
        f"{layer}.eh_proj.weight": np.ones((64, 128), ml_dtypes.bfloat16),
        f"{layer}.shared_head.norm.weight": np.ones(64, ml_dtypes.bfloat16),
        f"{layer}.mlp.experts.0.up_proj.weight": codes,
        f"{layer}.mlp.experts.0.up_proj.weight_scale_inv": scale,
        f"{layer}.mlp.gate.e_score_correction_bias": np.ones(8, np.float32),
    }
    folder, plain = fp8_in_blocks(golden, tmp_path / "fp8", name, 32, further)
    params = qjax.load(folder, quantize_activations=False)
    experts = params.tree["model"]["layers"]["1"]["mlp"]["experts"]
    for part, stack in experts.items():
        weight = ops.unprepare(stack["weight"])
        assert weight.qtype == "fp8_e4m3"
        wanted = [plain[f"model.layers.1.mlp.experts.{i}.{part}.weight"] for i in range(8)]
        assert (np.asarray(weight.dequantize()) == np.stack(wanted)).all()
    ids, _ = reference(golden, name, 1)
    exact = forward(qjax.load(copied(golden, name, tmp_path / "plain", plain)), ids)
    assert difference(forward(params, ids), exact) < TOLERANCE
    saved = qjax.save(qjax.load(folder), tmp_path / "saved")
    files = [path / "model.safetensors" for path in (saved, folder)]
    one, other = (
        {name: bytes(entry["data"]) for name, entry in deserialize(file.read_bytes())}
        for file in files
    )
    assert one == other


def test_biases_of_the_choice_of_experts(golden, tmp_path):
    """They are stored in float32 and needed, and choose alone: weights come from the scores."""
    name, bias = "tiny-deepseek-v3", "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors = load_file(golden / name / "model.safetensors")
    tensors[bias] = tensors[bias].astype(np.float32)
    ids, logits = reference(golden, name, 1)
    turned = copied(golden, name, tmp_path / "turned", tensors | {bias: -tensors[bias]})
    assert difference(forward(qjax.load(turned), ids), logits) > 100 * TOLERANCE
    raised = copied(golden, name, tmp_path / "raised", tensors | {bias: tensors[bias] + 1})
    assert difference(forward(qjax.load(raised), ids), logits) < TOLERANCE
    del tensors[bias]
    with pytest.raises(CheckpointError, match="e_score_correction_bias"):
        qjax.load(copied(golden, name, tmp_path / "without", tensors))
