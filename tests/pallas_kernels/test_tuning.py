"""Tables of measurements: what a damaged one says, which entry answers, and what dispatch makes
of it."""

import contextlib
import json
from dataclasses import asdict

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import dispatch, measurements, platform, tuning
from pallas_kernels.matmul import WeightArrays, WeightSpec, matmul
from pallas_kernels.measurements import Measurement, TableError

DEVICE = "Imaginary Device 9000"
FILE = "imaginary-device-9000.json"
KIND = "uint4b8 g128 bfloat16"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QJAX_CACHE", str(tmp_path))
    with platform.assume("gpu", DEVICE):
        yield tmp_path / "tuning"


def measured(implementation="triton", microseconds=10.0, rows=16, n=4096, k=4096, **changed):
    entry = Measurement(
        "matmul", KIND, n, k, rows, implementation, {"block_n": rows}, microseconds, "0.10.2"
    )
    return Measurement(**{**asdict(entry), **changed})


def put(folder, *entries, name=FILE, device=DEVICE):
    measurements.write(folder / name, device, entries)


def blocks(rows, n=4096, k=4096, implementation="triton"):
    return tuning.blocks("matmul", implementation, KIND, rows, n, k)


def preferred(rows, n=4096, k=4096, kind=KIND):
    return tuning.preferred("matmul", kind, rows, n, k)


def test_nothing_without_a_table(folder):
    assert blocks(1) is None
    assert preferred(1) is None
    put(folder, measured())
    assert preferred(1) == "triton"
    with platform.assume("gpu", "Another"):
        assert preferred(1) is None
    with platform.assume("gpu"):
        assert preferred(1) is None


def test_rows_are_an_upper_bound(folder):
    put(folder, measured(rows=1), measured(rows=16), measured(rows=64))
    found = [blocks(r) for r in (1, 2, 16, 17, 64, 5000)]
    assert found == [{"block_n": size} for size in (1, 16, 16, 64, 64, 64)]


def test_fastest_of_a_number_of_rows(folder):
    entries = [measured("triton", 5, 16), measured("xla", 9, 16), measured("tpu", 7, 16)]
    put(folder, *entries, measured("triton", 90, 1024), measured("tpu", 40, 1024))
    assert [preferred(r) for r in (1, 16, 17, 4096)] == ["triton", "triton", *["tpu"] * 2]
    assert blocks(16, implementation="tpu") == {"block_n": 16}
    assert blocks(16, implementation="native") is None


def test_nearest_shape(folder):
    put(
        folder,
        measured("triton", n=4096, k=4096),
        measured("xla", n=4096, k=14336),
        measured("native", kind="int8 channel float32"),
    )
    assert preferred(1, 4096, 5000) == "triton"
    assert preferred(1, 4096, 12000) == "xla"
    assert preferred(1, 4096, 28672) == "xla"
    assert preferred(1, 4096, 28673) is None
    assert preferred(1, 2047, 4096) is None
    assert preferred(1, kind="int8 channel float32") == "native"
    assert preferred(1, kind="nf4") is None


def test_users_own_entries_hold(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "__file__", str(tmp_path / "package" / "tuning.py"))
    put(tmp_path / "package" / "tables", measured("triton", 5), measured("xla", 7))
    assert preferred(1) == "triton"
    put(folder, measured("triton", 9))
    assert preferred(1) == "xla"
    before = tuning.version()
    put(folder, measured("triton", 6), measured("xla", 7, rows=64))
    assert preferred(1) == "triton"
    assert tuning.version() != before


def test_tables_of_the_package_are_sound():
    for path in (tuning.Path(tuning.__file__).parent / "tables").glob("*.json"):
        device = json.loads(path.read_text())["device"]
        assert path.name == measurements.file_name(device)
        assert measurements.read(path, device)


def test_trial_of_block_sizes(folder):
    put(folder, measured())
    with tuning.trying({"block_n": 7}):
        assert blocks(16) == {"block_n": 7}
    assert blocks(16) == {"block_n": 16}


def test_round_trip(folder):
    entries = [measured(rows=r) for r in (64, 16)]
    put(folder, *entries)
    assert measurements.read(folder / FILE, DEVICE) == entries[::-1]
    put(folder, *entries, measured(rows=16, microseconds=3))
    assert [e.microseconds for e in measurements.read(folder / FILE, DEVICE)] == [3, 10]


GOOD = asdict(measured())
DAMAGED = {
    "lacks 'rows'": {k: v for k, v in GOOD.items() if k != "rows"},
    "unknown key 'colour'": GOOD | {"colour": 1},
    "rows is 0": GOOD | {"rows": 0},
    "rows is True": GOOD | {"rows": True},
    "n is '4096'": GOOD | {"n": "4096"},
    "k is 4096.0": GOOD | {"k": 4096.0},
    "op is ''": GOOD | {"op": ""},
    "kind is None": GOOD | {"kind": None},
    "blocks is \\[1\\]": GOOD | {"blocks": [1]},
    "block size 'a' is -1": GOOD | {"blocks": {"a": -1}},
    "microseconds is nan": GOOD | {"microseconds": float("nan")},
    "microseconds is inf": GOOD | {"microseconds": float("inf")},
    "microseconds is 0": GOOD | {"microseconds": 0},
    "entry 1 is 'x'": "x",
}


@pytest.mark.parametrize("message", DAMAGED)
def test_damaged_entry_is_named(folder, message):
    folder.mkdir()
    content = {"version": 1, "device": DEVICE, "entries": [GOOD, DAMAGED[message]]}
    (folder / FILE).write_text(json.dumps(content))
    with pytest.raises(TableError, match=f"{FILE}.*entry 1.*{message.removeprefix('entry 1 ')}"):
        blocks(1)


WHOLE = {"version": 1, "device": DEVICE, "entries": []}
FILES = {
    "Expecting value": "",
    "lacks 'entries'": json.dumps({"version": 1, "device": DEVICE}),
    "version 2": json.dumps(WHOLE | {"version": 2}),
    "of the device 'Other'": json.dumps(WHOLE | {"device": "Other"}),
    "not a list": json.dumps(WHOLE | {"entries": {}}),
    "twice": '{"version": 1, "version": 1}',
    "recursion": "[" * 100_000,
    "it is 3": "3",
}


@pytest.mark.parametrize("message", FILES)
def test_damaged_file_is_named(folder, message):
    folder.mkdir()
    (folder / FILE).write_text(FILES[message])
    with pytest.raises(TableError, match=f"{FILE}.*{message}"):
        preferred(1)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_damage_is_a_table_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / FILE
    measurements.write(path, DEVICE, [measured(rows=r) for r in (1, 16)])
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[at : at + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=3))
        else:
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        if not content:
            break
    path.write_bytes(content)
    with contextlib.suppress(TableError):
        entries = measurements.read(path, DEVICE)
        # What can still be read has values of the right types.
        assert all(e.rows > 0 and e.n > 0 and e.microseconds > 0 for e in entries)


def give(name, refuses=False):
    def implementation():
        if refuses:
            raise NotImplementedError("does not like it")
        return name

    return name, implementation


def test_preferred_is_tried_first():
    order = [give("a"), give("b"), give("c", refuses=True)]
    assert dispatch.call("op", order) == "a"
    assert dispatch.call("op", order, preferred="b") == "b"
    assert dispatch.call("op", order, preferred="c") == "a"
    assert dispatch.call("op", order, preferred="gone") == "a"
    assert dispatch.call("op", order, preferred="a", implementation="b") == "b"
    with pytest.raises(NotImplementedError, match="does not like it"):
        dispatch.call("op", order[2:], preferred="c")


def test_choices_are_watched():
    with dispatch.watch() as seen:
        dispatch.call("one", [give("a")])
        with dispatch.watch() as inner:
            dispatch.call("two", [give("c", refuses=True), give("b")])
        dispatch.call("zero", [give("a")])
        dispatch.call("one", [give("b")])
    dispatch.call("three", [give("a")])
    assert list(seen.items()) == [("zero", ("a", {})), ("one", ("b", {}))]
    assert inner == {"two": ("b", {"c": "does not like it"})}


def test_codes_by_codes_are_a_kind_of_their_own():
    assert tuning.product_kind(KIND, jnp.bfloat16) == KIND
    assert tuning.product_kind("q4_k", jnp.int8) == "q4_k by int8"
    assert tuning.product_kind("q4_k", jnp.float8_e4m3fn) == "q4_k by float8_e4m3fn"


def test_products_run_what_is_fastest(folder):
    spec = WeightSpec("int8", (8, 64), group=(1, 64), scale="float32")
    assert spec.kind == "int8 channel float32"
    arrays = WeightArrays(jnp.ones((8, 64), jnp.uint8), jnp.ones((8, 1), jnp.float32))
    x = np.ones((3, 64), np.float32)

    def ran():
        matmul(jnp.asarray(x), [(spec, arrays)])
        return dispatch.chosen()["matmul int8"][0]

    entry = measured("ref", 1, rows=4, n=8, k=64, kind=spec.kind)
    with platform.assume("cpu", DEVICE):
        assert ran() != "ref"
        put(folder, entry)
        assert ran() == "ref"


def test_kinds_of_weights():
    def kind(*args, **kwargs):
        return WeightSpec(*args, **kwargs).kind

    assert kind("q4_k", (8, 256)) == "q4_k"
    assert kind("uint4b8", (8, 256), group=(1, 128), scale="bfloat16") == KIND
    assert (
        kind("uint4", (8, 256), group=(1, 32), scale="float16", zero_point="uint8")
        == "uint4 g32 float16 zero"
    )
    block = kind("fp8_e4m3", (256, 256), group=(128, 128), scale="float32")
    assert block == "fp8_e4m3 g128x128 float32"
    assert kind("int8", (8, 64), group=(8, 64), scale="float32") == "int8 tensor float32"
