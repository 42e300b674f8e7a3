"""The built-in models against torch on the same weights dequantized to float32.

`golden/real_logits.md` says how the references were made.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import pytest

import qjax
from qjax.checkpoint import builtin
from qjax.params import Params

REFERENCES = {"smollm2-135m": "real_logits_smollm2.npz", "gemma3-270m": "real_logits_gemma3.npz"}


@pytest.fixture(scope="module", params=REFERENCES)
def name(request: pytest.FixtureRequest) -> str:
    path = builtin.cached_path(request.param)
    if not path.is_file():
        pytest.skip(f"{path} is not there: `qjax pull {request.param}` fetches it")
    return request.param


@pytest.fixture(scope="module")
def params(name: str) -> Params:
    return qjax.load(name)


@pytest.fixture(scope="module")
def reference(name: str, golden: Path) -> Mapping[str, np.ndarray]:
    with np.load(golden / REFERENCES[name]) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("length", [8, 120, 1500])
def test_exact_logits(params: Params, reference: Mapping[str, np.ndarray], length: int):
    ids, positions = reference[f"ids_{length}"], reference[f"pos_{length}"]
    logits = np.asarray(jax.jit(qjax.forward)(params, ids)[positions], np.float64)

    top_ids = reference[f"top_ids_{length}"]
    found = np.hstack([logits[:, reference["subset"]], np.take_along_axis(logits, top_ids, 1)])
    expected = np.hstack([reference[f"logits_{length}"], reference[f"top_logits_{length}"]])
    error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() <= 1e-4

    np.testing.assert_array_equal(logits.argmax(1), top_ids[:, 0])
    # What the chosen tokens do not show would show here.
    logsumexp = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    np.testing.assert_allclose(logsumexp, reference[f"logsumexp_{length}"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("length", [8, 120])
def test_exact_greedy(params: Params, reference: Mapping[str, np.ndarray], length: int):
    ids, expected = reference[f"ids_{length}"], reference[f"greedy_{length}"]
    assert reference[f"margin_{length}"].min() > 1e-3  # no near tie excuses another token

    result = qjax.generate(
        params, ids.tolist(), numerics="exact", max_tokens=len(expected), ignore_eos=True
    )
    assert list(result.token_ids) == expected.tolist()
