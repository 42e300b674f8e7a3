"""Executes the notebooks as a reader would, each in a kernel of its own.

A tiny model stands in for the default one, and, with --slow, the real one is taken where it is in
the cache. What is true of a result is asserted in the notebooks themselves, where readers see it;
here stands what every notebook is to have, and that these assertions would fail.
"""

import base64
import json
import os
import re
import struct
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from qjax.checkpoint import builtin
from tests import markdown

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
NAMES = [
    "01_generate_and_look_inside",
    "02_any_checkpoint_any_format",
    "03_quantize_five_ways",
    "04_kv_cache_and_long_context",
    "05_shard_over_eight_devices",
    "06_write_a_plugin",
    "07_roofline",
]
SECONDS = 600  # for one cell, on a machine that stalls
BLANK = 5_000  # bytes of a plot that shows hardly anything

# Run by the kernel before a notebook: the cache holds a smaller file than the one that is pinned.
STAND_IN = """
from dataclasses import replace

from qjax.checkpoint import builtin

_model = builtin.MODELS[builtin.DEFAULT]
_size = builtin.cached_path(builtin.DEFAULT).stat().st_size
_parts = (replace(_model.parts[0], nbytes=_size),)
builtin.MODELS[builtin.DEFAULT] = replace(_model, parts=_parts)
"""


@dataclass(frozen=True)
class Model:
    """The environment of a kernel with the default model, and what it runs first."""

    environment: dict[str, str]
    first: tuple[str, ...] = ()


@pytest.fixture(params=["tiny", pytest.param("real", marks=pytest.mark.slow)])
def model(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    golden: Path,
) -> Model:
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    first = ()
    if request.param == "tiny":
        markdown.stand_in(monkeypatch, tmp_path, golden)
        first = (STAND_IN,)
    elif not builtin.cached_path(builtin.DEFAULT).is_file():
        pytest.skip(f"{builtin.DEFAULT} is not in the cache: run `qjax pull {builtin.DEFAULT}`")
    found = {**os.environ, "JAX_PLATFORMS": "cpu", "TMPDIR": str(tmp_path)}
    found["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [found.get("PYTHONPATH")])])
    # Nothing of the user's settings, and nothing written there.
    found |= {name: str(tmp_path) for name in ("IPYTHONDIR", "MPLCONFIGDIR")}
    found["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    return Model(found, first)


def read(name: str) -> NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def execute(notebook: NotebookNode, model: Model) -> NotebookNode:
    """The notebook with its outputs; raises CellExecutionError where a cell fails."""
    first = [nbformat.v4.new_code_cell(source) for source in model.first]
    done = nbformat.v4.new_notebook(cells=first + notebook.cells, metadata=notebook.metadata)
    client = NotebookClient(
        done, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    # Of this interpreter, whatever kernels the machine has.
    spec = client.create_kernel_manager().kernel_spec
    assert spec is not None
    spec.argv[0] = sys.executable
    client.execute(env=model.environment)
    del done.cells[: len(first)]
    return done


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in code(notebook) for output in cell.outputs]


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def plots(notebook: NotebookNode) -> list[bytes]:
    """The PNG images of the outputs."""
    found = [output.get("data", {}).get("image/png") for output in outputs(notebook)]
    return [base64.b64decode(image) for image in found if image]


def test_all_are_listed() -> None:
    assert sorted(file.stem for file in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_runs(name: str, model: Model) -> None:
    """Every cell, without a warning; each plot that is asked for is made and shows something."""
    done = execute(read(name), model)
    streams = [output for output in outputs(done) if output.output_type == "stream"]
    said = "".join(output.text for output in streams if output.name == "stderr")
    assert not said, said
    assert sum(len(output.text) for output in streams) > 100
    wanted = sum(cell.source.count("plt.show()") for cell in code(done))
    images = plots(done)
    assert len(images) == wanted > 0
    for image in images:
        width, height = struct.unpack(">II", image[16:24])
        assert image[:4] == b"\x89PNG"
        assert min(width, height) > 150
        assert len(image) > BLANK


@pytest.mark.parametrize("name", NAMES)
def test_is_as_git_keeps_it(name: str) -> None:
    """Format 4.5; no outputs, counts, or paths of one machine; cells have ids of their own."""
    text = (FOLDER / f"{name}.ipynb").read_text("utf-8")
    notebook = read(name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    for cell in code(notebook):
        assert cell.outputs == []
        assert cell.execution_count is None
        assert not cell.metadata
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert not re.search(r"""["'\s(](/(work|root|home|tmp|Users|scratch)/|[A-Z]:\\\\)""", text)
    # As nbformat writes it, so that a change shows as what it is.
    assert text == nbformat.writes(notebook) + "\n"


@pytest.mark.parametrize("name", NAMES)
def test_checks_what_it_says(name: str) -> None:
    """A text before each cell of code, values that are checked, and a link that leads somewhere."""
    notebook = read(name)
    assert notebook.cells[0].source.startswith(f"# {int(name[:2])}. ")
    sources = [cell.source for cell in code(notebook)]
    assert sum(len(re.findall(r"^\s*assert |testing\.assert_", s, re.M)) for s in sources) >= 3
    text = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert "://" in target or (FOLDER / target).exists(), target
    if name != NAMES[-1]:
        assert f"({NAMES[NAMES.index(name) + 1]}.ipynb)" in text


def test_failing_cell_is_seen(tmp_path: Path) -> None:
    """A false assertion in a notebook fails its test."""
    cells = [nbformat.v4.new_code_cell(source) for source in ("x = 2", "assert x == 3")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    environment = {**os.environ, "IPYTHONDIR": str(tmp_path)}
    with pytest.raises(CellExecutionError, match="AssertionError"):
        execute(notebook, Model(environment))


def test_extra_has_what_notebooks_import() -> None:
    """Beside the package's own dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in ("notebook", "dev"):
        names = {re.split(r"[>=\[]", entry)[0] for entry in project["optional-dependencies"][extra]}
        assert names >= {"ipykernel", "nbclient", "matplotlib"}
    known = {"jax", "numpy", "matplotlib", "qjax", *sys.stdlib_module_names}
    for name in NAMES:
        text = json.dumps([cell.source for cell in code(read(name))])
        imported = set(re.findall(r"(?:^|\\n|\")(?:import|from) (\w+)", text))
        assert imported <= known, name
