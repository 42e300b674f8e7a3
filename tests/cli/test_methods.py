"""The list of methods, held against the checkpoints, and the answers of the kernels."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest

import qjax
from pallas_kernels.matmul.supports import supports
from qjax.cli import methods, support
from qjax.cli.main import main

ROOT = Path(__file__).resolve().parent.parent.parent
GOLDEN = ROOT / "tests" / "golden"
OUTSIDE = Path(os.environ.get("QJAX_FIXTURES", GOLDEN))
METHODS = {method.name: method for method in support.METHODS}


def proofs() -> dict[str, Path]:
    """Checkpoints with a reference, by name."""
    found = {f.parent.name: f.parent for r in (OUTSIDE, GOLDEN) for f in r.glob("*/reference.npz")}
    plain = ("base-", "tiny-")
    return {name: found[name] for name in sorted(found) if not name.startswith(plain)}


def method_of(name: str) -> support.Method:
    found = [(p, m) for m in support.METHODS for p in m.prefixes if name.startswith(p)]
    assert found, f"{name} is the proof of no method"
    return max(found, key=lambda pair: len(pair[0]))[1]


@pytest.mark.parametrize("name", proofs())
def test_weights_are_of_listed_kinds(name: str) -> None:
    params = qjax.load(proofs()[name])
    method = method_of(name)
    keys = {kind.key for kind in method.kinds}
    for leaf in jax.tree.leaves(params.tree, is_leaf=lambda node: hasattr(node, "qtype")):
        if hasattr(leaf, "qtype") and (leaf.act or leaf.qtype not in ("f32", "f16", "bf16")):
            key = (leaf.qtype, leaf.zero_point is not None, leaf.act and leaf.act.dtype)
            assert key in keys
    uses = params.summary().uses
    assert {use.method for use in uses} <= {"", method.name, params.host.origin.quantization.name}


def test_every_builtin_method_is_listed() -> None:
    from qjax import registry

    there = [name for name, home in registry._BUILTIN.items() if find_spec(home)]
    listed = {registry.quantization_config(name).name for name in there}
    assert listed == METHODS.keys() - {"gguf"}


def test_documentation_shows_the_table() -> None:
    text = (ROOT / "docs" / "methods" / "other.md").read_text("utf-8")
    shown = text.split("<!-- made by: qjax methods --support -->\n")[1].split("<!-- end -->")[0]
    assert shown.strip() == "\n".join(support.support_table())


def test_documentation_shows_a_plugin() -> None:
    page = (ROOT / "docs" / "extending" / "format.md").read_text("utf-8")
    assert (ROOT / "tests" / "formats" / "flip5.py").read_text("utf-8") in page


@pytest.mark.parametrize("device", ["cpu", "gpu", "tpu"])
def test_every_kind_runs_everywhere(device: str) -> None:
    for method in support.METHODS:
        for kind in method.kinds:
            found = supports(kind.spec, kind.act, device)
            assert (found.treats_inputs is None) == (kind.act is None)
            if device != "cpu":
                assert found.implementation != "native"
                assert f"not on {device}" in found.refused["native"]


def test_answers_are_what_runs() -> None:
    for kind in METHODS["gguf"].kinds[:2]:
        assert methods.what_runs(kind, "gpu") == "Pallas (Triton)"
        assert methods.what_runs(kind, "tpu") == "Pallas (TPU)"


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    def run(*args: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(["methods", *args])
        assert not end.value.code
        return capsys.readouterr().out

    rows = json.loads(run("--format", "json", "--all"))
    assert {row["method"] for row in rows} == METHODS.keys()
    assert all(len(row["runs"]) == len(methods.HARDWARE) + 1 for row in rows)
    lines = run().splitlines()
    assert len(lines) == len(rows) + 2
    assert lines[0].startswith("| method | weights | here (")
    assert run("--support").splitlines() == list(support.support_table())
