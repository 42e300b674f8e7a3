"""`qjax doctor`: faults made by hand are found and explained, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from pallas_kernels import native
from qjax.cli.main import main
from qjax.doctor import Finding, Surroundings, accelerators, examination, machine, packages

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def around(tmp_path: Path) -> Surroundings:
    """A machine of two processors with nothing wrong."""
    return Surroundings({}, tmp_path / "root", 2)


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    around: Surroundings,
    tmp_path: Path,
) -> Run:
    """The command on that machine, with an empty cache; changes of `around` go first."""
    monkeypatch.setenv("QJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packages, "wanted", dict)

    def run(*args: str, **environ: str) -> tuple[int, str]:
        own = Surroundings(environ, around.root, around.processors)
        monkeypatch.setattr("qjax.doctor.here", lambda: own)
        with pytest.raises(SystemExit) as end:
            main(("doctor", *args))
        return int(end.value.code or 0), capsys.readouterr().out

    return run


def write(around: Surroundings, path: str, text: str = "") -> None:
    file = around.root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def only(found: object) -> Finding:
    (finding,) = found  # type: ignore[misc]
    return finding


def test_nothing_wrong(run: Run) -> None:
    code, out = run()
    assert code == 0
    assert "No faults found" in out
    for word in ("python", "jaxlib", "devices", "compiler", "2 processors", "cache"):
        assert word in out
    assert "kernel        paged_attention: native" in out


def test_json_and_named_implementations(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QJAX_IMPLEMENTATION", "xla")
    code, out = run("--json", QJAX_IMPLEMENTATION="xla")
    found = json.loads(out)
    assert code == 0
    assert found["faults"] == 0
    assert found["kernels"] == {"matmul q4_1": "xla", "embedding q4_1": "xla",
                                "paged_attention": "xla"}  # fmt: skip
    (note,) = (each for each in found["findings"] if each["name"] == "QJAX_IMPLEMENTATION")
    assert note["do"] == "unset QJAX_IMPLEMENTATION"
    assert not note["fault"]


def test_a_fault_ends_with_1(run: Run) -> None:
    code, out = run(QJAX_NUM_THREADS="all")
    assert code == 1
    assert "fault  QJAX_NUM_THREADS: 'all' is no number of threads" in out
    assert "1 fault found." in out


def test_no_kernels(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: (None, "native kernels are not built"))
    monkeypatch.setattr("pallas_kernels.native.build.find_compiler", lambda: None)
    code, out = run()
    assert code == 1
    assert "C++ kernels: native kernels are not built" in out
    assert "install a C++17 compiler" in out
    assert "kernel        matmul q4_1: xla" in out


def test_kernels_of_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QJAX_CPU_KERNELS", "neon512")
    _, why = native.library.__wrapped__()
    found = only(accelerators.kernels("cpu", why, "c++"))
    assert "QJAX_CPU_KERNELS=neon512 does not run on this processor" in found.what
    assert not list(accelerators.kernels("gpu", why, None))


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({}, "GPU"),
        ({"JAX_PLATFORMS": "cpu"}, "JAX_PLATFORMS"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_gpu_that_jax_does_not_use(
    around: Surroundings, environ: dict[str, str], name: str
) -> None:
    machine_with = Surroundings(environ, around.root, 2)
    assert not list(accelerators.devices(machine_with, "cpu"))
    write(around, "dev/nvidia0")
    assert only(accelerators.devices(machine_with, "cpu")).name == name
    assert not list(accelerators.devices(machine_with, "gpu"))


def test_x64() -> None:
    around = Surroundings({}, Path("/nowhere"), 1)
    with jax.enable_x64(True):
        on = bool(jax.config.values["jax_enable_x64"]) or jax.numpy.zeros(1).dtype == "float64"
    assert on
    assert only(accelerators.settings(around, on)).name == "x64"
    assert not list(accelerators.settings(around, False))


@pytest.mark.parametrize(
    ("flags", "fault", "said"),
    [
        ("--xla_force_host_platform_device_count=8", False, "shown as 8 devices"),
        ("--xla_cpu_multi_thread_eigen=false", True, "one core"),
        ("--xla_gpu_autotune_level=0", False, "not tuned"),
        ("xla_dump_to=/tmp", True, "no flag of XLA"),
        ("'--xla_dump_to=x", True, "no flag of XLA"),
    ],
)
def test_xla_flags(flags: str, fault: bool, said: str) -> None:
    around = Surroundings({"XLA_FLAGS": f"{flags}"}, Path("/nowhere"), 1)
    found = only(accelerators.settings(around, False))
    assert found.fault is fault
    assert said in found.what
    fine = Surroundings({"XLA_FLAGS": "--xla_dump_to=/tmp/x"}, Path("/nowhere"), 1)
    assert not list(accelerators.settings(fine, False))


def test_gpu() -> None:
    environ = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "90"}
    around = Surroundings(environ, Path("/nowhere"), 1)
    found = {each.name: each for each in accelerators.gpu(around, "gpu", (8, 0))}
    assert "8.0 has no units for 8-bit floats" in found["compute capability"].what
    assert not found["XLA_PYTHON_CLIENT_PREALLOCATE"].fault
    assert found["XLA_PYTHON_CLIENT_MEM_FRACTION"].fault
    assert not list(accelerators.gpu(around, "cpu", None))
    bare = Surroundings({}, Path("/nowhere"), 1)
    assert not list(accelerators.gpu(bare, "gpu", (9, 0)))


@pytest.mark.parametrize(
    ("text", "said"),
    [("0", "no number"), ("-1", "no number"), ("9", "9 threads share 2"), ("1", "use 1 of 2")],
)
def test_threads(around: Surroundings, text: str, said: str) -> None:
    found = only(machine.threads(Surroundings({"QJAX_NUM_THREADS": text}, around.root, 2)))
    assert said in found.what
    assert found.fault is (text != "1")


def test_quota(around: Surroundings) -> None:
    write(around, "sys/fs/cgroup/cpu.max", "max 100000\n")
    assert not list(machine.threads(around))
    write(around, "sys/fs/cgroup/cpu.max", "150000 100000\n")
    assert machine.quota(around) == 1.5
    found = only(machine.threads(around))
    assert (found.name, found.fault) == ("processor quota", True)
    assert "QJAX_NUM_THREADS=1" in found.do
    (around.root / "sys/fs/cgroup/cpu.max").unlink()
    write(around, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    write(around, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert machine.quota(around) is None


def test_hyperthreads(around: Surroundings) -> None:
    for i in range(2):
        write(around, f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list", "0-1\n")
    found = only(machine.threads(around))
    assert (found.name, found.fault) == ("hyperthreads", False)
    assert "2 processors are 1 cores" in found.what


def test_folders(around: Surroundings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a-file"
    file.write_text("")
    monkeypatch.setenv("QJAX_CACHE", str(file / "cache"))
    found = only(machine.folders(around))
    assert "cannot be written" in found.what
    assert "set QJAX_CACHE" in found.do
    monkeypatch.setenv("QJAX_CACHE", str(tmp_path / "new" / "cache"))
    assert not list(machine.folders(around))
    hub = Surroundings({"HF_HOME": str(file)}, around.root, 2)
    assert only(machine.folders(hub)).name == "HF_HOME"
    usage = type("usage", (), {"free": 5_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert "5 MB are free" in only(machine.folders(around)).what


def test_versions() -> None:
    bounds = {"jax": "<0.13,>=0.10.2", "jaxlib": "<0.13,>=0.10.2"}

    def check(**versions: str) -> list[str]:
        named = {name.replace("_", "-"): own for name, own in versions.items()}
        return [each.what for each in packages.versions(bounds, named.get)]

    assert not check(jax="0.10.2", jaxlib="0.12.9")
    assert check(jax="0.10.1", jaxlib="0.11.0")[0].startswith("jax 0.10.1 is not of the versions")
    assert check(jax="0.11.0", jaxlib="0.13.0")[0].startswith("jaxlib 0.13.0 is not")
    plugin = check(jax="0.11.0", jaxlib="0.11.0", jax_cuda13_plugin="0.10.2")
    assert plugin[0].startswith("jax-cuda13-plugin 0.10.2 does not go with jaxlib 0.11.0")


def test_extras_and_hub() -> None:
    lacking = packages.missing(lambda name: None if name in ("lm_eval", "uvicorn") else object())
    assert lacking == {"server": ["uvicorn"], "eval": ["lm_eval"]}
    server, evaluation = packages.extras(lacking)
    assert (server.do, server.fault) == ("python -m pip install 'qjax[server]'", False)
    assert "qjax serve" in server.what
    assert "qjax eval tasks" in evaluation.what
    environ = {"HF_HUB_OFFLINE": "1", "HF_TOKEN": " hf_abc"}
    offline, token = packages.hub(Surroundings(environ, Path("/"), 1))
    assert not offline.fault
    assert token.fault
    assert "abc" not in token.what
    assert not list(packages.hub(Surroundings({"HF_TOKEN": "hf_abc"}, Path("/"), 1)))


def test_features_are_those_of_the_processor() -> None:
    names = {name for name, _ in examination.facts(Surroundings({}, Path("/nowhere"), 1))}
    assert {"python", "jax", "cpu features", "C++ kernels", "model"} <= names
