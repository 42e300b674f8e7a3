"""The command line, in this process: what it prints where, and how it ends."""

import json
from pathlib import Path
from typing import Any

import pytest

import qjax
from qjax.cli.main import main
from tests.cli.conftest import Run


def test_generate_streams_text_and_then_figures(run: Run, model: str) -> None:
    code, out, err = run("generate", "hello", "--model", model, "--max-tokens", "8")
    params = qjax.load(model)
    messages = [{"role": "user", "content": "hello"}]
    assert code == 0
    assert out == qjax.generate(params, messages, max_tokens=8).text + "\n"
    assert "tokens/s" in err
    assert "peak memory" in err


def test_raw_and_json(run: Run, model: str) -> None:
    code, out, _ = run("generate", "hello", "-m", model, "-n", "8", "--raw", "--json")
    found = json.loads(out)
    expected = qjax.generate(qjax.load(model), "hello", max_tokens=8)
    assert code == 0
    assert tuple(found["token_ids"]) == expected.token_ids
    assert found["text"] == expected.text


def test_forms(run: Run, model: str, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    args = ("generate", "hello", "-m", model, "--raw")
    code, out, _ = run(*args, "--json-schema", json.dumps(schema))
    assert code == 0
    assert json.loads(out) in ({"a": 1}, {"a": 2})
    grammar = tmp_path / "grammar.lark"
    grammar.write_text('start: "yes" | "né"', "utf-8")
    code, out, _ = run(*args, "--grammar-file", str(grammar))
    assert (code, out) in ((0, "yes\n"), (0, "né\n"))


def test_stdin(run: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    code, out, _ = run("generate", "-", "-m", model, "-n", "8", "--raw", "--json")
    assert code == 0
    assert json.loads(out)["prompt_token_ids"] == qjax.load(model).tokenizer.encode("hello")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("generate", ""), "prompt is empty"),
        (("generate", "x", "--top-p", "0"), "top_p must be in (0, 1], got 0."),
        (("generate", "hello " * 600), "tokens, but the context holds 512"),
        (("generate", "x", "--raw", "--system", "y"), "--system needs the chat template"),
        (("generate", "x", "-j", "{}", "--grammar-file", "g"), "not both"),
        (("generate", "x", "-j", '{"type": "word"}'), "json cannot be followed: Invalid type"),
        (("generate", "x", "--grammar-file", "none.lark"), "cannot read none.lark"),
    ],
)
def test_errors_are_one_message(run: Run, model: str, args: tuple[str, ...], message: str) -> None:
    code, out, err = run(*args, "--model", model)
    assert (code, out) == (1, "")
    assert err.startswith("qjax: ")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", [["generate", "x", "--model"], ["pull"], ["inspect"]])
def test_unknown_models(run: Run, command: list[str]) -> None:
    code, _, err = run(*command, "smolm2-135m")
    assert code == 1
    assert "smollm2-135m" in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QJAX_DEBUG", "1")
    with pytest.raises(qjax.QjaxError):
        main(["pull", "smolm2-135m"])


def conversation(monkeypatch: pytest.MonkeyPatch, *lines: Any) -> list[str]:
    """Types these lines, then Ctrl-D; an exception is raised in place of its line."""
    remaining = iter([*lines, EOFError()])
    shown: list[str] = []

    def typed(prompt: str = "") -> str:
        shown.append(prompt)
        line = next(remaining)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    return shown


def test_chat_keeps_the_conversation(run: Run, model: str, monkeypatch) -> None:
    conversation(monkeypatch, "hello", "", KeyboardInterrupt(), "more")
    code, out, _ = run("chat", "-m", model, "-n", "8")
    params = qjax.load(model)
    messages = [{"role": "user", "content": "hello"}]
    first = qjax.generate(params, messages, max_tokens=8).text
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "more"}]
    second = qjax.generate(params, messages, max_tokens=8).text
    assert code == 0
    assert first + "\n" in out
    assert out.rstrip("\n").endswith(second.rstrip("\n"))


def test_ctrl_c_stops_the_reply_and_not_the_program(run: Run, model: str, monkeypatch) -> None:
    from qjax.api import TextStream

    conversation(monkeypatch, "hello", "again")
    original = TextStream.__next__
    calls = []

    def interrupted(self: TextStream) -> str:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(TextStream, "__next__", interrupted)
    code, _, _ = run("chat", "-m", model, "-n", "8")
    assert code == 0
    assert len(calls) > 4


def test_inspect(run: Run, model: str) -> None:
    code, out, _ = run("inspect", model)
    assert code == 0
    assert "llama" in out
    assert "q4_1" in out
    assert "KB a token, in bfloat16: the model brings no scales" in out


def test_inspect_tells_what_would_run(run: Run, golden: Path) -> None:
    code, out, _ = run("inspect", str(golden / "gptq-4b-g32-desc"))
    assert code == 0
    assert "method        gptq" in out
    assert "bits 4" in out
    (line,) = [line for line in out.splitlines() if line.startswith("uint4b8")]
    assert line.split()[1:4] == ["1x32", "-", "21"]


def test_quantization_is_asked_for(run: Run, golden: Path) -> None:
    model = str(golden / "base-tiny-llama")
    code, out, _ = run(
        *("generate", "hello", "-m", model, "-n", "4", "--json", "--raw"),
        *("--quantization", "fp8", "--no-quantize-activations"),
    )
    assert code == 0
    params = qjax.load(model, quantization="fp8", quantize_activations=False)
    expected = qjax.generate(params, "hello", max_tokens=4)
    assert tuple(json.loads(out)["token_ids"]) == expected.token_ids
    code, _, err = run("generate", "hello", "-m", model, "--quantization", "unheard_of")
    assert code == 1
    assert "'unheard_of' is not supported" in err


@pytest.mark.parametrize("output", ["md", "csv", "json"])
def test_bench(run: Run, model: str, output: str) -> None:
    sizes = ("-p", "16", "-n", "4", "-b", "1", "-r", "2")
    code, out, _ = run("bench", "-m", model, *sizes, "--kv-cache-dtype", "int8", "-o", output)
    assert code == 0
    assert "int8" in out
    if output == "json":
        rows = json.loads(out)
        assert [row["test"] for row in rows] == ["pp16", "tg4"]
        assert all(row["tokens_per_second"] > 0 for row in rows)
        assert rows[1]["bandwidth_share"] > 0
        # A code a dimension and a scale of 2 bytes a head, for keys and values of 2 heads in each
        # of 2 layers; 16 tokens and one, or 8 and five.
        token = 2 * 2 * 2 * (64 + 2)
        assert [row["cache_bytes"] for row in rows] == [17 * token, 13 * token]
    else:
        assert "pp16" in out
        assert "tg4" in out


def test_pull_prints_the_path(run: Run, model: str) -> None:
    code, out, _ = run("pull", model)
    assert (code, out.strip()) == (0, model)
