import hashlib
from pathlib import Path

import numpy as np
import pytest

from qjax.errors import CheckpointError, UnsupportedError
from qjax.formats import marlin
from qjax.parts import part, read
from tests.formats.stored import decoded, planned, quantization, record, weight_of, words

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
CONFIG = {"quant_method": "marlin", "bits": 4, "group_size": 128}


@pytest.mark.parametrize(("bits", "digest"), [(4, "4a976ee0bbf9e61f"), (8, "a72ecac96001bb3b")])
def test_order_of_codes(bits, digest):
    """The permutation of vLLM 0.10, by its SHA-256 as int32."""
    order = marlin._order(bits).astype(np.int32)
    assert hashlib.sha256(order.tobytes()).hexdigest()[:16] == digest


def shuffled(codes, bits):
    """A dense weight [K, N] as Marlin packs it, code by code as its kernel's fragments ask."""
    k, n = codes.shape
    order = []
    for thread in range(32):
        fragment = [
            16 * (2 * (thread % 4) + row) + thread // 4 + 8 * block
            for block in (0, 1)
            for row in (0, 1, 8, 9)
        ]
        order += [place + 256 * tile for tile in range(4) for place in fragment]
    inside = [0, 2, 4, 6, 1, 3, 5, 7] if bits == 4 else [0, 2, 1, 3]
    order = [order[i + j] for i in range(0, 1024, len(inside)) for j in inside]
    rows = []
    for top in range(0, k, 16):
        flat = [codes[top : top + 16, left : left + 16].reshape(-1) for left in range(0, n, 16)]
        flat = np.concatenate(flat)
        rows.append(np.concatenate([run[order] for run in flat.reshape(-1, 1024)]))
    return words(np.array(rows), bits)


def layer(bits, n, k, size):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 1 << bits, (n, k))
    scale = rng.uniform(0.5, 2, (n, k // size)).astype(np.float16)
    if size < k:
        order = [i + 8 * j for i in range(8) for j in range(8)]
    else:
        order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    stored = scale.T.reshape(-1, len(order))[:, order].reshape(scale.T.shape)
    tensors = {
        "B": shuffled(codes.T, bits),
        "s": np.ascontiguousarray(stored),
        "workspace": np.zeros(16, np.int32),
    }
    return tensors, (codes - (1 << (bits - 1))) * scale.astype(np.float64).repeat(size, 1)


@pytest.mark.parametrize("size", [128, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_dense(bits, size):
    tensors, weight = layer(bits, 128, 256, 256 if size == -1 else size)
    config = CONFIG | {"bits": bits, "group_size": size}
    found = decoded(config, tensors, (128, 256))
    assert found.qtype == f"uint{bits}b{1 << (bits - 1)}"
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-6)
    written(config, found, tensors, "workspace")


def written(config, weight, tensors, *but):
    """The tensors are what was read, and the config is."""
    method = quantization(config)
    found = method.encode("m", weight)
    assert found.keys() == tensors.keys() - {*but}
    for suffix, array in found.items():
        assert array.dtype == tensors[suffix].dtype
        np.testing.assert_array_equal(array, tensors[suffix], suffix)
    assert method.to_config() == config


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "checkpoint_format": "marlin", "sym": True, "desc_act": False},
        {"quant_method": "gptq", "is_marlin_format": True},
    ],
)
def test_gptq_config(config):
    tensors, weight = layer(4, 64, 256, 128)
    found = decoded({"bits": 4, "group_size": 128} | config, tensors, (64, 256))
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-6)


def sparse(bits, strategy):
    """Tensors that compressed-tensors packed, and the weight that they mean."""
    with np.load(GOLDEN / "marlin24.npz") as file:
        packed = {key: file[f"{bits}_{strategy}_{key}"] for key in ("weight_packed", "meta")}
        packed["scale_packed"] = file[f"{bits}_{strategy}_scale_packed"]
        scale = file[f"{bits}_{strategy}_scale"].astype(np.float64)
        codes = file[f"{bits}_{strategy}_codes"]
    return packed, codes * scale.repeat(512 // scale.shape[1], 1)


@pytest.mark.parametrize("strategy", ["group", "channel"])
@pytest.mark.parametrize("bits", [4, 8])
def test_sparse(bits, strategy):
    tensors, weight = sparse(bits, strategy)
    size = 128 if strategy == "group" else -1
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy}
    weights |= {"group_size": size} if size > 0 else {}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    config = {"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": groups}
    found = decoded(config, tensors, (64, 512))
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-6)
    assert found.qtype == f"sparse24_uint{bits}b{1 << (bits - 1)}"
    for parts, index, there in (((2, 1), (1, 0), np.s_[32:]), ((1, 4), (0, 2), np.s_[:, 256:384])):
        np.testing.assert_allclose(weight_of(part(found, parts, index)), weight[there], rtol=1e-6)
    assert found.nbytes == sum(array.nbytes for array in tensors.values())
    np.testing.assert_array_equal(found.dequantize(), weight_of(found).astype(np.float32))
    # The names that GPTQ's "marlin_24" has.
    names = {"weight_packed": "B_24", "scale_packed": "s", "meta": "B_meta"}
    renamed = {names[suffix]: array for suffix, array in tensors.items()}
    config = {"quant_method": "gptq", "checkpoint_format": "marlin_24", "bits": bits}
    config = config | {"group_size": size}
    found = decoded(config, renamed, (64, 512))
    np.testing.assert_allclose(weight_of(found), weight, rtol=1e-6)
    written(config, found, renamed)


def test_what_has_no_layout_is_not_written():
    tensors, _ = layer(4, 64, 256, 128)
    found = decoded(CONFIG, tensors, (64, 256))
    for change, message in (({"bits": 8}, "uint8b128"), ({"group_size": 64}, "groups")):
        with pytest.raises(UnsupportedError, match=message):
            quantization(CONFIG | change).encode("m", found)


def test_positions_in_falling_order_are_refused():
    tensors, _ = sparse(4, "group")
    tensors["meta"] = np.zeros_like(tensors["meta"])
    stored = {suffix: record(suffix, array) for suffix, array in tensors.items()}
    with pytest.raises(CheckpointError, match="rising order"):
        read(marlin.sparse("m", stored, (64, 512), 4, 128).decode(tensors))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bits": 3}, UnsupportedError, "bits 3"),
        ({"group_size": 0}, CheckpointError, "group_size"),
        ({"desc_act": True}, UnsupportedError, "desc_act True"),
        ({"sym": False}, UnsupportedError, "sym False"),
        ({"new_key": 1}, UnsupportedError, "new_key"),
    ],
)
def test_settings_that_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        quantization(CONFIG | change)


@pytest.mark.parametrize("suffix", ["B", "s"])
def test_tensors_that_do_not_fit(suffix):
    tensors, _ = layer(4, 64, 256, 128)
    with pytest.raises(CheckpointError, match=suffix):
        planned(CONFIG, tensors | {suffix: tensors[suffix][:-1]}, (64, 256))
    with pytest.raises(CheckpointError, match="tiles"):
        planned(CONFIG, tensors, (32, 256))
