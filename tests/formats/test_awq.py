import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import codes
from qjax.errors import CheckpointError, UnsupportedError
from tests.formats.stored import MODULE, decoded, planned, quantization, weight_of, words

CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}


def layer(n, k, size, seed=0, zero=None, bits=4):
    """Codes, zero points and scales, [N, K] and [N, G], and the float64 weight they mean."""
    rng = np.random.default_rng(seed)
    groups = k // size
    values = rng.integers(0, 1 << bits, (n, k))
    zero = rng.integers(0, 1 << bits, (n, groups)) if zero is None else zero
    scale = rng.uniform(0.5, 2, (n, groups)).astype(np.float16)
    spread = scale.astype(np.float64).repeat(size, 1)
    return values, zero, scale, (values - zero.repeat(size, 1)) * spread


def interleaved(matrix, bits=4):
    """Words along the last axis: nibble i is column [0, 2, 4, 6, 1, 3, 5, 7][i]."""
    runs = matrix.reshape(*matrix.shape[:-1], -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
    return words(runs.reshape(matrix.shape), bits)


def gemm(values, zero, scale, packed=interleaved):
    return {
        "qweight": packed(values.T),
        "qzeros": packed(zero.T),
        "scales": np.ascontiguousarray(scale.T),
    }


def test_one_word():
    """AutoAWQ's order: columns 0 to 7 that hold 0 to 7 are the word 75316420."""
    tensors = {
        "qweight": np.full((8, 1), 0x75316420, np.int32),
        "qzeros": np.zeros((1, 1), np.int32),
        "scales": np.ones((1, 8), np.float16),
    }
    found = decoded(CONFIG | {"group_size": -1}, tensors, (8, 8))
    np.testing.assert_array_equal(weight_of(found), np.arange(8)[:, None].repeat(8, 1))


@pytest.mark.parametrize("size", [32, 64, 128])
def test_gemm(size):
    values, zero, scale, weight = layer(16, 256, size)
    found = decoded(CONFIG | {"group_size": size}, gemm(values, zero, scale), (16, 256))
    assert (found.qtype, found.group) == ("uint4", (1, size))
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-6)


GPTQMODEL = {"meta": {"quantizer": ["gptqmodel:7.6.0"]}}
AUTO_ROUND = {"provider": "auto-round"}


@pytest.mark.parametrize(
    ("bits", "tool", "pack"),
    [(bits, GPTQMODEL, words) for bits in (2, 3, 5, 6, 7, 8)]
    + [(bits, AUTO_ROUND, interleaved) for bits in (5, 6, 7)],
)
def test_other_widths_are_packed_as_their_tool_does(bits, tool, pack):
    values, zero, scale, weight = layer(32, 64, 32, bits=bits)
    tensors = gemm(values, zero, scale, lambda matrix: pack(matrix, bits))
    config = CONFIG | tool | {"bits": bits}
    found = decoded(config, tensors, (32, 64))
    assert found.qtype == f"uint{bits}"
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-6)
    for suffix, array in quantization(config).encode(MODULE, found).items():
        np.testing.assert_array_equal(array, tensors[suffix], suffix)


def test_settings_of_single_layers():
    """GPTQModel's `dynamic`, here as everywhere in its files."""
    own = {"bits": 8, "group_size": 64}
    config = CONFIG | GPTQMODEL | {"dynamic": {r"-:.*\.0\.": {}, r"+:.*up_proj": own}}
    module = "model.layers.1.mlp.up_proj"
    values, zero, scale, weight = layer(32, 128, 64, bits=8)
    tensors = gemm(values, zero, scale, lambda matrix: words(matrix, 8))
    found = decoded(config, tensors, (32, 128), module)
    assert (found.qtype, found.group) == ("uint8", (1, 64))
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-6)
    for suffix, array in quantization(config).encode(module, found).items():
        np.testing.assert_array_equal(array, tensors[suffix], suffix)
    values, zero, scale, weight = layer(32, 128, 32)
    found = decoded(config, gemm(values, zero, scale), (32, 128), "model.layers.1.mlp.gate_proj")
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-6)
    with pytest.raises(CheckpointError, match="dynamic"):
        planned(config, tensors, (32, 128), "model.layers.0.mlp.up_proj")


@given(st.integers(0, 2**32))
def test_encode_undoes_decode(seed):
    values, zero, scale, _ = layer(16, 64, 32, seed)
    tensors = gemm(values, zero, scale)
    method = quantization(CONFIG)
    written = method.encode(MODULE, decoded(CONFIG, tensors, (16, 64)))
    assert written.keys() == tensors.keys()
    for suffix, array in written.items():
        assert array.dtype == tensors[suffix].dtype
        np.testing.assert_array_equal(array, tensors[suffix], suffix)
    assert quantization(method.to_config()) == method


@pytest.mark.parametrize(("size", "width"), [(128, 1), (64, 2), (32, 4)])
def test_gemv_pads_groups(size, width):
    """AutoAWQ's gemv has room for 8 groups a word, and for 1, 2 or 4 words at least."""
    values, zero, scale, weight = layer(8, 256, size)
    room = 8 * width
    padded = np.zeros((8, room), np.int64)
    padded[:, : zero.shape[1]] = zero
    scales = np.zeros((8, room), np.float16)
    scales[:, : zero.shape[1]] = scale
    tensors = {"qweight": words(values, 4), "qzeros": words(padded, 4), "scales": scales}
    config = CONFIG | {"version": "gemv", "group_size": size}
    found = decoded(config, tensors, (8, 256))
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-6)


def fast(values):
    """int16 [N / 4, K]: blocks of 4 rows and 64 columns, one row after the other, each in two runs
    of 32 columns, of which nibbles go 0 2 4 6 1 3 5 7 in [0 1 8 9 16 17 24 25], [2 3 10 11 ...]."""
    n, k = values.shape
    nibbles = []
    for rows in range(0, n, 4):
        for columns in range(0, k, 64):
            for row in range(rows, rows + 4):
                for run in (columns, columns + 32):
                    for pair in range(0, 8, 2):
                        eight = [run + pair + 8 * i + j for i in range(4) for j in (0, 1)]
                        nibbles += [values[row, eight[i]] for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    return words(np.array(nibbles), 4, 16).reshape(n // 4, k)


def test_fast_words():
    """What AutoAWQ packs row r and column c that hold 3 r + c into."""
    packed = fast((3 * np.arange(4)[:, None] + np.arange(64)) % 16)
    wanted = "8080 9191 A2A2 B3B3 C4C4 D5D5 E6E6 F7F7"
    assert [f"{word:04X}" for word in packed.view(np.uint16)[0, :8]] == wanted.split()


@pytest.mark.parametrize(
    ("config", "zeros"),
    [
        ({"version": "gemv_fast"}, "qzeros"),
        ({"version": "llm-awq"}, "scaled_zeros"),
        ({"backend": "llm-awq"}, "scaled_zeros"),
    ],
)
def test_fast(config, zeros):
    values, zero, scale, weight = layer(8, 128, 32)
    scales, scaled = np.zeros((2, 32, 8), np.float16)
    scales[:4] = scale.T
    scaled[:4] = (-(scale.astype(np.float32) * zero)).T.astype(np.float16)
    tensors = {"qweight": fast(values), "scales": scales, zeros: scaled}
    found = decoded(CONFIG | config, tensors, (8, 128))
    assert found.additive
    np.testing.assert_array_equal(codes.unpack(found.qvalue, 4, 128, np), values)
    np.testing.assert_allclose(weight_of(found), weight, atol=2e-2)  # zeros are rounded


def test_without_zero_points():
    values, zero, scale, weight = layer(8, 64, 32, zero=np.full((8, 2), 8))
    config = CONFIG | {"zero_point": False}
    tensors = gemm(values, zero, scale)
    found = decoded(config, tensors, (8, 64))
    assert (found.qtype, found.zero_point) == ("uint4b8", None)
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-6)
    del tensors["qzeros"]
    np.testing.assert_allclose(weight_of(decoded(config, tensors, (8, 64))), weight, rtol=1e-6)
    with pytest.raises(CheckpointError, match="qzeros: missing"):
        planned(CONFIG, tensors, (8, 64))
    with pytest.raises(CheckpointError, match="zero points"):
        decoded(config, gemm(values, zero - 1, scale), (8, 64))


def test_config_of_transformers():
    """It has GPTQ's keys as well, and calls the layout `format`."""
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "sym": True}
    config |= {"damp_percent": 0.1, "true_sequential": True, "act_group_aware": True}
    config |= {"cache_block_outputs": True, "batch_size": 1, "backend": "auto", "meta": None}
    config |= {"desc_act": False, "model_seqlen": 2048, "tokenizer": None}
    assert quantization(config | {"version": "gemm", "format": "gemm"}).version == "gemm"
    assert quantization(config | {"format": "gemv_fast"}).version == "gemv_fast"
    assert quantization(config | {"version": "exllama"}).version == "gemm"


def test_layers_that_are_not_converted():
    values, zero, scale, _ = layer(8, 64, 32)
    config = CONFIG | {"modules_to_not_convert": ["up_proj"]}
    with pytest.raises(CheckpointError, match="modules_to_not_convert"):
        planned(config, gemm(values, zero, scale), (8, 64))
    assert planned(config, {"weight": np.zeros((8, 64), np.float16)}, (8, 64)) is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bits": 8}, UnsupportedError, "8 bits"),
        ({"bits": 8} | AUTO_ROUND, UnsupportedError, "8 bits"),
        ({"bits": 8, "version": "gemv"} | GPTQMODEL, UnsupportedError, "8 bits"),
        ({"group_size": -2}, CheckpointError, "group_size"),
        ({"zero_point": 1}, CheckpointError, "zero_point"),
        ({"new_key": 1}, UnsupportedError, "new_key"),
        ({"dynamic": {"x": {"bits": 8}}}, UnsupportedError, "8 bits"),
        ({"dynamic": {"x": {"new_key": 1}}}, UnsupportedError, "new_key"),
    ],
)
def test_settings_that_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        quantization(CONFIG | change)


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales"])
def test_tensors_that_do_not_fit(suffix):
    values, zero, scale, _ = layer(8, 64, 32)
    tensors = gemm(values, zero, scale)
    with pytest.raises(CheckpointError, match=suffix):
        planned(CONFIG, tensors | {suffix: tensors[suffix][:-1]}, (8, 64))
    with pytest.raises(CheckpointError, match=suffix):
        planned(CONFIG, tensors | {suffix: tensors[suffix].astype(np.int64)}, (8, 64))
