"""What a cache holds by layer and how many bytes that takes, and generation with each dtype."""

import json
from pathlib import Path

import numpy as np
import pytest

import qjax
from qjax.cli.main import main
from qjax.engine.engine import Engine
from qjax.kv_cache import bytes_per_token, cache_dtypes
from tests.programs import forward


@pytest.fixture(scope="module")
def file(golden: Path) -> Path:
    return golden / "gguf-Q4_1" / "model.gguf"


@pytest.fixture(scope="module")
def params(file: Path) -> qjax.Params:
    return qjax.load(file)


@pytest.fixture(scope="module")
def reference(golden: Path) -> dict[str, np.ndarray]:
    return dict(np.load(golden / "gguf-Q4_1" / "reference.npz"))


def test_bytes_of_a_token(params) -> None:
    config = params.config
    numbers = 2 * config.num_layers * config.num_kv_heads
    size = config.head_dim
    expected = {"float32": 4 * size, "bfloat16": 2 * size, "fp8_e4m3": size, "fp8_e5m2": size}
    expected |= {"int8": size + 2, "int4": size // 2 + 3}
    assert {d: bytes_per_token(config, d) for d in expected} == {
        d: numbers * n for d, n in expected.items()
    }


def test_dtypes_of_layers(params) -> None:
    config = params.config
    last = config.num_layers - 1
    assert set(cache_dtypes(config, "auto", "bfloat16")) == {"bfloat16"}
    assert set(cache_dtypes(config, "fp8", "bfloat16")) == {"fp8_e4m3"}
    skipped = cache_dtypes(config, "int8", "bfloat16", [0, -1])
    assert [i for i, d in enumerate(skipped) if d == "bfloat16"] == [0, last]
    assert cache_dtypes(config, "int8", "bfloat16", ["0", "-1"]) == skipped
    assert set(cache_dtypes(config, "int4", "float32", ["sliding_window"])) == {"int4"}


def test_layers_with_a_window_keep_their_dtype(golden: Path) -> None:
    folder = golden / "base-tiny-gemma3"
    kinds = json.loads((folder / "config.json").read_text())["layer_types"]
    assert len(set(kinds)) == 2
    params = qjax.load(folder)
    dtypes = cache_dtypes(params.config, "int8", "bfloat16", ["sliding_window"])
    assert dtypes == tuple("bfloat16" if k == "sliding_attention" else "int8" for k in kinds)
    ids = np.load(folder / "reference.npz")["ids_0"]

    def logits(skip: list[int | str]) -> np.ndarray:
        found = qjax.forward(params, ids, kv_cache_dtype="int4", kv_cache_dtype_skip_layers=skip)
        return np.asarray(found)

    windowed = [i for i, kind in enumerate(kinds) if kind == "sliding_attention"]
    np.testing.assert_array_equal(logits(["sliding_window"]), logits([*windowed]))
    np.testing.assert_array_equal(
        logits([*range(len(kinds))]), np.asarray(qjax.forward(params, ids))
    )


# What is left of a number's mantissa: 7 bits of bfloat16, codes up to 127, 3 and 2 bits of floats;
# a step of a 15th of what a turned head spans.
ROUNDED = {"bfloat16": 2**-8, "int8": 1 / 127, "fp8_e4m3": 2**-4, "fp8_e5m2": 2**-3, "int4": 1 / 8}


@pytest.mark.parametrize("dtype", ROUNDED)
def test_forward_rounds_no_more_than_the_cache(params, reference, dtype: str) -> None:
    ids, expected = reference["ids_0"], reference["logits_0"]
    found = np.asarray(forward(params, ids, kv_cache_dtype=dtype), np.float64)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    exact = np.asarray(forward(params, ids), np.float64)
    assert error < ROUNDED[dtype]
    assert np.linalg.norm(found - exact) > 0.01 * ROUNDED[dtype] * np.linalg.norm(exact)


@pytest.mark.filterwarnings("ignore:kv_cache_dtype fp8")
@pytest.mark.parametrize("dtype", ["int8", "fp8", "fp8_e5m2", "int4"])
def test_generation_stays_close(params, reference, dtype: str) -> None:
    result = qjax.generate(
        params,
        reference["ids_0"].tolist(),
        max_tokens=4,
        ignore_eos=True,
        numerics="exact",
        kv_cache_dtype=dtype,
    )
    # What follows the first token depends on it, and no rounding is too small for a tie.
    logits = reference["logits_0"][-1]
    near = logits.max() - logits[result.token_ids[0]]
    assert near <= ROUNDED["fp8_e4m3" if dtype == "fp8" else dtype] * logits.max()
    if dtype == "int8":
        assert list(result.token_ids) == reference["greedy_0"].tolist()[:4]


def test_floats_of_8_bits_without_scales_warn(params) -> None:
    with pytest.warns(RuntimeWarning, match="kv_cache_dtype fp8 without scales.*int8 is closer"):
        Engine(params, num_blocks=1, kv_cache_dtype="fp8")


def test_preempted_and_chunked_as_alone(params, reference) -> None:
    prompts = [tuple(reference[f"ids_{i}"].tolist()) for i in range(3)]
    sampling = qjax.SamplingParams(max_tokens=32, ignore_eos=True)

    def run(prompts, **sizes):
        engine = Engine(params, numerics="exact", kv_cache_dtype="int8", **sizes)
        requests = [engine.add(prompt, sampling) for prompt in prompts]
        while engine.busy:
            engine.step()
        return [request.output_ids for request in requests], engine

    alone, _ = run(prompts, num_blocks=16)
    chunked, engine = run(prompts, num_blocks=7, max_num_batched_tokens=50)
    assert engine.scheduler.num_preemptions > 0
    # A page holds the same codes however the prompt came; sums differ in their last bits only.
    same = [a[:8] == b[:8] for a, b in zip(alone, chunked, strict=True)]
    assert all(same)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"kv_cache_dtype": "int3"}, "kv_cache_dtype must be one of auto, fp8, .*, got 'int3'"),
        ({"kv_cache_dtype_skip_layers": [True]}, "or 'sliding_window', got True"),
        ({"kv_cache_dtype_skip_layers": ["99"]}, "skip_layers must hold numbers in .*, got '99'"),
        ({"kv_cache_dtype_skip_layers": [99]}, "skip_layers must hold numbers in .*, got 99"),
        ({"kv_cache_dtype_skip_layers": ["x"]}, "or 'sliding_window', got 'x'"),
    ],
)
def test_errors(params, keywords, message) -> None:
    with pytest.raises(qjax.RequestError, match=message):
        qjax.generate(params, [5], max_tokens=1, **keywords)


def test_scales_of_a_model_are_for_e4m3(golden: Path) -> None:
    folder = golden / "ct-fp8-kv8"
    params = qjax.load(folder)
    assert set(cache_dtypes(params.config, "auto", "bfloat16")) == {"fp8_e4m3"}
    with pytest.raises(qjax.RequestError, match="fp8_e5m2, but the scales that came"):
        qjax.generate(params, [5], max_tokens=1, kv_cache_dtype="fp8_e5m2")
    without = qjax.load(folder, quantize_activations=False)
    assert set(cache_dtypes(without.config, "auto", "bfloat16")) == {"bfloat16"}
    assert set(cache_dtypes(without.config, "fp8_e5m2", "bfloat16")) == {"fp8_e5m2"}


def test_command_line(file: Path, capsys) -> None:
    common = ["generate", "hello", "-m", str(file), "-n", "2", "--raw"]
    options = ["--kv-cache-dtype", "int8", "--kv-cache-dtype-skip-layers", "-1"]
    with pytest.raises(SystemExit) as end:
        main([*common, *options])
    assert end.value.code == 0
    with pytest.raises(SystemExit) as end:
        main([*common, "--kv-cache-dtype", "int3"])
    assert end.value.code == 1
    assert "got 'int3'" in capsys.readouterr().err
