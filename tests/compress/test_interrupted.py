"""`qjax quantize` that is killed leaves nothing, or what the same command goes on from."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import qjax

GOLDEN = Path(__file__).parents[1] / "golden"


def command(out: Path, samples: Path) -> list[str]:
    options = "--scheme W4A16 --group-size 32 --method gptq".split()
    return [
        *(sys.executable, "-m", "qjax", "quantize", str(GOLDEN / "base-tiny-llama"), str(out)),
        *(*options, "--calibration", str(samples)),
    ]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("moment", ["hidden-00001.npy", "model.safetensors"])
def test_killed(moment: str, tmp_path: Path) -> None:
    """Behind the first layer, and while the model is being written."""
    samples, work = tmp_path / "ids.npy", tmp_path / "work"
    np.save(samples, np.random.default_rng(0).integers(0, 250, (4, 48)).astype(np.int32))
    work.mkdir()
    out = work / "model"
    started = subprocess.Popen(command(out, samples), stderr=subprocess.PIPE)
    until = time.monotonic() + 240
    while not any(work.rglob(f"*{moment}*")):
        assert started.poll() is None, started.communicate()
        assert time.monotonic() < until
        time.sleep(0.002)
    os.kill(started.pid, signal.SIGKILL)
    started.communicate()
    if out.exists():  # the kill came too late, or as what was kept beside it was being removed
        for rest in work.glob(".model.*.unfinished"):
            shutil.rmtree(rest)
        assert names(work) == ["model"]
    else:
        assert all(name.startswith(".model.") for name in names(work))
        again = subprocess.run(command(out, samples), capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
    assert [name for name in names(work) if name.endswith(".unfinished")] == []
    params = qjax.load(out)
    assert params.tree["model"]["layers"]["2"]["mlp"]["up_proj"]["weight"].qtype == "uint4b8"
