"""The order of implementations, their refusals, and naming one."""

import pytest

from pallas_kernels import dispatch, native


def refusing(x):
    raise NotImplementedError(f"no {x}")


def failing(x):
    raise ValueError("a mistake")


TWO = (("first", lambda x: ("first", x)), ("second", lambda x: ("second", x)))
PICKY = (("picky", refusing), ("easy", lambda x: ("easy", x)))


@pytest.fixture(autouse=True)
def unnamed(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)


def test_first_that_fits_runs_and_is_recorded():
    assert dispatch.call("op a", TWO, 1) == ("first", 1)
    assert dispatch.call("op b", PICKY, 2) == ("easy", 2)
    assert dispatch.chosen()["op a"] == ("first", {})
    assert dispatch.chosen()["op b"] == ("easy", {"picky": "no 2"})


def test_every_reason_is_told_when_none_fits():
    with pytest.raises(NotImplementedError, match=r"op c: .*\(one: no 3; two: no 3\)"):
        dispatch.call("op c", (("one", refusing), ("two", refusing)), 3)
    assert "op c" not in dispatch.chosen()


def test_mistakes_are_not_refusals():
    with pytest.raises(ValueError, match="a mistake"):
        dispatch.call("op", (("bad", failing), ("good", lambda x: x)), 1)


def test_named_implementation_runs_alone():
    assert dispatch.call("op", TWO, 1, implementation="second") == ("second", 1)
    with pytest.raises(NotImplementedError, match="picky: no 1"):
        dispatch.call("op", PICKY, 1, implementation="picky")
    with pytest.raises(ValueError, match="'third'; there are: first, second"):
        dispatch.call("op", TWO, 1, implementation="third")


def test_naming_by_context_and_environment(monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "second")
    assert dispatch.named() == "second"
    assert dispatch.call("op", TWO, 1) == ("second", 1)
    with dispatch.use("first"):
        assert dispatch.call("op", TWO, 1) == ("first", 1)
        with dispatch.use("second"):
            assert dispatch.call("op", TWO, 1) == ("second", 1)
            assert dispatch.call("op", TWO, 1, implementation="first") == ("first", 1)
        assert dispatch.named() == "first"
    assert dispatch.named() == "second"


@pytest.mark.skipif(native.library()[0] is None, reason=native.library()[1])
def test_a_library_of_other_sources_is_not_used(monkeypatch):
    """Its functions may want other arguments, after an update of an editable install."""
    monkeypatch.setattr(native, "digest", lambda: "another")
    library, reason = native.library.__wrapped__()
    assert library is None
    assert "built from other sources; build it again: python -m pallas_kernels" in reason
