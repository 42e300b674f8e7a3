import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.errors import CheckpointError, UnsupportedError
from qjax.formats import gptq
from tests.formats.stored import MODULE, decoded, planned, quantization, weight_of, words

CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
GPTQMODEL = {"meta": {"quantizer": ["gptqmodel:7.6.0"]}}


def layer(bits, n, k, size, *, offset=1, g_idx=None, zero=None, word=32, seed=0):
    """Tensors of a random layer, and the float64 weight that they mean."""
    rng = np.random.default_rng(seed)
    groups = -(-k // size)
    codes = rng.integers(0, 1 << bits, (n, k))
    zero = rng.integers(1, 1 << bits, (n, groups)) if zero is None else zero
    scale = rng.uniform(0.5, 2, (n, groups)).astype(np.float16)
    tensors = {
        "qweight": np.ascontiguousarray(words(codes, bits, word).T),
        "qzeros": words((zero - offset).T, bits, word),
        "scales": np.ascontiguousarray(scale.T),
    }
    group = np.arange(k) // size
    if g_idx is not None:
        group, tensors["g_idx"] = g_idx, g_idx.astype(np.int32)
    return tensors, (codes - zero[:, group]) * scale.astype(np.float64)[:, group]


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_every_width(bits, version):
    tensors, weight = layer(bits, 32, 96, 32, offset=1 if version == "gptq" else 0)
    config = CONFIG | {"bits": bits, "checkpoint_format": version}
    found = decoded(config, tensors, (32, 96))
    assert found.qtype == f"uint{bits}"
    assert found.group == (1, 32)
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-6)


@pytest.mark.parametrize("group_size", [-1, 64])
def test_one_group_and_a_partial_one(group_size):
    tensors, weight = layer(4, 8, 96, 96 if group_size == -1 else 64)
    found = decoded(CONFIG | {"group_size": group_size}, tensors, (8, 96))
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-6)


@pytest.mark.parametrize("word", [8, 16, 64])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_of_other_sizes(bits, word):
    tensors, weight = layer(bits, 32, 64, 32, word=word)
    found = decoded(CONFIG | {"bits": bits, "pack_dtype": f"int{word}"}, tensors, (32, 64))
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-6)


def test_words_of_other_sizes_hold_whole_codes():
    tensors, _ = layer(3, 32, 64, 32, word=16)
    with pytest.raises(UnsupportedError, match="3 bits in words of 16"):
        planned(CONFIG | {"bits": 3}, tensors, (32, 64))


# What GPTQModel 7.6 packs 32 codes 0, 1, 2 ... into.
PLANAR = {
    3: "E4E4E4E4 E4E4E4E4 F0F0F0F0",
    5: "76543210 FEDCBA98 76543210 FEDCBA98 FFFF0000",
    6: "76543210 FEDCBA98 76543210 FEDCBA98 00000000 55555555",
    7: "76543210 FEDCBA98 76543210 FEDCBA98 00000000 55555555 00000000",
}


@pytest.mark.parametrize(
    ("bits", "config"),
    [(bits, {"checkpoint_format": "gptq_p"}) for bits in PLANAR]
    + [(bits, GPTQMODEL) for bits in (5, 6, 7)],  # 3 bits only where the format says so
)
def test_planes(bits, config):
    row = np.array([int(word, 16) for word in PLANAR[bits].split()], np.uint32).view(np.int32)
    tensors = {
        "qweight": np.repeat(row[:, None], 32, 1),
        "qzeros": row[None],
        "scales": np.ones((1, 32), np.float16),
    }
    config = {"checkpoint_format": "gptq_v2"} | config
    found = decoded(CONFIG | {"bits": bits} | config, tensors, (32, 32))
    codes = np.arange(32) % (1 << bits)
    np.testing.assert_array_equal(weight_of(found), codes[None] - codes[:, None])


@given(st.lists(st.integers(0, 15), min_size=16, max_size=16))
def test_zero_points_of_the_first_version_borrow(zeros):
    """A zero point of 0 is stored as -1, which takes from the next: whole words less 0x11111111."""
    first, second = (
        (sum(z << (4 * i) for i, z in enumerate(half)) - 0x11111111) % (1 << 32)
        for half in (zeros[:8], zeros[8:])
    )
    tensors, _ = layer(4, 16, 32, 32)
    tensors["qzeros"] = np.array([[first, second]], np.uint32).view(np.int32)
    found = decoded(CONFIG, tensors, (16, 32))
    assert found.zero_point[:, 0].tolist() == zeros


@given(st.sampled_from([2, 3, 4, 8]), st.integers(0, 2**32), st.booleans())
def test_encode_undoes_decode(bits, seed, act_order):
    rng = np.random.default_rng(seed)
    zero = rng.integers(0 if bits != 3 else 1, 1 << bits, (32, 4))
    order = rng.permutation(np.arange(128) // 32) if act_order else np.arange(128) // 32
    tensors, _ = layer(bits, 32, 128, 32, offset=0, zero=zero, g_idx=order, seed=seed)
    for version in ("gptq_v2", "gptq"):
        config = CONFIG | {"bits": bits, "checkpoint_format": version}
        method = quantization(config)
        weight = decoded(config, tensors, (32, 128))
        written = method.encode(MODULE, weight)
        assert written.keys() == tensors.keys()
        for suffix, array in written.items():
            assert array.dtype == tensors[suffix].dtype
            np.testing.assert_array_equal(array, tensors[suffix], suffix)
        assert quantization(method.to_config()) == method


@pytest.mark.parametrize("seed", range(3))
def test_columns_in_any_order(seed):
    g_idx = np.random.default_rng(seed).permutation(np.arange(96) // 32)
    tensors, weight = layer(4, 8, 96, 32, g_idx=g_idx)
    found = decoded(CONFIG | {"desc_act": True}, tensors, (8, 96))
    assert found.aux["perm"].dtype == np.int32
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-6)


def test_order_of_columns_must_be_told():
    tensors, _ = layer(4, 8, 96, 32)
    with pytest.raises(CheckpointError, match="g_idx: missing"):
        planned(CONFIG | {"desc_act": True}, tensors, (8, 96))
    config = CONFIG | {"desc_act": True, "dynamic": {".*up_proj": {"desc_act": False}}}
    assert "g_idx" not in planned(config, tensors, (8, 96)).reads
    one_group = CONFIG | {"desc_act": True, "group_size": -1}
    assert "g_idx" not in planned(one_group, layer(4, 8, 96, 96)[0], (8, 96)).reads


def test_columns_in_order_need_no_permutation():
    tensors, weight = layer(4, 8, 96, 32, g_idx=np.arange(96) // 32)
    found = decoded(CONFIG | {"desc_act": True}, tensors, (8, 96))
    assert not found.aux
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-6)


def test_groups_of_unequal_size_are_refused():
    g_idx = np.arange(96) // 32
    g_idx[5] = 2
    tensors, _ = layer(4, 8, 96, 32, g_idx=g_idx)
    with pytest.raises(CheckpointError, match="g_idx"):
        decoded(CONFIG, tensors, (8, 96))


def test_symmetric_codes_need_no_zero_points():
    zero = np.full((8, 3), 8)
    tensors, weight = layer(4, 8, 96, 32, zero=zero)
    found = decoded(CONFIG | {"sym": True}, tensors, (8, 96))
    assert (found.qtype, found.zero_point) == ("uint4b8", None)
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-6)
    # Of an asymmetric checkpoint they stay, so that experts are alike.
    assert decoded(CONFIG, tensors, (8, 96)).qtype == "uint4"


def test_settings_of_single_layers():
    config = CONFIG | {
        "dynamic": {"-:.*o_proj": {}, r"+:model\.layers\.1\.": {"bits": 8, "group_size": 64}}
    }
    name = "model.layers.1.mlp.up_proj"
    tensors, weight = layer(8, 8, 128, 64)
    np.testing.assert_allclose(
        weight_of(decoded(config, tensors, (8, 128), name)), weight, rtol=1e-6
    )
    with pytest.raises(CheckpointError, match="qweight"):
        planned(config, tensors, (8, 128), "model.layers.0.mlp.up_proj")
    with pytest.raises(CheckpointError, match="dynamic"):
        planned(config, tensors, (8, 128), "model.layers.1.self_attn.o_proj")
    plain = {"weight": np.zeros((8, 128), np.float16)}
    assert planned(config, plain, (8, 128), "model.layers.1.self_attn.o_proj") is None


@pytest.mark.parametrize("bits", [3, 8])
def test_every_setting_of_single_layers(bits):
    """Signs of zero points, order of columns and width; what only steered calibration is known."""
    own = {"bits": bits, "group_size": 64, "sym": False, "desc_act": True, "mse": 2.4}
    config = CONFIG | {"sym": True, "dynamic": {".*up_proj": own}}
    g_idx = np.random.default_rng(1).permutation(np.arange(128) // 64)
    tensors, weight = layer(bits, 32, 128, 64, g_idx=g_idx, zero=np.full((32, 2), 1 << (bits - 1)))
    found = decoded(config, tensors, (32, 128))
    assert (found.qtype, found.group) == (f"uint{bits}", (1, 64))
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-6)
    method = quantization(config)
    for suffix, array in method.encode(MODULE, found).items():
        np.testing.assert_array_equal(array, tensors[suffix], suffix)
    del tensors["g_idx"]
    with pytest.raises(CheckpointError, match="g_idx: missing"):
        planned(config, tensors, (32, 128))


def test_awq_layouts_arrive_as_gptq():
    config = {k: v for k, v in CONFIG.items() if k != "sym"} | {"checkpoint_format": "gemm"}
    assert quantization(config).name == "awq"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bits": 9}, UnsupportedError, "bits 9"),
        ({"bits": "4"}, CheckpointError, "bits"),
        ({"group_size": 0}, CheckpointError, "group_size"),
        ({"checkpoint_format": "exl3"}, UnsupportedError, "exl3"),
        ({"new_key": 1}, UnsupportedError, "new_key"),
        ({"dynamic": {"+:[": {}}}, CheckpointError, "regular expression"),
        ({"dynamic": {"x": {"bits": 1}}}, UnsupportedError, "bits 1"),
        ({"dynamic": {"x": {"sym": 1}}}, CheckpointError, "dynamic.x.sym"),
        ({"dynamic": {"x": {"format": "gptq_v2"}}}, UnsupportedError, r"dynamic\.x\.'format'"),
    ],
)
def test_settings_that_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        quantization(CONFIG | change)


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales"])
def test_tensors_that_do_not_fit(suffix):
    tensors, _ = layer(4, 8, 96, 32)
    cut = tensors | {suffix: tensors[suffix][:-1]}
    with pytest.raises(CheckpointError, match=suffix):
        planned(CONFIG, cut, (8, 96))
    if suffix != "qweight":
        del cut[suffix]
        with pytest.raises(CheckpointError, match=f"{suffix}: missing"):
            planned(CONFIG, cut, (8, 96))


def test_what_has_no_layout_is_not_written():
    tensors, _ = layer(4, 8, 96, 32)
    weight = decoded(CONFIG, tensors, (8, 96))
    with pytest.raises(UnsupportedError, match="64"):
        gptq.encode("m", weight, gptq.Settings(4, 64))
    with pytest.raises(UnsupportedError, match="uint4"):
        gptq.encode("m", weight, gptq.Settings(8, 32))
