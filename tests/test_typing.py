"""The types that users of qjax see, as pyright reads them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import qjax

ROOT = Path(__file__).parent.parent
# Of all modules. What is left are mostly Flax modules, whose classes pyright cannot see through.
LEAST_COMPLETE = 0.93


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    command = [sys.executable, "-m", "pyright", "--verifytypes", "qjax", "--ignoreexternal"]
    done = subprocess.run(
        [*command, "--outputjson", "--pythonpath", sys.executable],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout)["typeCompleteness"]


def test_public_names_have_known_types(report: dict[str, Any]) -> None:
    homes = {f"{qjax._HOMES[name]}.{name}" for name in qjax.__all__}
    pattern = re.compile(rf"qjax\.\w+|({'|'.join(map(re.escape, homes))})(\.\w+)*")
    symbols = [each for each in report["symbols"] if pattern.fullmatch(each["name"])]
    assert {f"qjax.{name}" for name in qjax.__all__} <= {each["name"] for each in symbols}
    unclear = {
        each["name"]: [found["message"] for found in each["diagnostics"]]
        for each in symbols
        if not each["isTypeKnown"] or each["isTypeAmbiguous"]
    }
    assert unclear == {}


def test_most_of_the_rest_has_too(report: dict[str, Any]) -> None:
    assert report["completenessScore"] >= LEAST_COMPLETE
