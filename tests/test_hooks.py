"""The hooks of .pre-commit-config.yaml: the tree passes them, and they mend what they should."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """With the programs of this environment first, as when it is active."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {name: text for name, text in os.environ.items() if not name.startswith("GIT_")}
    variables |= {"PATH": path, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    return subprocess.run(
        command, cwd=cwd, env=variables | environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of the files that a commit here would hold, without those of other tools."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    if listed.returncode:
        pytest.skip(f"no git repository: {listed.stderr.strip()}")
    folder = tmp_path_factory.mktemp("copy")
    for name in filter(None, listed.stdout.split("\0")):
        if not name.startswith("tests/golden/") and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    assert not run("git", "init", "--quiet", cwd=folder).returncode
    return folder


def hooks(folder: Path, *files: str, skip: str = "") -> subprocess.CompletedProcess[str]:
    assert not run("git", "add", "--all", cwd=folder).returncode
    chosen = ("--files", *files) if files else ("--all-files",)
    command = (sys.executable, "-m", "pre_commit", "run", "--color=never", *chosen)
    return run(*command, cwd=folder, SKIP=skip, PRE_COMMIT_HOME=str(folder.parent / "home"))


def test_tree_passes(copy: Path) -> None:
    done = hooks(copy, skip="ruff-check,ruff-format")  # .ci/run has them already
    assert not done.returncode, done.stdout + done.stderr
    assert done.stdout.count("Passed") >= 6


def test_hooks_mend_what_they_find(copy: Path) -> None:
    cell = {
        "cell_type": "code",
        "execution_count": 1,
        "id": "one",
        "metadata": {},
        "outputs": [{"name": "stdout", "output_type": "stream", "text": ["2"]}],
        "source": ["1 + 1"],
    }
    notebook = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (copy / "run.ipynb").write_text(json.dumps(notebook, indent=1) + "\n")
    (copy / "loose.py").write_text("import os\nx = {'a':1} \n")
    (copy / "loose.md").write_text("one \ntwo\n\n\n")
    (copy / "broken.yaml").write_text("a: [1\n")
    (copy / "large.bin").write_bytes(b"\0" * (1 << 20 | 1))
    names = ("run.ipynb", "loose.py", "loose.md", "broken.yaml", "large.bin")
    done = hooks(copy, *names)
    found = {line.split("hook id: ")[1] for line in done.stdout.splitlines() if "hook id: " in line}
    for name in names:
        (copy / name).rename(copy.parent / name)
    assert found == {
        *("ruff-check", "ruff-format", "trailing-whitespace", "end-of-file"),
        *("yaml", "large-files", "notebooks"),
    }
    assert json.loads((copy.parent / "run.ipynb").read_text())["cells"][0]["outputs"] == []
    assert (copy.parent / "loose.py").read_text() == 'x = {"a": 1}\n'
    assert (copy.parent / "loose.md").read_text() == "one\ntwo\n"
