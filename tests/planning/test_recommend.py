"""Recommendations: against arithmetic by hand, and what vLLM's guide and measurements say."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qjax.bench import bandwidth
from qjax.bench.decode import LLAMA_8B
from qjax.errors import RequestError
from qjax.planning.by_scheme import by_scheme
from qjax.planning.planner import Planner, Split, Workload
from qjax.recommend import Recommendation, hardware, recommend
from qjax.recommend.candidates import QUANTIZED, refusal
from qjax.recommend.choose import ALIKE
from qjax.recommend.distill import SPEED_FILES, as_json, losses, speeds
from qjax.recommend.expected import step
from qjax.recommend.figures import FOLDER, share, speeds_of
from qjax.recommend.hardware import lookup, named
from tests.planning.sparse import LLAMA_70B

GIB = 1 << 30
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
LAYERS, HIDDEN, INNER, VOCABULARY, KV = 32, 4096, 14336, 128256, 8 * 128
LINEAR = LAYERS * (2 * HIDDEN * HIDDEN + 2 * KV * HIDDEN + 3 * INNER * HIDDEN)
TABLE = VOCABULARY * HIDDEN
NORMS = (2 * LAYERS + 1) * HIDDEN


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Llama 3 8B: its config alone."""
    folder = tmp_path_factory.mktemp("llama-8b")
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return str(folder)


@pytest.fixture(scope="module")
def h100(llama: str) -> Recommendation:
    return recommend(llama, device="H100", goal="throughput", max_num_seqs=64, max_model_len=4096)


def test_one_sequence_on_a_hopper_gpu_reads_four_bits(llama: str) -> None:
    """As the guide has it: W4A16 where few sequences run. Bytes by hand."""
    found = recommend(llama, device="H200", max_model_len=4096)
    best = found.best
    assert best is not None
    assert (best.scheme, best.method, best.group_size) == ("W4A16", "gptq", 32)
    # Codes of 4 bits, a bfloat16 scale for 32 of them; embedding and head stay bfloat16.
    assert best.weights == LINEAR // 2 + 2 * LINEAR // 32 + 2 * 2 * TABLE + 4 * NORMS
    # Quantized caches are no faster on this GPU (README), so that none is taken.
    assert best.cache_dtype == "bfloat16"
    assert best.memory.cache == 4096 * LAYERS * 2 * KV * 2
    assert best.divergence == 0.07606
    assert any("reached on NVIDIA H200 (nvidia-h200.json" in note for note in found.notes)
    folder = Path(llama).name
    assert best.commands == (
        f"qjax quantize {llama} {folder}-w4a16-g32 --scheme W4A16 --group-size 32 --method gptq "
        "--dtype bfloat16",
        f"qjax serve {folder}-w4a16-g32 --max-model-len 4096 --max-num-seqs 1",
    )


def test_many_sequences_on_a_hopper_gpu_multiply_eight_bits(h100: Recommendation) -> None:
    """The guide: 8-bit products for throughput, which on Hopper may be FP8's."""
    assert h100.best is not None
    names = [h100.best.name, *(each.name for each in h100.runners_up)]
    assert set(names[:2]) == {"W8A8 smoothquant", "FP8_DYNAMIC rtn"}
    assert names.index("W4A16 g32 gptq") > 1
    assert h100.best.weights == LINEAR + 4 * h100_rows() + 2 * 2 * TABLE + 4 * NORMS
    assert any(note.endswith("not on H100") for note in h100.notes)


def h100_rows() -> int:
    """Outputs of all linear layers, each of which has a scale."""
    return LAYERS * (2 * HIDDEN + 2 * KV + 2 * INNER + HIDDEN)


def test_ampere_has_no_fp8(llama: str) -> None:
    found = recommend(llama, device="A100", goal="latency")
    left = dict(found.left_out)
    assert "8.0" in left["FP8_DYNAMIC rtn"]
    assert found.best is not None
    assert found.best.scheme == "W4A16"
    assert found.best.unmeasured
    assert any(note.startswith("speeds: roofline only, not measured") for note in found.notes)
    # At the roofline a token takes the bytes of weights, head and cache: no embedding, 2,039 GB/s.
    read = LINEAR // 2 + 2 * LINEAR // 32 + 2 * TABLE + 4 * NORMS
    cached = 2049 * LAYERS * 2 * KV * 2
    assert found.best.step_seconds == pytest.approx((read + cached) / 2039e9, rel=1e-6)


@pytest.mark.parametrize(
    ("device", "left", "kept"),
    [
        ("H100", set(), {"W8A8", "FP8_DYNAMIC", "W4A16", "Q4_K_M"}),
        ("L4", {"NVFP4", "Q4_K_M"}, {"W8A8", "FP8_DYNAMIC", "W4A16"}),
        ("A100", {"FP8_DYNAMIC", "NVFP4", "Q4_K_M"}, {"W8A8", "W4A16"}),
        ("B200", {"W8A8"}, {"FP8_DYNAMIC", "NVFP4", "W4A16"}),
        ("MI300X", {"W8A8", "NVFP4"}, {"FP8_DYNAMIC", "W4A16"}),
        ("TPU-v5e", {"FP8_DYNAMIC", "NVFP4"}, {"W8A8", "W4A16"}),
        ("cpu", set(), {"W8A8", "FP8_DYNAMIC", "W4A16", "Q4_K_M"}),
    ],
)
def test_guide(device: str, left: set[str], kept: set[str]) -> None:
    """vLLM's table of hardware, and LLM Compressor's of compute capabilities; on Hopper and CPUs
    the measured kinds beside."""
    here = named(device, 1)
    measured = speeds_of(here.architecture)
    why = {each.scheme: refusal(each, here, "latency", measured) for each in QUANTIZED}
    assert all(why[scheme] for scheme in left)
    assert not any(why[scheme] for scheme in kept)


def test_a_cpu_takes_the_types_of_gguf_files(llama: str) -> None:
    found = recommend(llama, device="cpu", memory=12 * GIB, goal="latency")
    assert found.best is not None
    assert found.best.scheme == "Q4_K_M"
    assert found.best.commands[0].endswith("-q4_k_m.gguf Q4_K_M --method imatrix")
    left = dict(found.left_out)
    assert left["UNQUANTIZED"].startswith("takes 1")  # 16 GB of weights
    assert "costs a KL divergence of 0.2201, more than 0.1" in left["Q2_K imatrix"]


def test_tolerance(llama: str) -> None:
    strict = recommend(llama, device="H100", tolerance=0.02)
    assert strict.best is not None
    assert strict.best.scheme == "Q8_0"  # 0.0009; W8A8 has 0.011, and FP8 0.026
    schemes = {each.scheme for each in strict.runners_up}
    assert {"W8A8", "Q6_K"} <= schemes
    assert not {"FP8_DYNAMIC", "W4A16", "Q4_K_M"} & schemes
    none = recommend(llama, device="H100", tolerance=0)
    assert none.best is not None
    assert none.best.scheme == "UNQUANTIZED"
    assert len(none.best.commands) == 1


def test_what_is_stored_is_served_as_it_is(golden: Path) -> None:
    model = golden / "gguf-Q4_1" / "model.gguf"
    found = recommend(model, device="cpu", memory=GIB, goal="latency", max_model_len=64)
    names = {found.best.name if found.best else "", *(each.name for each in found.runners_up)}
    assert "as it is" in names
    assert "UNQUANTIZED" not in names
    with pytest.raises(RequestError, match=r"max_model_len must be in \[1, "):
        recommend(model, device="cpu", max_model_len=1 << 20)


def test_split(tmp_path: Path) -> None:
    """One answer of a model of 70 billion weights is fastest split over all devices, many go
    fastest where copies tell each other nothing."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B | {"num_hidden_layers": 8}))
    found = recommend(tmp_path, device="H100", devices=4, tolerance=0.02)
    assert found.best is not None
    assert found.best.split.flags == "--tensor-parallel-size 4"
    assert found.best.commands[-1].endswith("--max-num-seqs 1 --tensor-parallel-size 4")
    assert found.best.step_seconds < min(
        each.step_seconds for each in found.runners_up if each.name == "UNQUANTIZED"
    )


def test_nothing_fits(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B | {"num_hidden_layers": 8}))
    found = recommend(tmp_path, device="L4", memory=2 * GIB, max_model_len=256)
    assert found.best is None
    assert not found.runners_up
    closest = found.closest
    assert closest is not None
    assert closest.scheme == "Q3_K_M"  # for size, where nothing else does
    assert found.lacking == closest.memory.total - int(2 * GIB * 0.9)
    assert found.enough is not None
    assert found.enough > 1


def test_whole_steps_were_measured_about_as_expected(llama: str) -> None:
    """Steps of a model of 8 billion weights on the H200, which no table here is made of."""
    rows = json.loads((RESULTS / "nvidia-h200.json").read_text())["rows"]
    here, own = named("H200", 1), speeds_of("Hopper")
    schemes = {"BF16": "UNQUANTIZED", "W4A16 g128": "W4A16", "FP8 channel": "FP8_DYNAMIC",
               "W8A8 INT8": "W8A8"}  # fmt: skip
    planners = {
        kind: Planner(*by_scheme(llama, scheme), here.device, 1 << 40, "float32")
        for kind, scheme in schemes.items()
    }
    ratios = []
    for row in rows:
        if row["op"] != "decode":
            continue
        kind, _, other = row["kind"].partition(", ")
        dtype, many = other.removesuffix(" cache") or "bfloat16", row["rows"]
        work = Workload(4096, many, 2048, (dtype,) * LAYERS, "bfloat16")
        load = planners[kind].outcome(Split(1, 1, 1), work).load
        assert load is not None
        took = step(load, here, own, dtype, sequences=many, tokens=many, context=row["k"])
        assert not took.unmeasured
        ratios.append(took.seconds * 1e6 / row["microseconds"])
    assert len(ratios) == 7
    # docs/recommend.md says so.
    assert (round(min(ratios), 2), round(max(ratios), 2)) == (0.78, 1.1)


def test_tables_are_those_of_the_results() -> None:
    """`python -m qjax.recommend benchmarks/results` gives what is kept."""
    kept = json.loads((FOLDER / "speed.json").read_text())
    made = [as_json(speeds(RESULTS / name)) for name in SPEED_FILES]
    assert json.loads(json.dumps(made)) == kept
    assert json.loads((FOLDER / "accuracy.json").read_text()) == losses(RESULTS / "quantize")
    # By hand, from the run: 1,639 of 4,316 GB/s; 403 of 660 TFLOP/s.
    curve = speeds(RESULTS / "nvidia-h200.json").products["W4A16 g128"]
    assert share(curve, 1) == pytest.approx(1639 / 4316, abs=1e-3)
    assert share(curve, 1024) == pytest.approx(403 / 660, abs=1e-3)
    assert share(curve, 32) == pytest.approx((share(curve, 16) + share(curve, 64)) / 2)
    assert share(curve, 1 << 20) == share(curve, 1024)


def test_results_of_ones_own(llama: str, tmp_path: Path) -> None:
    """Where four bits are slow, fewer bytes are no use."""
    found = json.loads((RESULTS / "nvidia-h200.json").read_text())
    for row in found["rows"]:
        if row["kind"].startswith("W4A16"):
            for key in ("gigabytes_per_second", "teraflops"):
                row[key] = row.get(key, 0) / 4
    (tmp_path / "own.json").write_text(json.dumps(found))
    own = recommend(llama, device="H200", results=tmp_path / "own.json")
    assert own.best is not None
    assert own.best.scheme != "W4A16"
    with pytest.raises(RequestError, match="results are of a gpu"):
        recommend(llama, device="TPU-v5e", results=tmp_path / "own.json")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("TPU v6 lite", "TPU-v6e"),
        ("TPU v5 lite", "TPU-v5e"),
        ("TPU v5p", "TPU-v5p"),
        ("NVIDIA T4", None),
    ],
)
def test_devices_by_their_makers_names(kind: str, name: str | None) -> None:
    found = lookup(kind)
    assert (None if found is None else found.name) == name


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"goal": "speed"}, "goal must be one of latency, throughput, size"),
        ({"device": "H1000"}, "device 'H1000' is not in the table: A100-40GB"),
        ({"devices": 0}, "devices must be at least 1, got 0"),
        ({"tolerance": math.nan}, "tolerance must be at least 0, got nan"),
        ({"device": "cpu", "devices": 2}, "devices of a CPU must be 1, got 2"),
        ({"device": "H100", "measure": True}, "measure takes figures of this machine, a cpu"),
    ],
)
def test_mistakes(asked: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        recommend("smollm2-135m", **asked)


def test_a_wrong_device_is_told_without_jax() -> None:
    code = (
        "import sys; from qjax.cli.main import main\n"
        "try: main(['recommend', '--device', 'H1000'])\n"
        "except SystemExit as end: assert end.code == 1\n"
        "assert 'jax' not in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not found.returncode, found.stderr
    assert "device 'H1000' is not in the table" in found.stderr


def test_measured_here(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bandwidth of ten times as much makes decoding, which reads, ten times as fast."""
    monkeypatch.setattr(bandwidth, "of_host", lambda: 500e9)
    own = speeds_of("CPU")
    assert own is not None
    slow_memory = replace(own, bandwidth=50e9, peak=1e15, processors=1)  # products take no time
    monkeypatch.setattr(hardware, "speeds_of", lambda _: slow_memory)
    slow, fast = (
        recommend(llama, device="cpu", memory=24 * GIB, measure=measure)
        for measure in (False, True)
    )
    assert slow.best is not None
    assert fast.best is not None
    named = {each.name: each for each in (fast.best, *fast.runners_up)}
    ratio = slow.best.step_seconds / named[slow.best.name].step_seconds
    assert ratio == pytest.approx(10, rel=0.02)
    assert any(note == "bandwidth measured here just now: 500.0 GB/s" for note in fast.notes)


def test_figures_that_are_near_decide_nothing(h100: Recommendation) -> None:
    best = h100.best
    assert best is not None
    fastest = max(h100.runners_up, key=lambda each: each.total_tokens_per_second)
    if fastest.total_tokens_per_second > best.total_tokens_per_second:
        near = fastest.total_tokens_per_second / best.total_tokens_per_second
        assert near <= 1 + ALIKE
        assert best.divergence is not None
        assert fastest.divergence is not None
        assert best.divergence < fastest.divergence
