"""`qjax plan`: what it prints, and sizes as people write them."""

import json

import pytest

from qjax.cli import sizes
from qjax.errors import RequestError
from tests.cli.conftest import Run


def test_report(model: str, run: Run) -> None:
    code, out, _ = run("plan", model, "-tp", "4", "--device", "L4", "--max-model-len", "0.2k")
    assert code == 0
    for text in (
        "4 x L4: --tensor-parallel-size 4",
        "32 sequences of 200 tokens",
        "\nfits ",
        "all-reduce, down_proj ",
        "\ndecode           32       32       100 ",
        "warning: keys and values: 2 heads for 4 devices",
    ):
        assert text in out


def test_what_does_not_fit(model: str, run: Run) -> None:
    """Weights of 0.9 MB, as much of cache and a workspace of 8.2 MB on one device."""
    args = ("--memory", "9MB", "--max-model-len", "200", "--max-num-seqs", "4")
    code, out, _ = run("plan", model, *args)
    assert code == 0
    assert "does not fit  room for 0 sequences" in out
    assert "it would fit on 2: --tensor-parallel-size 2" in out


def test_json(model: str, run: Run) -> None:
    figures = ("--memory", "24GB", "--bandwidth", "300GB", "--peak", "121t", "--link", "32GB")
    code, out, _ = run("plan", model, "--devices", "2", *figures, "--latency", "10", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["device"]["latency"] == pytest.approx(1e-5)
    assert found["device"]["link"] == 32e9
    outcomes = [found["outcome"], *found["others"]]
    assert {each["split"]["flags"] for each in outcomes} == {
        "--tensor-parallel-size 2",
        "--tensor-parallel-size 1 --data-parallel-size 2",
    }
    for each in outcomes:
        memory = each["memory"]
        assert memory["total"] == memory["weights"] + memory["cache"] + memory["workspace"]
        assert memory["fits"]
        assert [row["phase"] for row in each["speeds"]][:2] == ["prefill", "decode"]


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("-tp", "3", "--memory", "1GB"), "4 attention heads cannot be split over 3 devices"),
        (("--memory", "much"), "--memory 'much' is no size: write it as 80GiB"),
        (("--memory", "1GB", "--max-model-len", "1GB"), "--max-model-len '1GB' is no size"),
        (("--bandwidth", "1TB"), "--link and --memory and --peak too, or --device"),
        (("--device", "abacus"), "'abacus' is not in the table: A100-40GB"),
    ],
)
def test_errors(model: str, args: tuple[str, ...], text: str, run: Run) -> None:
    code, _, err = run("plan", model, *args)
    assert code == 1
    assert text in err
    assert err.count("\n") == 1


def test_sizes() -> None:
    """Without a unit as vLLM reads them."""
    for text, number in {
        "32k": 32_000,
        "32K": 32_768,
        "1.5k": 1500,
        "512": 512,
        "1M": 1 << 20,
    }.items():
        assert sizes.tokens(text, "--max-model-len") == number
    for text, number in {
        "80GiB": 80 << 30,
        "80GB": 80 * 10**9,
        "80 G": 80 << 30,
        "1.5TB": 1_500_000_000_000,
        "1000000": 1_000_000,
    }.items():
        assert sizes.nbytes(text, "--memory") == number
    for text in ("", "k", "-1", "1.5", "1e9", "0", "1kk", "1.5K5"):
        with pytest.raises(RequestError, match="is no size"):
            sizes.tokens(text, "--max-model-len")
