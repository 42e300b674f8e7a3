"""`qjax recommend`: what it prints."""

import json

import pytest

from tests.cli.conftest import Run


def test_report(model: str, run: Run) -> None:
    args = ("--device", "H100", "--memory", "1GB", "--max-model-len", "64", "--devices", "1")
    code, out, _ = run("recommend", model, *args)
    assert code == 0
    for text in (
        "hardware      1 x H100 (Hopper), 1.00 GB each, 3,350 GB/s",
        "work          1 sequences of 64 tokens",
        "\ntake          ",
        "qjax serve ",
        "with prompts",
        "\nleft out\n",
        "note: speeds: the roofline of H100 by the shares of it that kernels reached on NVIDIA H",
        "launching its kernels takes longer",
    ):
        assert text in out


def test_json(model: str, run: Run) -> None:
    args = ("--device", "TPU-v5e", "--max-model-len", "64", "--goal", "size", "--json")
    code, out, _ = run("recommend", model, *args, "--tolerance", "inf")
    found = json.loads(out)
    assert code == 0
    assert (found["goal"], found["tolerance"], found["speeds_from"]) == ("size", None, None)
    assert found["hardware"]["multiplies"] == ["int8"]
    assert found["best"]["memory"]["weights"] > 0
    assert found["best"]["commands"][-1].startswith("qjax serve ")


def test_nothing_fits(model: str, run: Run) -> None:
    options = ("--device", "L4", "--memory", "1MB", "--max-model-len", "64")
    code, out, _ = run("recommend", model, *options)
    assert code == 1
    assert "Nothing fits. Closest is " in out
    assert "MB too much." in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--memory", "lots"), "--memory 'lots' is no size"),
        (("--device", "H1000"), "device 'H1000' is not in the table"),
        (("--results", "/nowhere.json"), "/nowhere.json"),
    ],
)
def test_mistakes(model: str, run: Run, args: tuple[str, ...], message: str) -> None:
    code, _, err = run("recommend", model, *args)
    assert code == 1
    assert message in err
    assert len(err.splitlines()) == 1
