"""Plans for a model of 70 billion weights, against arithmetic by hand."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import qjax
from qjax.errors import CheckpointError, RequestError, ShardingError
from qjax.planning import Plan, plan
from qjax.planning.devices import DEVICES, device
from tests.planning.sparse import LLAMA_70B, write_llama

GIB = 1 << 30
LAYERS, HIDDEN, INNER, VOCABULARY, KV = 80, 8192, 28672, 128256, 8 * 128
LINEAR = LAYERS * (2 * HIDDEN * HIDDEN + 2 * KV * HIDDEN + 3 * INNER * HIDDEN)
TABLE = VOCABULARY * HIDDEN
NORMS = (2 * LAYERS + 1) * HIDDEN


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_llama(tmp_path_factory.mktemp("llama"), LLAMA_70B))


@pytest.fixture(scope="module")
def eight(llama: str) -> Plan:
    return plan(llama, tensor_parallel_size=8, device="h100", max_model_len=32768)


def test_memory(eight: Plan) -> None:
    memory = eight.outcome.memory
    assert memory.weights == 2 * (LINEAR + 2 * TABLE) // 8 + 4 * NORMS
    # Keys and values of one head of 128 in each layer, bfloat16.
    token = LAYERS * 2 * 128 * 2
    assert memory.cache == 32 * 32768 * token
    # A step of 2,048 tokens, float32.
    assert memory.workspace == 4 * 2048 * (4 * HIDDEN + 3 * INNER // 8)
    assert memory.usable == int(80 * GIB * 0.9)
    room = memory.usable - memory.weights - memory.workspace
    assert memory.max_num_seqs == room // (32768 * token)
    assert memory.max_tokens == room // (32 * token) * 32
    assert memory.fits


def test_collectives(eight: Plan) -> None:
    found = {each.of: each for each in eight.outcome.collectives}
    assert {of: each.count for of, each in found.items()} == {
        "embedding": 1,
        "o_proj": LAYERS,
        "down_proj": LAYERS,
        "greedy": 2,
    }
    assert found["o_proj"].nbytes == 4 * HIDDEN
    assert found["o_proj"].moved(32) == 2 * 7 / 8 * 32 * 4 * HIDDEN
    assert (found["greedy"].kind, found["greedy"].nbytes) == ("all-gather", 4 * 8)


def test_speed(eight: Plan) -> None:
    """By the H100's data sheet: 3.35 TB/s, 989 TFLOPS, 450 GB/s each way."""
    prefill, one, *_, all_ = eight.outcome.speeds
    heads = 64 // 8
    weights = 2 * (LINEAR + TABLE) // 8 + 4 * NORMS
    cached = LAYERS * 2 * 128 * 2 * (16384 + 1)
    assert one.reading == pytest.approx((weights + cached) / 3.35e12)
    assert all_.reading == pytest.approx((weights + 32 * cached) / 3.35e12)
    times = 2 * LAYERS + 1
    moved = 2 * 7 / 8 * 4 * HIDDEN
    gathered = 2 * 7 / 8 * 4 * 8
    assert one.telling == pytest.approx((times + 2) * 10e-6 + (times * moved + gathered) / 450e9)
    assert one.tokens_per_second == pytest.approx(1 / (one.reading + one.telling))
    products = 2 * 2048 * LINEAR / 8 + 2 * TABLE / 8
    scores = LAYERS * 4 * 2048 * (2049 / 2) * heads * 128
    assert prefill.computing == pytest.approx((products + scores) / 989e12)
    assert prefill.bound == "communication"
    (warning,) = eight.outcome.warnings
    assert "communication dominates" in warning
    assert "prefill step of 2048 tokens" in warning


def test_sums_in_eight_bits(llama: str, eight: Plan) -> None:
    """Sent to the device that sums a share, and back: a byte a number, two bytes for 64."""
    found = plan(
        llama, tensor_parallel_size=8, device="h100", max_model_len=32768, all_reduce="int8"
    )
    sums = [each for each in found.outcome.collectives if each.of.startswith("down_proj")]
    assert [(each.kind, each.count, each.nbytes) for each in sums] == [
        ("all-to-all", LAYERS, HIDDEN),
        ("all-to-all", LAYERS, HIDDEN // 32),
        ("all-gather", LAYERS, HIDDEN),
        ("all-gather", LAYERS, HIDDEN // 32),
    ]
    sent = sum(each.moved(1) for each in sums)
    assert sent == 2 * 7 / 8 * (HIDDEN + HIDDEN // 32)
    # It pays in prompts; in decoding, more and smaller messages take longer.
    prompt, one, *_ = found.outcome.speeds
    assert prompt.telling < eight.outcome.speeds[0].telling / 2
    assert one.telling > eight.outcome.speeds[1].telling


def test_no_weight_is_read(golden: Path, tmp_path: Path) -> None:
    """Not even that these are no numbers."""
    folder = tmp_path / "model"
    shutil.copytree(golden / "base-tiny-llama", folder)
    whole = plan(folder, memory=GIB)
    file = folder / "model.safetensors"
    stored = file.read_bytes()
    start = 8 + int.from_bytes(stored[:8], "little")
    file.write_bytes(stored[:start] + b"\xff" * (len(stored) - start))
    assert plan(folder, memory=GIB) == whole
    with pytest.raises(CheckpointError, match="not finite"):
        qjax.load(folder)


def test_best_split(llama: str) -> None:
    """Of eight, only in one copy is there room; in no copy of seven."""
    found = plan(llama, devices=8, device="H100", max_model_len=32768)
    assert found.outcome.split.tensor == 8
    assert [each.split.tensor for each in found.others] == [4, 2, 1]
    assert not any(each.memory.fits for each in found.others)
    # The sequences are shared out.
    assert [each.workload.max_num_seqs for each in found.others] == [16, 8, 4]
    seven = plan(llama, devices=7, device="H100", max_model_len=32768)
    assert seven.outcome.split.data == 7
    assert not seven.outcome.memory.fits
    (why,) = seven.refused
    assert "64 attention heads cannot be split over 7 devices: 1, 2, 4, 8, 16, 32, 64 work" in why


def test_smallest(llama: str) -> None:
    found = plan(llama, device="H100", max_model_len=8192, max_num_seqs=8)
    assert not found.outcome.memory.fits
    assert found.smallest is not None
    assert found.smallest.split.tensor == 4  # 2 would have 71 GB of weights and 11 GB of cache
    assert found.smallest.memory.fits
    # Each device has a head of keys and values, more of them have copies.
    never = plan(llama, device="L4", max_model_len=131072)
    assert never.smallest is None


def test_warnings(llama: str) -> None:
    """16 devices of hosts of 8, and 8 heads; 24 do not divide anything."""
    found = plan(llama, tensor_parallel_size=16, device="H100", max_model_len=8192)
    heads, network, _ = found.outcome.warnings
    assert heads.startswith("keys and values: 8 heads for 16 devices")
    assert "each is cached 2 times" in heads
    assert "more than the 8 that its links join" in network
    whole = write_vocabulary(llama, 128257)
    found = plan(whole, tensor_parallel_size=8, device="H100", max_model_len=8192)
    vocabulary, _ = found.outcome.warnings
    assert "128257 does not divide by 8: embedding and head, 4,202.7 MB" in vocabulary
    assert "embedding" not in {each.of for each in found.outcome.collectives}
    with pytest.raises(ShardingError, match="24 devices: 1, 2, 4, 8, 16, 32, 64 work"):
        plan(llama, tensor_parallel_size=24, memory=80 * GIB)


def write_vocabulary(llama: str, size: int) -> str:
    folder = Path(llama) / str(size)
    folder.mkdir()
    return str(write_llama(folder, LLAMA_70B | {"vocab_size": size}))


def test_data_parallel(llama: str, eight: Plan) -> None:
    """Copies double what is done, and nothing that a device holds."""
    both = plan(
        llama, tensor_parallel_size=8, data_parallel_size=2, device="h100", max_model_len=32768
    )
    assert both.outcome.memory == eight.outcome.memory
    assert both.outcome.best_decode == pytest.approx(2 * eight.outcome.best_decode)


def test_layouts_of_a_tpu(llama: str) -> None:
    """Rows of heads of 128 are whole there; those of 4 bits take the lanes of 8."""
    found = plan(
        llama, tensor_parallel_size=8, device="v6e", max_model_len=1024, kv_cache_dtype="int4"
    )
    scales = 2 * 128 / 32 + 128 / 32  # bfloat16 and int8, of 32 tokens, filled up to 128
    pages = 32 * 1024 * LAYERS * 2 * (128 + scales)
    bases = LAYERS * 2 * 4 * 128 * 128
    assert found.outcome.memory.cache == pages + bases


def test_layers_with_another_cache(llama: str) -> None:
    """A byte a number and two bytes of scale a head; one layer has two bytes a number."""
    found = plan(
        llama,
        memory=80 * GIB,
        max_model_len=1024,
        kv_cache_dtype="int8",
        kv_cache_dtype_skip_layers=[-1],
    )
    heads = 32 * 1024 * 2 * 8
    assert found.outcome.memory.cache == heads * ((LAYERS - 1) * (128 + 2) + 2 * 128)


def test_refusals(llama: str) -> None:
    for given, text in {
        (): "say how much memory a device has",
        (("memory", 1), ("devices", 2), ("tensor_parallel_size", 2)): "not both",
        (("device", "H1000"),): "'H1000' is not in the table: A100-40GB",
        (("memory", 1), ("devices", 0)): "devices must be at least 1, got 0",
        (("memory", 1), ("max_model_len", 1 << 20)): "max_model_len must be in",
        (("memory", 1), ("gpu_memory_utilization", 0.0)): "must be in",
        (("memory", 1), ("kv_cache_dtype", "int3")): "kv_cache_dtype must be one of",
        (
            ("memory", 1),
            ("tensor_parallel_size", 2),
            ("enable_expert_parallel", True),
        ): "takes a model with experts",
    }.items():
        with pytest.raises(RequestError, match=text):
            plan(llama, **dict(given))


def test_names_of_devices() -> None:
    assert device("h100 sxm") == device("H100")
    assert device("TPU v7x").memory * 2 == 192 * GIB
    names = [name for each in DEVICES for name in (each.name, *each.aliases)]
    assert len(set(names)) == len(names)
    for each in DEVICES:
        assert each.bandwidth < 1e13 < each.peak < 1e16
        assert each.network <= each.link < each.bandwidth
