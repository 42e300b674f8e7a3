"""Bases for keys: what they leave as it is, what they make of it, and what that spares a cache."""

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from pallas_kernels import dispatch
from pallas_kernels.kv_update.pages import decode, encode, in_basis, turned
from qjax.engine.engine import Engine
from qjax.key_bases import _basis
from qjax.key_bases import key_bases as find
from qjax.kv_cache import Batch, init_cache
from qjax.models import functional
from tests.programs import forward


@pytest.fixture(scope="module")
def params(golden) -> qjax.Params:
    return qjax.load(golden / "gguf-Q4_1" / "model.gguf")


def moments(random: np.random.Generator, heads: int, size: int) -> np.ndarray:
    """Of vectors that lie mostly along a few directions, [heads, size, size]."""
    turn = np.linalg.qr(random.standard_normal((heads, size, size)))[0]
    return (turn * 2.0 ** -np.arange(size)[None, None] + 0.01 * turn) @ turn.swapaxes(1, 2)


@pytest.mark.parametrize("size", [16, 48, 80])
def test_basis(size):
    """Scores stay; keys and queries become alike, longest along what a zero point keeps."""
    random = np.random.default_rng(size)
    keys, queries = moments(random, 2, size), moments(random, 2, size)
    basis = _basis(keys, queries)
    forth, back = (matrix.astype(np.float64) for matrix in basis)
    unit = forth @ back.swapaxes(1, 2)
    np.testing.assert_allclose(unit, np.broadcast_to(np.eye(size), unit.shape), atol=1e-5)
    of_keys = forth.swapaxes(1, 2) @ keys @ forth
    of_queries = back.swapaxes(1, 2) @ queries @ back
    np.testing.assert_allclose(of_keys, of_queries, atol=1e-5 * np.abs(of_keys).max())
    ones = np.ones(size) / np.sqrt(size)
    longest = np.linalg.eigvalsh(of_keys)[:, -1]
    np.testing.assert_allclose(ones @ of_keys @ ones, longest, rtol=1e-4)


def test_scores_that_rounding_spares():
    """Keys and queries that share a few directions, as those of models do."""
    random = np.random.default_rng(0)
    tokens, size = 512, 64
    keys, queries = (
        np.linalg.cholesky(moments(random, 1, size))[0] @ random.standard_normal((size, tokens))
        for _ in range(2)
    )
    basis = _basis(*((x @ x.T / tokens)[None] for x in (keys, queries)))
    k, q = (jnp.asarray(x.T[:, None], jnp.float32) for x in (keys, queries))
    right = queries.T @ keys

    def error(k, q) -> float:
        cached = np.asarray(decode(encode(k, "int4")), np.float64)
        return np.linalg.norm(np.asarray(q)[:, 0] @ cached[:, 0].T - right) / np.linalg.norm(right)

    plain = error(turned(k), turned(q))
    assert error(in_basis(k, basis.keys), in_basis(q, basis.queries)) < 0.5 * plain


def test_heads_of_the_model(golden):
    """What a layer leaves of its heads is what it caches, once it is rotated."""
    ids = np.load(golden / "gguf-Q4_1" / "reference.npz")["ids_0"]
    tokens, positions = jnp.asarray(ids[:5]), jnp.arange(5, dtype=jnp.int32)
    ends = jnp.array([0, 5], jnp.int32)
    batch = Batch(positions, ends, ends[1:], jnp.zeros((1, 1), jnp.int32))
    with dispatch.use("xla"):  # the others order what is in a page in their own way
        params = qjax.load(golden / "gguf-Q4_1" / "model.gguf")
        config = params.config
        asking = tuple(x._replace(seen=()) for x in init_cache(config, 1, 32, "float32"))
        layers = functional.run(config, params.tree, tokens, batch, asking)[1]
    keys, queries = layers[0].seen
    assert keys.shape == (5, config.num_kv_heads, config.head_dim)
    assert queries.shape == (5, config.num_heads, config.head_dim)
    # The first token stands at position 0, where nothing is rotated.
    np.testing.assert_array_equal(layers[0].keys.values[0, :, 0], keys[0])
    assert np.abs(layers[0].keys.values[0, :, 1] - keys[1]).max() > 1e-3


def test_layers_that_gain(params, golden):
    count = params.config.num_layers
    assert find(params, "int8") == find(params, "bfloat16") == (None,) * count
    assert not params.host.key_bases
    mixed = find(params, ["int4", *["bfloat16"] * (count - 1)])
    assert [basis is not None for basis in mixed] == [True] + [False] * (count - 1)
    again = find(params, "fp8_e4m3")
    assert again[0] is mixed[0]
    assert None not in again
    scaled = qjax.load(golden / "ct-fp8-kv8")
    assert set(find(scaled, "fp8_e4m3")) == {None}


@pytest.mark.parametrize("name", ["base-tiny-gemma3", "tiny-deepseek-v2"])
def test_other_models(golden, name):
    """Sliding windows and norms of heads; latent attention, whose heads are filled with zeros."""
    params = qjax.load(golden / name)
    ids = np.load(golden / name / "reference.npz")["ids_0"]
    exact = np.asarray(forward(params, ids), np.float64)
    bases = find(params, "int4")
    turned, based = (
        np.linalg.norm(forward(params, ids, kv_cache_dtype="int4", key_bases=own) - exact)
        for own in (None, bases)
    )
    assert based < 0.9 * turned
    for basis in bases:
        unit = basis.keys @ basis.queries.swapaxes(1, 2)
        wanted = np.broadcast_to(np.eye(unit.shape[-1]), unit.shape)
        np.testing.assert_allclose(unit, wanted, atol=1e-4)


def test_a_model_that_is_not_finite(golden):
    params = qjax.load(golden / "base-tiny-gemma3")
    weight = params.tree["model"]["layers"]["1"]["input_layernorm"]
    weight["weight"] = weight["weight"].at[0].set(jnp.nan)
    with pytest.raises(qjax.RequestError, match="layer 1 gives keys or queries that are not fini"):
        find(params, "int4")


def test_engine_caches_in_the_basis(params, golden):
    reference = np.load(golden / "gguf-Q4_1" / "reference.npz")
    engine = Engine(params, num_blocks=4, numerics="exact", kv_cache_dtype="int4")
    request = engine.add(tuple(reference["ids_0"].tolist()), qjax.SamplingParams(max_tokens=1))
    while engine.busy:
        engine.step()
    layer = engine.runner._cache[0]
    basis = find(params, "int4")[0]
    np.testing.assert_array_equal(layer.basis.keys, basis.keys)
    logits = forward(
        params, np.array(request.prompt_ids), kv_cache_dtype="int4", key_bases=find(params, "int4")
    )
    assert request.output_ids[0] == int(np.argmax(logits[-1]))
