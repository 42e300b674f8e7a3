"""Measuring kernels: what is timed, what is checked first, and the file that is filled."""

import json
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, platform
from pallas_kernels.matmul import api
from pallas_kernels.matmul.spec import WeightArrays, decode
from qjax import ops
from qjax.bench import cases, clock, correctness, grid, kernels, report, result, weights
from qjax.bench.__main__ import main
from qjax.bench.cases import Case
from qjax.errors import QjaxError

SIZE = ("--quick", "--shapes", "256x256", "--rows", "2")


def dequantized(w):
    w = w if w.layout == "canonical" else ops.unprepare(w)
    return decode(w.spec, WeightArrays(*w.arrays), np)


@pytest.mark.parametrize("device", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("name", weights.KINDS)
def test_weights_are_rows_repeated(name, device):
    kind = weights.KINDS[name]
    with platform.assume(device):
        w = weights.on_device(kind, 768, 256)
        assert w.shape == (768, 256)
        drawn = dequantized(weights.draw(kind, 256, 256))
        np.testing.assert_array_equal(
            dequantized(jax.tree.map(np.asarray, w)), np.tile(drawn, (3, 1))
        )
    # Of such a size that products neither vanish nor overflow.
    assert 0.1 < np.sqrt(256 * (drawn.astype(np.float64) ** 2).mean()) < 10


def test_stacked_weights_are_repeated():
    kind = weights.KINDS["W4A16 g128 asym"]
    w = jax.tree.map(np.asarray, weights.on_device(kind, 512, 256, experts=3))
    drawn = dequantized(weights.draw(kind, 256, 256))
    np.testing.assert_array_equal(dequantized(w), np.tile(drawn, (3, 2, 1)))


class Clock:
    """One second later whenever it is looked at."""

    seconds = 0.0

    def __call__(self):
        self.seconds += 1
        return self.seconds


def test_clock_counts_calls():
    ran = Counter()

    def count(w):
        ran[int(w)] += 1
        return np.float32(w)

    def call(x, w, state):
        y = jax.pure_callback(count, jax.ShapeDtypeStruct((), jnp.float32), w + 0 * x[0, 0])
        return jnp.full((2, 2), y), state + 1

    timing = clock.Timing(repeats=3, sample_seconds=1.0, limit_seconds=1e9, now=Clock())
    copies = [jnp.float32(1), jnp.float32(2)]
    states = [jnp.zeros(3), jnp.zeros(3)]
    operands = jnp.ones((2, 2)), copies, states
    program = clock.program(call, *operands, 0.125, timing)
    seconds = clock.seconds(program, *operands, timing)
    # Four rounds through two copies last a second; they run once to warm up, and three times.
    assert seconds == 1 / 8
    assert ran == {1: 16, 2: 16}


def test_copies_outgrow_caches():
    timing = clock.Timing(spread_bytes=1000, most_copies=8)
    assert [timing.copies(n) for n in (0, 1, 300, 1000, 5000)] == [8, 8, 4, 1, 1]


@pytest.mark.parametrize("op", grid.OPS)
def test_every_op_is_measured(op):
    sizes = replace(grid.QUICK, shapes=((256, 256),), rows=(2,))
    if op == "bfloat16":
        case = Case(op, "BF16", 256, 256, 2)
    else:
        case = next(c for c in grid.cases(op, sizes) if c.op == op)
    found = cases.measure(case, clock.QUICK)
    assert found.seconds is not None
    assert found.nbytes > 0
    assert found.flops > 0
    assert found.implementation in ("native", "xla")


def test_bytes_and_flops_are_those_of_the_case():
    found = cases.measure(Case("matmul", "W4A16 g128", 256, 512, 4), clock.QUICK)
    assert found.flops == 2 * 4 * 256 * 512
    held = 256 * 512 // 2 + 256 * 4 * 2 + 4 * 4 * (256 + 512)
    assert held <= found.nbytes <= 1.1 * held


def test_what_nothing_takes_is_no_failure():
    found = cases.measure(Case("matmul", "BF16", 256, 256, 1), clock.QUICK, "nothing,native")
    assert found.seconds is not None
    with platform.assume("tpu"):
        found = cases.measure(Case("paged_attention", "bfloat16", 2, 16, 1), clock.QUICK, "native")
    assert found.seconds is None
    assert found.refused


CHECKED = {
    "matmul": ["W4A16 g128 asym", "Q4_K"],
    "matmul_grouped": ["W4A16 g128 asym", "NF4"],
    "paged_attention": ["bfloat16", "int8"],
    "quantize": [*cases.ACTS],
    "kv_update": ["bfloat16", "int4"],
}


@pytest.mark.parametrize("op", CHECKED)
def test_values_are_right_here(op):
    done = correctness.checks(op, CHECKED[op])
    assert {each.implementation for each in done if each.error is not None} >= {"xla"}
    assert all(each.passed for each in done), [str(each) for each in done if not each.passed]
    assert correctness.checks(op, CHECKED[op], "unheard_of") == []


def run(capsys, *args):
    code = 0
    try:
        main(["kernels", *args])
    except SystemExit as error:
        code = error.code
    return code, *capsys.readouterr()


def test_wrong_values_are_told_and_nothing_is_measured(monkeypatch, capsys, tmp_path):
    def wrong(*args, **kwargs):
        return tuple(1.01 * y for y in dict(right)["xla"](*args, **kwargs))

    right = api.IMPLEMENTATIONS
    monkeypatch.setattr(api, "IMPLEMENTATIONS", (("xla", wrong), *right[2:]))
    path = tmp_path / "r.json"
    code, out, err = run(
        capsys, *SIZE, "--ops", "matmul", "--kinds", "W8A16", "--implementation", "xla",
        "--json", str(path),
    )  # fmt: skip
    assert code == 1
    assert "matmul W8A16, 8 rows, exact, xla: error 1.0e-02, allowed 1e-05" in err
    assert not out
    assert not path.exists()


def test_runs_end_to_end_and_goes_on(capsys, tmp_path):
    path = tmp_path / "deep" / "r.json"
    args = (*SIZE, "--ops", "matmul", "--kinds", "W4A16 g128", "--json", str(path))
    code, out, err = run(capsys, *args)
    assert code == 0
    assert "right: matmul" in err
    content = result.read(path)
    assert [row["op"] for row in content["rows"]] == ["bfloat16", "matmul"]
    row = content["rows"][1]
    assert row["kind"] == "W4A16 g128"
    assert (row["n"], row["k"], row["rows"], row["asked"]) == (256, 256, 2, "")
    seconds = row["microseconds"] * 1e-6
    assert row["gigabytes_per_second"] == pytest.approx(
        row["bandwidth_share"] * content["limits"]["bandwidth"] / 1e9, rel=0.01
    )
    assert row["teraflops"] == pytest.approx(2 * 2 * 256 * 256 / seconds / 1e12, rel=0.01)
    ratio = content["rows"][0]["microseconds"] / row["microseconds"]
    assert row["bfloat16_ratio"] == pytest.approx(ratio, rel=0.01)
    assert "| matmul | W4A16 g128 | 256x256 | 2 | " in out
    # Again, with one more kind: what is there is kept.
    run(capsys, *args, "--kinds", "W8A16")
    again = result.read(path)["rows"]
    assert again[:2] == content["rows"]
    assert [r["kind"] for r in again[2:]] == ["W8A16"]


def test_decode_steps_are_measured(capsys, tmp_path):
    path = tmp_path / "r.json"
    code, _, _ = run(
        capsys, "--quick", "--ops", "decode", "--kinds", "W4A16 g128", "--json", str(path)
    )  # fmt: skip
    assert code == 0
    rows = result.read(path)["rows"]
    assert {row["kind"] for row in rows} == {"W4A16 g128", "W4A16 g128, int8 cache"}
    assert {row["rows"] for row in rows} == {1, 4}
    for row in rows:
        each = row["tokens_per_second"] * row["microseconds"] * 1e-6
        assert each == pytest.approx(row["rows"], rel=0.01)


def test_budget_ends_a_run(tmp_path):
    path, said = tmp_path / "r.json", []
    sizes = replace(grid.QUICK, ops=("quantize",), kinds=("int8 token",), rows=(1, 8))
    kernels.run(sizes, path=path, quick=True, budget_seconds=1e-9, say=said.append)
    assert said[-1] == "out of time: run again to go on"
    assert result.read(path)["rows"] == []
    kernels.run(sizes, path=path, quick=True, say=said.append)
    assert len(result.read(path)["rows"]) == 4


def test_a_case_that_fails_does_not_end_the_others(monkeypatch, capsys):
    def failing(case, *args):
        if case.rows == 8:
            raise RuntimeError("out of registers")
        return cases.prepare(case, *args)

    monkeypatch.setattr(kernels, "prepare", failing)
    sizes = ("--shapes", "1x64", "--rows", "2", "--rows", "8", "--rows", "3")
    code, out, err = run(capsys, "--quick", "--ops", "quantize", "--kinds", "int8 token", *sizes)
    assert code == 1
    assert "RuntimeError: out of registers" in err
    assert [line.count("xla") for line in out.splitlines() if "int8 token" in line] == [1, 0, 1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--ops", "matmull"), "'matmull' is none of matmul"),
        (("--kinds", "W5"), "'W5' is none of W4A16 g128"),
        (("--shapes", "256"), "'256' is no shape"),
        (("--implementation", "cuda"), "no implementation 'cuda'; there are: mosaic_gpu, "),
        (("--rows", "0"), "Invalid value for '--rows'"),
    ],
)
def test_bad_options_are_named(args, message, capsys):
    code, _, err = run(capsys, "--quick", *args)
    assert code != 0
    assert message in " ".join(err.replace("│", " ").split())


def test_other_devices_results_are_not_mixed(tmp_path):
    head = {"device": "A", "versions": {"jax": "1"}, "quick": True}
    path = tmp_path / "r.json"
    result.Result.open(path, head).save()
    assert result.Result.open(path, head).rows == []
    with pytest.raises(QjaxError, match=r"r\.json: holds results with device A"):
        result.Result.open(path, head | {"device": "B"})
    for text in ("", "[1]", "{}", json.dumps({"format": 1, "rows": [{}]})):
        path.write_text(text)
        with pytest.raises(QjaxError, match=r"r\.json"):
            result.Result.open(path, head)


def test_peers_are_held_against_the_same_product(tmp_path):
    program = tmp_path / "peer.py"
    program.write_text(
        "import json, sys\n"
        "assert sys.argv[1:] == ['--shape=256x512', '--shape=512x256', '--rows=1', '--rows=8',"
        " '--rows=64']\n"
        "print(json.dumps({'rows': [{'kind': 'int4', 'n': 256, 'k': 512, 'rows': 8,"
        " 'microseconds': 30.0}]}))\n"
    )
    peers = kernels._ask_peer(program, grid.QUICK)
    row = {"op": "matmul", "kind": "W4A16 g32", "n": 256, "k": 512, "rows": 8, "microseconds": 20}
    content = {"peers": peers}
    assert report.peer_ratio(content, row) == 1.5
    assert report.peer_ratio(content, row | {"rows": 1}) is None
    assert report.peer_ratio(content, row | {"kind": "NF4"}) is None
    program.write_text("raise SystemExit('no torch here')")
    assert kernels._ask_peer(program, grid.QUICK) == {"failed": "no torch here"}


def test_measuring_a_model_still_works(capsys, golden):
    model = str(golden / "gguf-Q2_K")
    with pytest.raises(SystemExit, match="0"):
        main(["-m", model, "-p", "4", "-n", "2", "-b", "1", "-r", "1"])
    assert "tg2" in capsys.readouterr().out


def test_named_implementation_is_the_one_that_is_measured():
    for name in ("native", "xla"):
        assert (
            cases.measure(Case("matmul", "W8A16", 256, 64, 2), clock.QUICK, name).implementation
            == name
        )
    assert dispatch.named() is None
