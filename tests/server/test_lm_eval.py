"""lm-eval's own client of completions, unchanged."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from tests.server.conftest import MAX_MODEL_LEN, NAME, Running

pytestmark = pytest.mark.peer


@pytest.fixture(scope="module", params=["token ids", "texts"])
def lm(running: Running, golden: Path, request: pytest.FixtureRequest) -> Any:
    from lm_eval.models.openai_completions import (  # pyright: ignore[reportMissingImports]
        LocalCompletionsAPI,
    )

    return LocalCompletionsAPI(
        base_url=f"{running.url}/v1/completions",
        model=NAME,
        tokenizer=str(golden / "base-tiny-llama"),
        tokenized_requests=request.param == "token ids",
        batch_size=3,
        max_length=MAX_MODEL_LEN,
    )


def instance(kind: str, *arguments: Any) -> Any:
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    return Instance(kind, {}, arguments, 0)


def test_loglikelihood(lm: Any, params: qjax.Params, golden: Path) -> None:
    """In float64, of logits without any cache or batch; and which continuations are greedy ones."""
    tokenizer = params.tokenizer
    pairs = [("class Foo", "(object):"), ("import", " os"), ("def f(x):\n    return", " x")]
    greedy = qjax.generate(params, "import numpy", max_tokens=4, numerics="exact")
    pairs.append(("import numpy", greedy.text))
    found = lm.loglikelihood([instance("loglikelihood", *pair) for pair in pairs])
    for (context, continuation), (total, is_greedy) in zip(pairs, found, strict=True):
        ids = tokenizer.encode(context + continuation)
        start = len(tokenizer.encode(context))
        logits = np.asarray(qjax.forward(params, jnp.array([ids]), numerics="exact"))[0]
        exact = logits.astype(np.float64)
        exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
        rows, targets = exact[start - 1 : -1], ids[start:]
        assert total == pytest.approx(
            sum(r[t] for r, t in zip(rows, targets, strict=True)), abs=1e-3
        )
        assert is_greedy == (rows.argmax(-1).tolist() == targets)
    assert found[-1][1]


def test_generate_until(lm: Any, golden: Path) -> None:
    """What transformers wrote after the same tokens, up to the stop string."""
    from tokenizers import Tokenizer

    reference = np.load(golden / "base-tiny-llama" / "reference.npz")
    tokenizer = Tokenizer.from_file(str(golden / "base-tiny-llama" / "tokenizer.json"))
    prompt, text = (tokenizer.decode(reference[name].tolist()) for name in ("ids_0", "greedy_0"))
    assert tokenizer.encode(prompt).ids == reference["ids_0"].tolist()
    stop = text[12:15]
    options = {"until": [stop], "max_gen_toks": 32}
    (found,) = lm.generate_until([instance("generate_until", prompt, options)])
    assert found == text[: text.index(stop)]
