"""configs/serve: every key is an option, and the splits run, with tiny models and virtual devices
in place of large ones and accelerators."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import qjax
from qjax.cli import config_file, main

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(
    path for path in (ROOT / "configs/serve").glob("*.yaml") if "kubernetes" not in path.name
)
GENERATE: Any = get_command(main.app).commands["generate"]  # type: ignore[attr-defined]

SHORT = ["--max-model-len", "64", "--max-tokens", "8", "--raw", "--json"]
SHORT += ["--ignore-eos", "--numerics", "exact"]


def alone(model: Path) -> tuple[int, ...]:
    """What comes of "hello" and the options `SHORT` on one device."""
    options: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True, "numerics": "exact"}
    return qjax.generate(qjax.load(model), "hello", **options).token_ids


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_key_is_an_option(path: Path) -> None:
    found = config_file.defaults(path, GENERATE)
    assert found["tensor_parallel_size"] in (8, 16)
    assert "/" in found["model"]


@pytest.mark.parametrize(
    ("config", "model", "more"),
    [
        ("gpu-8", "base-tiny-llama", ()),
        # Of only 4 experts, and with no scales for an fp8 cache.
        ("moe-8", "base-tiny-mixtral", ("-tp", "4", "--kv-cache-dtype", "auto")),
    ],
)
def test_runs_on_eight_devices(
    golden: Path, tmp_path: Path, config: str, model: str, more: tuple[str, ...]
) -> None:
    folder = tmp_path / model
    shutil.copytree(golden / model, folder)
    shutil.copy(golden / "base-tiny-llama" / "tokenizer.json", folder)
    shape = json.loads((folder / "config.json").read_text())
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}  # of 4, 2 and 32
    (folder / "config.json").write_text(json.dumps(shape))
    options = ["--config", str(ROOT / "configs/serve" / f"{config}.yaml"), "--model", str(folder)]
    flags = "--xla_force_host_platform_device_count=8"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "qjax", "generate", "hello", *options, *SHORT, *more]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert tuple(json.loads(done.stdout)["token_ids"]) == alone(folder)


# As Slurm does it: a process for each task, which is told its place by variables.
SRUN = """#!/bin/bash
test "$1" = --kill-on-bad-exit=1 && shift
for i in 0 1; do
  SLURM_JOB_ID=1 SLURM_STEP_NODELIST=localhost,other SLURM_NTASKS=2 SLURM_PROCID=$i \\
    SLURM_LOCALID=0 "$@" &
  started+=($!)
done
for each in "${started[@]}"; do wait "$each" || exit 1; done
"""


@pytest.mark.slow
def test_slurm(golden: Path, tmp_path: Path) -> None:
    python = f'#!/bin/bash\nexec "{sys.executable}" -m qjax "$@"\n'
    for name, text in {"srun": SRUN, "qjax": python}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    env = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_PORT": str(port),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    model = golden / "base-tiny-llama"
    command = ["bash", "configs/serve/gpu-2x8.sbatch", "hello", "-m", str(model), "-tp", "4"]
    command += SHORT
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert "process 1 of 2, 2 devices here, 4 in all" in done.stderr
    assert tuple(json.loads(done.stdout)["token_ids"]) == alone(model)
