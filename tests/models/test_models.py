"""Every model type against transformers, and the ways to run one against each other.

The base-* checkpoints are trained, the tiny-* ones random (golden/make_models.py). The references
of both were computed in float32 from weights that bfloat16 holds, and ours are too: they differ by
the order of sums alone, 1e-6 of the norm where this was written.
"""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from qjax import kv_cache
from qjax.checkpoint.loader import load
from qjax.forward import forward
from qjax.kv_cache import Batch
from qjax.models import functional
from qjax.models.config import FULL, SLIDING
from qjax.params import Params
from tests import programs

TOLERANCE = 1e-5

# base-tiny-llama, -gemma3 and -phi3 are compared in tests/checkpoint/test_loader.py.
REFERENCES = (
    "base-tiny-qwen2",
    "base-tiny-qwen3",
    "base-tiny-mixtral",
    "base-tiny-qwen3moe",
    "tiny-qwen2moe",
    "tiny-mistral",
    "tiny-gemma2",
    "tiny-llama-llama3",
    "tiny-llama-yarn",
    "tiny-phi3-longrope",
)


@pytest.fixture(scope="module")
def model(golden):
    return cache(lambda name: load(golden / name))


def reference(golden, name, prompt):
    """(ids, positions, logits at the positions) of a prompt."""
    with np.load(golden / name / "reference.npz") as file:
        ids, logits = file[f"ids_{prompt}"], file[f"logits_{prompt}"]
        return ids, file.get(f"pos_{prompt}", np.arange(len(ids))), logits


def difference(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize("prompt", [0, 1])
@pytest.mark.parametrize("name", REFERENCES)
def test_logits_equal_transformers(model, golden, name, prompt):
    ids, positions, logits = reference(golden, name, prompt)
    ours = programs.forward(model(name), ids)
    assert ours.dtype == jnp.float32
    assert difference(ours[positions], logits) < TOLERANCE


def without_window(config):
    return replace(
        config,
        layer_types=(FULL,) * config.num_layers,
        rope=((FULL, dict(config.rope).get(FULL) or config.rope_for(SLIDING)),),
    )


def normalized(config):
    router = replace(config.moe.router, normalize=True)
    return replace(config, moe=replace(config.moe, router=router))


def with_rope(config, **changes):
    return replace(config, rope=tuple((kind, replace(r, **changes)) for kind, r in config.rope))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tiny-mistral", without_window),
        ("tiny-gemma2", without_window),
        ("tiny-qwen2moe", without_window),
        ("tiny-qwen2moe", normalized),
        ("tiny-gemma2", partial(replace, attn_soft_cap=None)),
        ("tiny-gemma2", partial(replace, final_soft_cap=None)),
        ("tiny-gemma2", partial(replace, embedding_scale=1.0)),
        ("tiny-gemma2", partial(replace, hidden_act="silu")),
        ("tiny-gemma2", partial(replace, query_scale=32**-0.5)),
        ("tiny-llama-llama3", partial(with_rope, rope_type="default")),
        ("tiny-llama-yarn", partial(with_rope, rope_type="default")),
        ("tiny-llama-yarn", partial(with_rope, attention_factor=1.0)),
        ("tiny-phi3-longrope", partial(with_rope, rope_type="default")),
        ("tiny-phi3-longrope", partial(with_rope, attention_factor=1.0)),
        # Bounds of yarn's bands: llama.cpp rounds them in every file, a config.json may say no.
        ("gguf-gptoss-F32", partial(with_rope, truncate=False)),
        ("gptoss-mxfp4", partial(with_rope, truncate=True)),
    ],
)
def test_references_tell_each_feature(model, golden, name, change):
    """A reference that a feature does not move would prove nothing about it."""
    ids, positions, logits = reference(golden, name, 1)
    params = model(name)
    changed = Params(params.tree, change(params.config))
    assert difference(programs.forward(changed, ids)[positions], logits) > 100 * TOLERANCE


@pytest.mark.parametrize("numerics", kv_cache.NUMERICS)
def test_rounded_activations_stay_near(model, golden, numerics):
    """On 4-bit weights: kernels may leave activations whole where weights are plain floats."""
    ids, positions, logits = reference(golden, "gguf-Q4_1", 1)
    error = difference(programs.forward(model("gguf-Q4_1"), ids, numerics)[positions], logits)
    assert error < {"exact": TOLERANCE, "bfloat16": 1e-2, "int16": 1e-4, "int8": 1e-2}[numerics]


@pytest.mark.parametrize("name", ["base-tiny-gemma3", "tiny-phi3-longrope"])
def test_portable_kernels_agree(golden, name, monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "xla")
    ids, positions, logits = reference(golden, name, 1)
    assert difference(forward(load(golden / name), ids)[positions], logits) < TOLERANCE


@pytest.mark.parametrize(("name", "kinds"), [("base-tiny-llama", 1), ("base-tiny-gemma3", 2)])
def test_layers_that_are_alike_are_traced_once(model, name, kinds):
    params = model(name)
    traced = jax.make_jaxpr(forward)(params, jnp.arange(8))
    layers = [e.params["jaxpr"] for e in traced.eqns if e.params.get("name") == "run"]
    assert len(layers) == params.config.num_layers >= 2
    assert len(set(map(id, layers))) == kinds


def test_forward_is_pure(model, golden):
    """Alone, in a batch, under jit and under vmap."""
    params = model("tiny-gemma2")
    ids, _, _ = reference(golden, "tiny-gemma2", 1)
    batch = jnp.stack([jnp.asarray(ids), jnp.asarray(ids[::-1])])
    rows = [forward(params, row) for row in batch]
    assert difference(forward(params, batch), rows) < 1e-6
    assert difference(jax.jit(forward)(params, batch), rows) < 1e-6
    assert difference(jax.vmap(forward, (None, 0))(params, batch), rows) < 1e-6
    prefix = jax.jit(forward, static_argnames="numerics")(params, ids[:20], numerics="exact")
    assert difference(prefix, rows[0][:20]) < 1e-6


@pytest.mark.parametrize("name", ["base-tiny-gemma3", "tiny-gemma2", "tiny-llama-yarn"])
def test_steps_equal_the_whole(model, golden, name):
    """Two sequences through one cache: chunks of a prompt beside single tokens, and padding."""
    params = model(name)
    config, steps = params.config, ((40, 20), (23, 1), (1, 1))
    ids = np.random.default_rng(1).integers(2, config.vocab_size, (2, 64), np.int32)
    sequences = [ids[0], ids[1, :22]]
    whole = [forward(params, ids) for ids in sequences]
    table = np.random.default_rng(0).permutation(8).reshape(2, 4).astype(np.int32)
    cache = kv_cache.init_cache(config, 8, 16, "float32")

    @partial(jax.jit, donate_argnames="cache")
    def step(tree, tokens, batch, cache):
        hidden, cache = functional.run(config, tree, tokens, batch, cache)
        return functional.logits(config, tree, hidden, batch), cache

    done = np.array([0, 0])
    width = max(map(sum, steps)) + 4
    for counts in steps:
        spans = [slice(d, d + n) for d, n in zip(done, counts, strict=True)]
        done = done + counts
        padding = (0, width - sum(counts))
        tokens = np.concatenate([ids[span] for ids, span in zip(sequences, spans, strict=True)])
        positions = np.concatenate([np.arange(span.start, span.stop) for span in spans])
        batch = Batch(
            positions=np.pad(positions, padding).astype(np.int32),
            query_start_loc=np.cumsum([0, *counts], dtype=np.int32),
            seq_lens=done.astype(np.int32),
            block_table=table,
        )
        logits, cache = step(params.tree, np.pad(tokens, padding), batch, cache)
        wanted = np.concatenate([w[span] for w, span in zip(whole, spans, strict=True)])
        assert difference(logits[: sum(counts)], wanted) < 1e-5


def test_some_rows_have_logits(model, golden):
    """A decoder asks for the logits of fewer rows than there are tokens."""
    params = model("tiny-mistral")
    ids, _, logits = reference(golden, "tiny-mistral", 0)
    batch = Batch(
        positions=np.arange(len(ids), dtype=np.int32),
        query_start_loc=np.array([0, len(ids)], np.int32),
        seq_lens=np.array([len(ids)], np.int32),
        block_table=np.zeros((1, 1), np.int32),
    )
    cache = kv_cache.init_cache(params.config, 1, 32, "float32")
    hidden, _ = functional.run(params.config, params.tree, jnp.asarray(ids), batch, cache)
    last = functional.logits(params.config, params.tree, hidden[-1:], batch)
    assert difference(last, logits[-1:]) < TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_size(model, dtype):
    config = model("tiny-gemma2").config
    cache = kv_cache.init_cache(config, 3, 16, dtype)
    size = sum(pages.nbytes for pages in jax.tree.leaves(cache))
    assert size == kv_cache.bytes_per_token(config, dtype) * 3 * 16
