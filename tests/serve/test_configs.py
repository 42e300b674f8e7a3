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
from qjax.planning import plan

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(
    path
    for path in (ROOT / "configs/serve").glob("*.yaml")
    if "kubernetes" not in path.name and path.stem != "cpu"
)
COMMANDS: Any = get_command(main.app).commands  # type: ignore[attr-defined]
GENERATE = COMMANDS["generate"]

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


def test_every_key_of_a_server_is_an_option() -> None:
    """tests/cli/test_serve.py runs it."""
    found = config_file.defaults(ROOT / "configs/serve/cpu.yaml", COMMANDS["serve"])
    assert found["model"] in found["served_model_name"]
    assert found["kv_cache_memory_bytes"] == 1 << 30


# The models' own config.json, in short.
LLAMA = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 16_384,
    "intermediate_size": 53_248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
}
SMALLER = {
    "hidden_size": 8_192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
QWEN = {
    "model_type": "qwen3_moe",
    "vocab_size": 151_936,
    "hidden_size": 4_096,
    "intermediate_size": 12_288,
    "moe_intermediate_size": 1_536,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
}


@pytest.mark.parametrize(
    ("config", "shape", "scheme", "device", "gigabytes"),
    [
        ("gpu-8", LLAMA, "W4A16_ASYM", "H100", 219),
        ("gpu-2x8", LLAMA, "FP8_DYNAMIC", "H100", 415),
        ("tpu-v6e-8", LLAMA | SMALLER, "W8A8", "TPU-v6e", 73),
        ("moe-8", QWEN, "FP8_BLOCK", "H100", 238),
    ],
)
def test_splits_and_fits(
    tmp_path: Path, config: str, shape: dict[str, Any], scheme: str, device: str, gigabytes: int
) -> None:
    """The models divide, and take what the files say."""
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": False, **shape}))
    path = ROOT / "configs/serve" / f"{config}.yaml"
    options = config_file.defaults(path, GENERATE)
    del options["model"]
    found = plan(tmp_path, scheme=scheme, device=device, max_num_seqs=1, **options).outcome
    assert found.memory.fits
    weights = found.memory.weights * found.split.devices / 1e9
    assert weights == pytest.approx(gigabytes, abs=0.5)
    assert f"{gigabytes} GB" in path.read_text()


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
