"""What a split model is compared by: the same model on one device."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import qjax
from qjax.sharding import make_mesh

GOLDEN = Path(__file__).parents[1] / "golden"
IDS = (np.arange(5, 42) * 7 % 199 + 3).tolist()


class Found(NamedTuple):
    """Attributes:
    logits: float32 [T, V].
    tokens: of a greedy and of a sampled request.
    logprobs: of the tokens of the second, and the ids of its likeliest ones.
    """

    logits: np.ndarray
    tokens: list[list[int]]
    logprobs: list[tuple[float, list[int]]]


def split(source: Any, tensor: int = 1, expert: int = 1, **options: Any) -> qjax.Params:
    return qjax.load(source, mesh=make_mesh(tensor, expert=expert), **options)


PLAIN = {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 7}
ALL = PLAIN | {
    "min_p": 0.01,
    "logprobs": 3,
    "repetition_penalty": 1.2,
    "frequency_penalty": 0.1,
    "min_tokens": 8,
    "logit_bias": {17: 2.0, 90: 1.0},
}


def found(params: qjax.Params, sampling: Any = None, **options: Any) -> Found:
    """What a model says in exact numerics; by the engine too, with one greedy request and one that
    is sampled so, if `sampling` is given."""
    cache = options.get("kv_cache_dtype", "auto")
    bases = qjax.key_bases(params, "int4") if cache == "int4" else None
    forward = jax.jit(lambda p, ids: qjax.forward(p, ids, kv_cache_dtype=cache, key_bases=bases))
    ids = [token % params.config.vocab_size for token in IDS]
    logits = np.asarray(forward(params, np.array(ids)))
    if sampling is None or not has_tokenizer(params):
        return Found(logits, [], [])
    engine = qjax.Engine(params, num_blocks=16, numerics="exact", **options)
    greedy = qjax.SamplingParams(max_tokens=9, ignore_eos=True)
    sampled = qjax.SamplingParams(max_tokens=9, **sampling)
    requests = [engine.add(tuple(ids), greedy), engine.add(tuple(ids[:11]), sampled)]
    while engine.busy:
        engine.step()
    tokens = [list(request.output_ids) for request in requests]
    pairs = zip(tokens[1], requests[1].logprobs, strict=False)
    return Found(logits, tokens, [(entry[token].logprob, list(entry)) for token, entry in pairs])


def has_tokenizer(params: qjax.Params) -> bool:
    try:
        return params.tokenizer is not None
    except qjax.CheckpointError:
        return False


def rounds_inputs(params: qjax.Params) -> bool:
    """Whether inputs of any weight are rounded."""
    leaves = jax.tree.leaves(params.tree, is_leaf=lambda node: isinstance(node, qjax.QArray))
    return any(isinstance(leaf, qjax.QArray) and leaf.act is not None for leaf in leaves)


def check(whole: Found, parts: Found) -> None:
    np.testing.assert_allclose(
        parts.logits, whole.logits, rtol=0, atol=1e-5 * np.abs(whole.logits).max()
    )
    assert parts.tokens == whole.tokens
    for (one, ids), (other, same) in zip(whole.logprobs, parts.logprobs, strict=True):
        assert abs(one - other) < 1e-4
        assert ids == same


def check_rounded(whole: Found, parts: Found) -> None:
    """Of models that round inputs: a sum in another order may tip one to the next code, which many
    tokens see. Where none is tipped, nothing may differ."""
    apart = np.abs(parts.logits - whole.logits).max(-1) / np.abs(whole.logits).max()
    assert apart.max() <= 0.02
    assert (apart <= 1e-5).sum() >= 5
    if apart.max() <= 1e-5:
        check(whole, parts)
