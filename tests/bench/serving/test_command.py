"""`qjax bench serve` from its options to its files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qjax.bench.__main__ import main as bench_main
from qjax.cli.main import main
from tests.bench.serving.scripted import Asked, in_thread, tokens

Run = Callable[..., tuple[int, str, str]]
KEY = "sk-very-secret"
SIZES = ("--num-prompts", "6", "--random-input-len", "5", "--random-output-len", "4")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_info:
            main(["bench", "serve", *args])
        captured = capsys.readouterr()
        return int(exit_info.value.code or 0), captured.out, captured.err

    return call


def test_block(run: Run) -> None:
    with in_thread(tokens) as server:
        code, out, err = run("--base-url", server.url, *SIZES, "--num-warmups", "2")
    assert (code, err) == (0, "")
    lines = [line.rstrip() for line in out.splitlines()]
    assert "Successful requests:                     6" in lines
    assert "Total input tokens:                      30" in lines
    assert "Total generated tokens:                  24" in lines
    assert any(line.startswith("P99 E2EL (ms):") for line in lines)
    prompts = [asked.json["prompt"] for asked in server.asked if asked.path == "/v1/completions"]
    assert len(prompts) == len(set(prompts)) == 8
    assert all(asked.json["ignore_eos"] for asked in server.asked if "completions" in asked.path)


def test_json_and_files(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    file = tmp_path / "new" / "result.json"
    with in_thread(tokens) as server:
        code, out, _ = run(
            *("--port", str(server.port), *SIZES, "--random-prefix-len", "2", "--json"),
            *("--goodput", "ttft:600000", "tpot:600000", "--metric-percentiles", "50,99"),
            *("--percentile-metrics", "ttft,e2el", "--request-rate", "1000"),
            *("--max-concurrency", "2", "--seed", "7", "--temperature", "0"),
            *("--extra-body", '{"min_tokens": 3}', "--result-dir", str(file.parent)),
            *("--result-filename", file.name, "--save-detailed", "--disable-tqdm"),
        )
    assert code == 0
    shown, saved = json.loads(out), json.loads(file.read_text())
    assert shown.items() <= saved.items()
    assert shown["model_id"] == "words"
    assert shown["request_rate"] == 1000
    assert shown["request_goodput"] == shown["request_throughput"] > 0
    assert shown["p50_ttft_ms"] == shown["median_ttft_ms"]
    assert "mean_itl_ms" not in shown
    assert saved["input_lens"] == [7] * 6
    assert [len(each) for each in saved["itls"]] == [4] * 6
    assert shown["mean_ttft_ms"] == pytest.approx(1000 * sum(saved["ttfts"]) / 6)
    assert all(asked.headers["authorization"] == f"Bearer {KEY}" for asked in server.asked)
    sent = next(asked.json for asked in server.asked if asked.path == "/v1/completions")
    assert (sent["temperature"], sent["min_tokens"]) == (0, 3)
    assert KEY not in out + file.read_text()


def test_prompts_of_a_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a b c\nd\n")
    with in_thread(tokens) as server:
        code, _, _ = run(
            *("--base-url", server.url, "--dataset-name", "custom", "--num-prompts", "2"),
            *("--dataset-path", "prompts.txt", "--custom-output-len", "3", "--save-result"),
        )
    assert code == 0
    asked = [one.json for one in server.asked if one.path == "/v1/completions"]
    assert sorted(one["prompt"] for one in asked) == ["a b c", "d"]
    assert not any("ignore_eos" in one for one in asked)
    (file,) = tmp_path.glob("openai-infqps-words-*.json")
    assert json.loads(file.read_text())["total_output_tokens"] == 6


def test_failures(run: Run) -> None:
    async def failing(asked: Asked) -> None:
        if "completions" in asked.path:
            asked.answer(500, {"error": {"message": "out of pages"}})
        else:
            await tokens(asked)

    with in_thread(failing) as server:
        code, out, err = run("--base-url", server.url, *SIZES)
    assert code == 1
    assert "Failed requests:                         6" in out
    assert "6 failed: HTTP 500: out of pages" in err


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--base-url", "http://127.0.0.1:1"), 1, "cannot connect to http://127.0.0.1:1"),
        (("--base-url", "localhost"), 1, "base_url must be like"),
        (("--goodput", "itl:5"), 1, "goodput must be of"),
        (("ttft:5",), 2, "unexpected: ttft:5"),
        (("--percentile-metrics", "ttfb"), 1, "percentile_metrics must be of"),
        (("--metric-percentiles", "101"), 1, "metric_percentiles must be numbers in [0, 100]"),
        (("--request-rate", "0"), 1, "request_rate must be positive or inf, got 0."),
        (("--random-range-ratio", "1"), 1, "random_range_ratio must be in [0, 1), got 1."),
        (("--endpoint", "/v1/embeddings"), 1, "endpoint must end in"),
        (("--extra-body", "[]"), 1, "extra_body must be an object in JSON"),
        (("--dataset-name", "custom"), 2, "--dataset-path"),
        (("--tokenizer", "no/such/model:Q1"), 1, "no/such/model"),
    ],
)
def test_wrong_options(run: Run, args: tuple[str, ...], code: int, message: str) -> None:
    if "--tokenizer" in args:
        args += ("--model", "x")  # without a server
    found, out, err = run(*args)
    assert (found, out) == (code, "")
    assert message in " ".join(err.replace("│", " ").split())


def test_options_of_the_plain_command_do_not_vanish(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench_main(["-m", "x", "serve"])
    assert "--model belongs behind 'serve'" in capsys.readouterr().err
