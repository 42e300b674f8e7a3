"""Options from a file: what goes first, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import qjax
from qjax.cli.main import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `qjax generate hello --config FILE`, with a file of this text, and further arguments."""

    def call(text: str, *args: str) -> tuple[int, str, str]:
        file = tmp_path / "options.yaml"
        file.write_text(text)
        with pytest.raises(SystemExit) as end:
            main(["generate", "hello", "--config", str(file), *args])
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return call


def test_the_file_then_the_command_line(run: Run, golden: Path) -> None:
    model = golden / "gguf-Q4_1" / "model.gguf"
    text = f"""
        model: {model}
        raw: true
        json: true
        max-tokens: 4
        temperature: 1
        seed: 3
        stop: [qq, zz]
        numerics: exact
        kv-cache-dtype: int8
        kv-cache-dtype-skip-layers: [0, -1]
        quantize-activations: false
    """
    code, out, err = run(text, "--max-tokens", "6", "--quantize-activations")
    assert code == 0, err
    expected = qjax.generate(
        qjax.load(model),
        "hello",
        max_tokens=6,
        temperature=1.0,
        seed=3,
        stop=("qq", "zz"),
        numerics="exact",
        kv_cache_dtype="int8",
        kv_cache_dtype_skip_layers=(0, -1),
    )
    assert tuple(json.loads(out)["token_ids"]) == expected.token_ids


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: x", "options.yaml: modle: no such option (did you mean 'model'?)"),
        ("prompt: x", "options.yaml: prompt: no such option; known are model, raw, "),
        ("config: x", "options.yaml: config: no such option"),
        ("max-tokens: '4'", "options.yaml: max-tokens: must be an integer, got '4'"),
        ("max-tokens: true", "options.yaml: max-tokens: must be an integer, got True"),
        ("seed:", "options.yaml: seed: must be an integer, got None"),
        ("tensor-parallel-size: 0", "options.yaml: tensor-parallel-size: must be at least 1, got"),
        ("top-p: high", "options.yaml: top-p: must be a number, got 'high'"),
        ("model: [x]", "options.yaml: model: must be a string, got ['x']"),
        ("json: 1", "options.yaml: json: must be true or false, got 1"),
        ("stop: x", "options.yaml: stop: must be a list, got 'x'"),
        ("stop: [x, {}]", "options.yaml: stop: must be a string, got {}"),
        ("numerics: quick", "options.yaml: numerics: must be one of fast, exact, got 'quick'"),
        ("seed: 1\nseed: 2", "options.yaml is no YAML: key 'seed' comes twice"),
        ("seed: [", "options.yaml is no YAML: while parsing"),
        ("x", "options.yaml holds no keys and values, but 'x'"),
    ],
)
def test_what_is_refused(run: Run, text: str, message: str) -> None:
    code, out, err = run(text)
    assert (code, out) == (1, "")
    assert err.startswith("qjax: ")
    assert message in err


def test_no_such_file(run: Run) -> None:
    code, _, err = run("", "--config", "nowhere.yaml")
    assert code == 1
    assert "--config: cannot read nowhere.yaml: " in err
