"""The comparison of servers, with small programs in their place."""

import asyncio
import importlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from qjax.bench.serving.client import first_model
from qjax.errors import ServingError

ROOT = Path(__file__).parents[2]
STUB = f"""
import asyncio, sys
sys.path.insert(0, {str(ROOT)!r})
from tests.bench.serving import scripted

async def main():
    handler = getattr(scripted, sys.argv[1])
    server, _ = await scripted.serve(handler, int(sys.argv[sys.argv.index("--port") + 1]))
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("serve_vs_llamacpp")


@pytest.fixture
def stub(tmp_path: Path, program: Any) -> Any:
    file = tmp_path / "stub.py"
    file.write_text(STUB)
    return program.Engine("stub", (sys.executable, str(file), "tokens"), settings=("--x", "y"))


@pytest.fixture
def model(golden: Path) -> Path:
    return golden / "gguf-deepseek-v2-F32" / "model.gguf"  # its vocabulary has whole words


def test_rounds_take_turns(program: Any, stub: Any, model: Path) -> None:
    load = program.Load(2, 4, 1, 8, 3)
    assert load.max_model_len == 256
    engines = (stub, replace(stub, name="other"))
    rows = program.in_turns(engines, load, model, 1, 2)
    assert [row.engine for row in rows] == ["stub", "other", "other", "stub"]
    for row in rows:
        assert row.figures["completed"] == 4
        assert row.figures["total_output_tokens"] == 12
        assert row.figures["counted_by"] == "usage"
        assert row.figures["max_concurrent_requests"] <= 2


def test_a_server_is_ended(program: Any, stub: Any) -> None:
    with program.served(stub, 1) as server:
        assert server.model == "words"
    with pytest.raises(ServingError, match="cannot connect"):
        asyncio.run(first_model(server))


def test_a_server_that_does_not_come_up(program: Any, stub: Any) -> None:
    broken = replace(stub, command=(sys.executable, "-c", "raise SystemExit('no model')"))
    with pytest.raises(RuntimeError, match="does not come up: no model"), program.served(broken, 1):
        pass


def figures(**values: float) -> dict[str, float]:
    names = ("median_tpot_ms", "p99_ttft_ms", "total_token_throughput", "client_seconds")
    return dict.fromkeys(names, 1.0) | {"duration": 2.0} | values


def test_ratios_are_of_medians(program: Any) -> None:
    rows = [
        program.Row(name, figures(output_throughput=rate, median_ttft_ms=wait))
        for name, rate, wait in [
            ("a", 100, 20),
            ("a", 900, 10),
            ("a", 300, 40),
            ("b", 100, 40),
            ("b", 200, 90),
            ("b", 150, 50),
        ]
    ]
    found = program.ratios(rows, "a", "b")
    assert found["output_throughput"] == 300 / 150
    assert found["median_ttft_ms"] == 50 / 20
    report = {
        "file": "x.gguf",
        "threads": 2,
        "versions": {"a": "1.0"},
        "tests": [
            {
                "load": asdict(program.Load(32, 64, 32, 128, 128, 1000)),
                "engines": {"a": [], "b": ["--flash-attn", "on"]},
                "rows": [asdict(row) for row in rows],
                "ratios": found,
            }
        ],
    }
    text = "\n".join(program.table(json.loads(json.dumps(report))))
    assert "64 prompts of 1000 tokens in common, 128 tokens, 128 generated, 32 at a time." in text
    assert "| a | 900 | 1 | 10 | 1 | 1.0 | 50% |" in text
    assert "output tokens/s **2.00x**, all tokens/s **1.00x**, median TTFT **2.50x**" in text
    assert "b: --flash-attn on." in text


def test_commands(program: Any) -> None:
    load, file = program.Load(4, 8, 4, 128, 128), Path("m.gguf")
    ours = program.ours(file, load, "--no-enable-prefix-caching")
    assert ours.command[1:5] == ("-m", "qjax", "serve", "m.gguf")
    peer = program.llama_server("llama-server", file, load, 2)
    # Each of four slots holds one whole request.
    assert peer.command[peer.command.index("-c") + 1] == str(4 * load.max_model_len)
    assert load.max_model_len >= 256 + 1
