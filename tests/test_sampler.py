"""The sampler against plain numpy in float64 that sorts, where the sampler searches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import sampler
from qjax.sampler import SamplingRows

V = 50

# Compiled whole: run piece by piece, every operation of theirs would be compiled by itself.
greedy = jax.jit(sampler.greedy)
keep_top_k = jax.jit(sampler.keep_top_k)
keep_top_p = jax.jit(sampler.keep_top_p)
keep_min_p = jax.jit(sampler.keep_min_p)
add_bias = jax.jit(sampler.add_bias)
allow = jax.jit(sampler.allow)
penalize = jax.jit(sampler.penalize)
token_logprobs = jax.jit(sampler.token_logprobs, static_argnums=2)


def logits_of(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, V)).astype(np.float32)


def rows_of(count: int, **columns) -> SamplingRows:
    neutral = {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "presence": 0.0,
        "frequency": 0.0,
        "repetition": 1.0,
    }
    arrays = {
        name: jnp.full(count, value, jnp.int32 if name == "top_k" else jnp.float32)
        for name, value in neutral.items()
    }
    key = columns.pop("key", np.arange(2 * count, dtype=np.uint32).reshape(count, 2))
    return SamplingRows(
        key=jnp.asarray(key), **arrays | {k: jnp.asarray(v) for k, v in columns.items()}
    )


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


def kept(x: jax.Array) -> list[set[int]]:
    return [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in np.asarray(x)]


def test_greedy_takes_the_first_of_equals() -> None:
    x = logits_of(3)
    x[1, [7, 20]] = 99
    assert greedy(jnp.asarray(x)).tolist() == x.argmax(-1).tolist()


@pytest.mark.parametrize("k", [1, 3, 49, 50, 99])
def test_top_k_keeps_the_k_largest(k: int) -> None:
    x = logits_of(4)
    found = kept(keep_top_k(x, np.full(4, k, np.int32)))
    assert found == [set(np.argsort(-row)[:k]) for row in x]


def test_top_k_zero_or_less_keeps_all_and_ties_stay() -> None:
    x = np.array([[3.0, 1.0, 2.0, 2.0, -5.0]] * 3, np.float32)
    found = kept(keep_top_k(jnp.asarray(x), jnp.array([0, -1, 2])))
    assert found == [{0, 1, 2, 3, 4}, {0, 1, 2, 3, 4}, {0, 2, 3}]


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p: float) -> None:
    x = logits_of(6)
    expected = []
    for row in x:
        order = np.argsort(-row)
        before = np.cumsum(softmax(row)[order]) - softmax(row)[order]
        expected.append(set(order[before < p]))
    assert kept(keep_top_p(x, np.full(6, p, np.float32))) == expected


@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_large_vocabularies(spread: float) -> None:
    """A flat and a steep distribution: past 128 kept tokens the filters search."""
    x = np.random.default_rng(1).normal(0, spread, (3, 16384)).astype(np.float32)
    order = np.argsort(-x, axis=-1)
    k = np.array([1, 100, 0], np.int32)
    found = kept(keep_top_k(x, k))
    assert found == [set(order[0, :1]), set(order[1, :100]), set(range(16384))]
    k = np.array([128, 129, 5000], np.int32)
    assert kept(keep_top_k(x, k)) == [set(order[i, :n]) for i, n in enumerate(k)]
    p = np.array([0.02, 0.1, 0.5], np.float32)
    for row, share, found in zip(x, p, kept(keep_top_p(x, p)), strict=True):
        mass = softmax(row)
        least = min(mass[list(found)])
        assert found == set(np.flatnonzero(mass >= least))
        assert mass[list(found)].sum() >= share * (1 - 1e-5)
        assert mass[list(found)].sum() - least < share * (1 + 1e-5)
    assert greedy(x).tolist() == x.argmax(-1).tolist()


def test_min_p_keeps_a_share_of_the_largest() -> None:
    x = logits_of(5)
    p = np.array([0.0, 0.01, 0.1, 0.5, 1.0], np.float32)
    expected = [
        set(np.flatnonzero(softmax(row) >= share * softmax(row).max() * (1 - 1e-6)))
        for row, share in zip(x, p, strict=True)
    ]
    assert kept(keep_min_p(x, p)) == expected


def test_filters_follow_each_other() -> None:
    """top_p applies to what top_k left, renormalized, as in vLLM."""
    x = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))
    rows = rows_of(1, top_k=np.array([3], np.int32), top_p=np.array([0.75], np.float32))
    drawn = draw(jnp.asarray(x), rows, 400)
    # 0.4 / 0.9 + 0.3 / 0.9 = 0.78 reaches 0.75; without the renormalization a third were needed.
    assert set(drawn.ravel()) == {0, 1}


def draw(x: jax.Array, rows: SamplingRows, count: int) -> np.ndarray:
    """[count, S] tokens, drawn for as many positions."""
    S = x.shape[0]
    one = jax.jit(jax.vmap(lambda position: sampler.sample(x, rows, jnp.full(S, position))))
    return np.asarray(one(jnp.arange(count)))


def test_frequencies_are_the_probabilities() -> None:
    x = logits_of(1, seed=3)[:, :8]
    temperature = np.array([0.7], np.float32)
    drawn = draw(jnp.asarray(x), rows_of(1, temperature=temperature), 20_000)
    expected = softmax(x[0] / 0.7)
    seen = np.bincount(drawn[:, 0], minlength=8) / len(drawn)
    # Five standard deviations of a binomial share.
    assert np.all(np.abs(seen - expected) <= 5 * np.sqrt(expected * (1 - expected) / len(drawn)))


def test_noise_depends_on_key_and_position_alone() -> None:
    x = jnp.asarray(np.tile(logits_of(1), (4, 1)))
    same = np.array([[1, 2]] * 3 + [[1, 3]], np.uint32)
    drawn = draw(x, rows_of(4, key=same), 64)
    assert (drawn[:, 0] == drawn[:, 1]).all()
    assert (drawn[:, 0] == drawn[:, 2]).all()
    assert (drawn[:, 0] != drawn[:, 3]).any()
    alone = draw(x[:1], rows_of(1, key=same[:1]), 64)
    assert (alone[:, 0] == drawn[:, 0]).all()
    assert len(set(drawn[:, 0])) > 5


def test_cold_rows_are_greedy_beside_warm_ones() -> None:
    x = logits_of(3)
    rows = rows_of(3, temperature=np.array([0.0, 5.0, 1e-30], np.float32))
    drawn = draw(jnp.asarray(x), rows, 32)
    assert (drawn[:, [0, 2]] == x.argmax(-1)[[0, 2]]).all()
    assert len(set(drawn[:, 1])) > 5


def test_penalties() -> None:
    x = logits_of(1)[0]
    prompt, output = [1, 2, 2], [2, 3, 3, 3]
    expected = x.astype(np.float64)
    for token in {*prompt, *output}:
        expected[token] = x[token] / 1.3 if x[token] > 0 else x[token] * 1.3
    for token in set(output):
        expected[token] -= 0.5 + 0.25 * output.count(token)
    seen, counts = np.zeros((1, V), bool), np.zeros((1, V), np.int32)
    seen[0, prompt] = True
    np.add.at(counts[0], output, 1)
    rows = rows_of(
        1,
        presence=np.array([0.5], np.float32),
        frequency=np.array([0.25], np.float32),
        repetition=np.array([1.3], np.float32),
    )
    found = penalize(jnp.asarray(x[None]), rows, jnp.asarray(seen), jnp.asarray(counts))
    np.testing.assert_allclose(found[0], expected, rtol=1e-6, atol=1e-6)


def test_bias_and_early_stops() -> None:
    x = logits_of(2)
    rows = rows_of(
        2,
        bias_ids=np.array([[5, 6, V], [8, 9, V]], np.int32),
        bias=np.array([[100.0, -np.inf, 1.0], [500.0, 510.0, 1.0]], np.float32),
        stop_ids=np.array([[5, V], [9, V]], np.int32),
        min_length=np.array([10, 10], np.int32),
    )
    late = add_bias(jnp.asarray(x), rows, jnp.array([10, 10]))
    assert late[0, 5] == pytest.approx(x[0, 5] + 100)
    assert late[1, 8] == pytest.approx(x[1, 8] + 500)
    assert kept(late) == [set(range(V)) - {6}, set(range(V))]
    early = add_bias(jnp.asarray(x), rows, jnp.array([9, 9]))
    assert kept(early) == [set(range(V)) - {5, 6}, set(range(V)) - {9}]


def test_only_tokens_of_the_mask() -> None:
    x = logits_of(3)
    allowed = np.random.default_rng(1).random((3, 64)) < 0.3
    allowed[2] = True
    mask = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
    found = np.asarray(allow(jnp.asarray(x), jnp.asarray(mask)))
    assert np.array_equal(found, np.where(allowed[:, :V], x, -np.inf))


def test_logprobs() -> None:
    x = logits_of(3)
    tokens = np.array([0, 7, 49])
    found = token_logprobs(jnp.asarray(x), jnp.asarray(tokens), 4)
    expected = np.log(np.stack([softmax(row) for row in x]))
    np.testing.assert_allclose(found.chosen, expected[np.arange(3), tokens], rtol=1e-5)
    order = np.argsort(-x, axis=-1)
    assert found.top_ids.tolist() == order[:, :4].tolist()
    np.testing.assert_allclose(found.top, np.take_along_axis(expected, order[:, :4], 1), rtol=1e-5)
    assert found.rank.tolist() == [
        int(np.flatnonzero(order[i] == token)[0]) + 1 for i, token in enumerate(tokens)
    ]
