"""configs/serve/ray_serve.py in a Ray on this machine, where ray is installed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import qjax

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(golden: Path, tmp_path: Path) -> Path:
    """One that may go on for long."""
    folder = tmp_path / "model"
    shutil.copytree(golden / "base-tiny-llama", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1 << 14}))
    return folder


@pytest.mark.peer
def test_two_replicas(model: Path) -> None:
    pytest.importorskip("ray.serve")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "configs/serve")])
    env = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    env |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, str(Path(__file__).parent / "ray_program.py"), str(model)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))

    prompts = [asked["prompt"] for asked in found["asked"]]
    sampling: dict[str, Any] = found["asked"][0] | {"numerics": "exact"}
    del sampling["prompt"]
    alone = qjax.generate(qjax.load(model), prompts, **sampling)
    tokens = [list(each.token_ids) for each in alone]
    assert found["by http"] == tokens
    assert found["by handle"] == tokens
    assert found["replicas"] == 2

    *pieces, last = found["events"]
    assert len(pieces) > 1
    assert "".join(event["text"] for event in found["events"]) == alone[0].text
    assert last["token_ids"] == tokens[0]
    assert last["finish_reason"] == "length"
    assert [code for code, _ in found["refused"]] == [400] * 4
    assert "prompt is empty" in found["refused"][-1][1]

    idle, *seen = found["pages"]
    assert idle[1:] == [0, 0]
    assert all(free < idle[0] and running == 1 for free, running, _ in seen[::2])
    assert seen[1::2] == [idle] * 3
