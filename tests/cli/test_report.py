"""`qjax report`: what its options become, and what it prints."""

import json
from pathlib import Path
from typing import Any

import pytest

import qjax
from qjax.bench import kernels
from qjax.bench.result import Result
from qjax.cli.main import main


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `qjax.report` is called with, which then ends."""
    found: dict[str, Any] = {}

    def report(*args: Any, **options: Any) -> None:
        found.update(options, args=args)
        options["say"]("a step")
        raise qjax.RequestError("no report.")

    monkeypatch.setitem(vars(qjax), "report", report)
    return found


def test_methods(asked: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(
            [
                *("report", "base", "--methods", "fp8, gptq", "--methods", "nf4"),
                *("--batches", "1,8", "--calibration", "text.txt", "--num-samples", "4"),
                *("--seq-len", "64", "--keep", "models", "--history", "lines.jsonl"),
            ]
        )
    assert end.value.code == 1
    assert asked["args"] == ("base", (), Path("report"))
    assert asked["methods"] == ["fp8", "gptq", "nf4"]
    assert asked["batches"] == [1, 8]
    assert asked["keep"] == Path("models")
    assert asked["history"] == Path("lines.jsonl")
    names = ("calibration", "num_samples", "seq_len", "numerics", "text", "window")
    assert [asked[name] for name in names] == ["text.txt", 4, 64, "both", None, 512]
    assert capsys.readouterr().err == "a step\nqjax: no report.\n"


def test_given_models(asked: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("some text")
    with pytest.raises(SystemExit):
        main(["report", "base", "one", "two", "--file", str(file), "-o", "page"])
    assert asked["args"] == ("base", ["one", "two"], Path("page"))
    assert (asked["text"], asked["text_name"]) == ("some text", "a.txt")
    assert (list(asked["methods"]), asked["batches"]) == ([], None)


def test_batches_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", "base", "--methods", "all", "--batches", "1-8"])
    assert "--batches: '1-8' is no list of numbers such as 1,8,32" in capsys.readouterr().err


def test_history_of_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = Path(__file__).parents[2] / "benchmarks/results/amd-epyc-2-cores.json"
    content = json.loads(results.read_text())
    found = Result(None, content, content.pop("rows"))
    monkeypatch.setattr(kernels, "run", lambda sizes, **more: found)
    file = tmp_path / "history.jsonl"
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            main(["bench", "kernels", "--history", str(file)])
        assert not end.value.code, capsys.readouterr().err
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["what"] for line in lines] == ["kernels"] * 2
    assert lines[0]["figures"]["bandwidth_gb_s"] == 49.96
