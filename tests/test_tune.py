"""Tuning: what is measured, which block sizes are kept, and that kernels find them again."""

import json
import sys
from types import ModuleType

import numpy as np
import pytest

import qjax
from pallas_kernels import dispatch, measurements, platform, tuning
from qjax import tune
from qjax.bench import cases
from qjax.bench.cases import Case, Measured
from qjax.cli.main import main
from qjax.errors import QjaxError

DEVICE = "Imaginary Device 9000"


@pytest.fixture(autouse=True)
def _own_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("QJAX_CACHE", str(tmp_path))


@pytest.fixture
def kernel(monkeypatch):
    """An implementation "fake" with three block sizes beside its defaults."""
    module = ModuleType("fake_kernels")
    module.candidates = lambda kind, rows, n, k: [{"size": s} for s in (16, 32, 64)]  # pyright: ignore
    monkeypatch.setitem(sys.modules, "fake_kernels", module)

    def fake():
        raise AssertionError("never called: its time is given")

    fake.__module__ = "fake_kernels"
    monkeypatch.setitem(tune._IMPLEMENTATIONS, "matmul", (("fake", fake), ("xla", json.dumps)))
    monkeypatch.setattr(cases, "values", lambda case, name: np.ones(3))


def times(microseconds):
    """Stands in for the clock: by implementation and block size."""

    def prepare(case, timing, name):
        blocks = tuning.blocks(case.op, name, case.kind, case.rows, case.n, case.k) or {}
        value = microseconds[name, blocks.get("size")]
        if isinstance(value, Exception):
            raise value
        return Measured(case, name, seconds=None if value is None else value * 1e-6)

    return prepare


def run(microseconds, said=None, **case):
    with platform.assume("gpu", DEVICE):
        return tune.run(
            [Case("matmul", "q4_k", 256, 512, 8)],
            prepare=times(microseconds),
            say=(said if said is not None else []).append,
        )


TIMES = {("fake", None): 9, ("fake", 16): 7, ("fake", 32): 5, ("fake", 64): 8, ("xla", None): 6}


def test_fastest_block_sizes_are_kept(kernel):
    entered = run(TIMES)
    assert [(e.implementation, e.blocks, e.microseconds) for e in entered] == [
        ("fake", {"size": 32}, 5),
        ("xla", {}, 6),
    ]
    with platform.assume("gpu", DEVICE):
        assert tuning.blocks("matmul", "fake", "q4_k", 8, 256, 512) == {"size": 32}
        assert tuning.blocks("matmul", "xla", "q4_k", 8, 256, 512) is None
        assert tuning.preferred("matmul", "q4_k", 8, 256, 512) == "fake"
        assert measurements.read(tuning.user_table(DEVICE), DEVICE) == entered


def test_later_measurements_take_the_place_of_earlier_ones(kernel):
    run(TIMES)
    run(TIMES | {("fake", 32): 10, ("xla", None): 1})
    with platform.assume("gpu", DEVICE):
        assert tuning.blocks("matmul", "fake", "q4_k", 8, 256, 512) == {"size": 16}
        assert tuning.preferred("matmul", "q4_k", 8, 256, 512) == "xla"
        assert len(measurements.read(tuning.user_table(DEVICE), DEVICE)) == 2


def test_block_sizes_that_fail_or_are_wrong_are_left_out(kernel, monkeypatch):
    def values(case, name):
        blocks = tuning.blocks("matmul", name, "q4_k", 8, 256, 512)
        return np.full(3, 1.5 if blocks == {"size": 16} else 1.0)

    monkeypatch.setattr(cases, "values", values)
    said = []
    entered = run(TIMES | {("fake", 32): RuntimeError("too much shared memory")}, said)
    assert entered[0].blocks == {"size": 64}
    assert "fake {'size': 32}: RuntimeError: too much shared memory" in said
    assert "fake {'size': 16}: wrong values" in said


def test_what_is_refused_is_not_entered(kernel):
    assert run(TIMES | {("fake", 32): None})[0].blocks == {"size": 16}
    none: dict = dict.fromkeys(TIMES)
    assert [e.implementation for e in run(none | {("xla", None): 3})] == ["xla"]
    with pytest.raises(tune.NothingToTune):
        run(none)
    with pytest.raises(QjaxError, match="no implementation 'native'"):
        tune.run([Case("matmul", "q4_k", 1, 1, 1)], implementations=["native"])


def test_damaged_table_is_not_overwritten(kernel):
    path = tuning.user_table(DEVICE)
    path.parent.mkdir()
    path.write_text("{")
    with pytest.raises(measurements.TableError, match=path.name):
        run(TIMES)
    assert path.read_text() == "{"


def test_cases_of_a_model(golden):
    params = qjax.load(golden / "gptq-4b-g32-desc")
    found = tune.of_model(params, (1, 4))
    products = {(c.op, c.kind, c.n, c.k) for c in found}
    config = params.config
    assert (
        "matmul",
        "uint4b8 g32 bfloat16",
        config.intermediate_size,
        config.hidden_size,
    ) in products
    assert len(found) == 2 * len(products)
    with platform.assume("gpu", DEVICE):
        attention = {c.kind for c in tune.of_model(params, (1,)) if c.op == "paged_attention"}
    assert attention == set(tune.CACHE_DTYPES)
    # A weight is laid out for whichever is asked.
    case = next(c for c in found if c.kind.startswith("uint4b8"))
    layouts = []
    for name in ("native", "xla"):
        with dispatch.use(name):
            assert case.weight is not None
            layouts.append(case.weight().layout)
    assert layouts[1] == "canonical" != layouts[0]


def test_products_of_codes_are_a_kind_of_their_own():
    def kinds():
        return [case.kind for case in tune.of_shapes(["W8A16", "W8A8 INT8"], [(256, 128)], [1])]

    assert kinds() == ["int8 channel bfloat16", "int8 channel float32"]
    with platform.assume("gpu", DEVICE):
        assert kinds() == ["int8 channel bfloat16", "int8 channel float32 by int8"]


def test_here(capsys, golden):
    """On this CPU, with its own clock and kernels."""
    main_code("tune", "--kinds", "W8A16", "--shapes", "256x128", "--rows", "2")
    _, err = capsys.readouterr()
    assert "on a CPU there are no block sizes to tune" in err
    device = platform.device().name
    entries = measurements.read(tuning.user_table(device), device)
    assert {e.implementation for e in entries} == {"native", "xla"}
    assert {(e.op, e.kind, e.n, e.k, e.rows) for e in entries} == {
        ("matmul", "int8 channel bfloat16", 256, 128, 2)
    }
    fastest = min(entries, key=lambda e: e.microseconds).implementation
    assert tuning.preferred("matmul", "int8 channel bfloat16", 2, 256, 128) == fastest
    # A model's weights, experts included, are entered beside these.
    main_code(
        "tune", "-m", str(golden / "gguf-mixtral-F32"), "--rows", "2", "--implementation", "xla"
    )
    content = json.loads(tuning.user_table(device).read_text())
    assert {e["op"] for e in content["entries"]} == {"matmul", "matmul_grouped"}
    # A damaged table is told in one line.
    tuning.user_table(device).write_text("[]")
    assert main_code("tune", "--kinds", "W8A16", "--shapes", "256x128", "--rows", "2") == 1
    assert "table of measurements" in capsys.readouterr().err


def main_code(*args):
    with pytest.raises(SystemExit) as raised:
        main(args)
    return raised.value.code


@pytest.mark.parametrize(
    "args", [(), ("--kinds", "W8A16"), ("-m", "x", "--kinds", "W8A16"), ("--shapes", "1x1")]
)
def test_what_to_tune_must_be_said(args, capsys):
    assert main_code("tune", *args) == 2
    err = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "give --model, or --kinds with --shapes" in err


def test_values_of_a_case_do_not_depend_on_who_computes_them():
    case = Case("matmul", "W8A16", 256, 128, 2)
    native, xla = (cases.values(case, name) for name in ("native", "xla"))
    assert native.shape == (2, 256)
    assert np.linalg.norm(native - xla) < 1e-3 * np.linalg.norm(xla)
