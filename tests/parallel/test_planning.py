"""Plans against what is really loaded, and against compiled programs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import qjax
from pallas_kernels.kv_update.pages import Basis
from qjax.engine.device_cache import device_cache
from qjax.engine.engine import BLOCK_SIZE
from qjax.engine.runner import Runner
from qjax.engine.step import Rows, StepSpec
from qjax.key_bases import gains_by_basis
from qjax.kv_cache import CACHE_DTYPES, Batch
from qjax.models.parts import Parts, cache_config
from qjax.planning import plan, planned_collectives
from qjax.planning.memory import Cache, workspace
from qjax.sampler import SamplingRows
from qjax.sharding import local_config
from tests.parallel import cases, hlo

GIB, TOKENS = 1 << 30, 512


def nbytes_of(tree: object) -> set[int]:
    """What each device has of the arrays."""
    found: Counter[int] = Counter()
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            found[shard.device.id] += shard.data.nbytes
    return set(found.values())


def checkpoint(name: str) -> Path:
    folder = cases.GOLDEN / name
    file = folder / "model.gguf"
    return file if file.exists() else folder


@pytest.mark.parametrize(
    ("name", "tensor", "expert"),
    [
        ("base-tiny-gemma3", 4, 1),  # one head of keys and values: copied
        ("base-tiny-phi3", 2, 1),  # joined weights
        ("gptq-4b-g32-desc", 4, 1),  # an order of columns
        ("ct-w4a16-g32-gptq-actorder-weight", 2, 1),
        ("ct-int8-w8a8-dyn-asym", 4, 1),
        ("ct-nvfp4a16", 4, 1),  # two levels of scales; groups are cut
        ("ct-fp8-kv8", 2, 1),
        ("bnb-nf4-dq", 4, 1),
        ("hqq-4b-g64-axis0", 2, 1),
        ("ar-mixed-bits", 2, 1),
        ("fgfp8-block-64-ue8m0", 2, 1),
        ("quark-mxfp4", 4, 1),
        ("gguf-Q4_1", 4, 1),
        ("gguf-deepseek-v2-F32", 2, 1),
        ("gptoss-mxfp4", 1, 2),
        ("ct-qwen3moe-w4a16-g32", 1, 4),
        ("tiny-qwen2moe", 2, 1),
    ],
)
def test_weights(name: str, tensor: int, expert: int) -> None:
    """To the byte, as they are laid out for this machine's kernels."""
    found = plan(
        checkpoint(name),
        tensor_parallel_size=tensor * expert,
        enable_expert_parallel=expert > 1,
        memory=GIB,
    )
    params = cases.split(checkpoint(name), tensor, expert)
    assert nbytes_of(params.tree) == {found.outcome.memory.weights}
    # Headers tell as much of collectives as the weights themselves.
    assert params.mesh is not None
    parallel = Parts(params.mesh, params.config).parallel
    counts = Counter({"all-reduce": 0, "all-gather": 0})
    for each in found.outcome.collectives:
        counts[each.kind] += each.count
    numerics = found.outcome.workload.numerics
    planned = planned_collectives(params.config, params.tree, parallel, numerics=numerics)
    assert counts == planned


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize(("name", "tensor"), [("gguf-Q4_1", 4), ("gguf-deepseek-v2-F32", 2)])
def test_cache(name: str, tensor: int, dtype: str) -> None:
    params = cases.split(checkpoint(name), tensor)
    whole = cache_config(params)
    matrix = jnp.zeros((whole.num_kv_heads, whole.head_dim, whole.head_dim))
    basis = Basis(matrix, matrix) if gains_by_basis(dtype) else None
    cache, _ = device_cache(params, 6, BLOCK_SIZE, dtype, [basis] * whole.num_layers)
    assert params.mesh is not None
    local = local_config(params.config, Parts(params.mesh, params.config).parallel)
    assert nbytes_of(cache) == {Cache.of(local, [dtype] * local.num_layers).nbytes(6)}


def program(params: qjax.Params, spec: StepSpec, numerics: str) -> jax.stages.Compiled:
    """A step of four sequences; in prefill, of `TOKENS` tokens."""
    runner = Runner(
        params, num_blocks=16, block_size=32, max_num_seqs=4, table_width=16, numerics="exact"
    )

    def of(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    row, number = of("int32", 4), of("float32", 4)
    tokens = of("int32", TOKENS if spec.prefill else 4)
    batch = Batch(tokens, of("int32", 5), row, of("int32", 4, 16), numerics=numerics)
    sampling = None
    if not spec.greedy:
        sampling = SamplingRows(of("uint32", 4, 2), number, row, *[number] * 5)
    if spec.full:
        ids, words = of("int32", 4, 16), of("int32", 4, -(-params.config.vocab_size // 32))
        sampling = replace(
            sampling,
            bias_ids=ids,
            bias=of("float32", 4, 16),
            stop_ids=ids,
            min_length=row,
            mask=words,
        )
    rows = Rows(row, of(bool, 4), row, sampling)
    more = (tokens, tokens) if spec.prefill else (None, None)
    count = None if spec.prefill else of("int32")
    return runner._program(spec, [*more, batch, rows, count]).result()


@pytest.mark.parametrize(
    ("name", "tensor", "spec", "numerics", "all_reduce"),
    [
        ("gguf-Q4_1", 4, StepSpec(False, greedy=False), "exact", "float32"),
        ("gptq-4b-g32-desc", 2, StepSpec(False, greedy=False, full=True), "int8", "float32"),
        ("ct-int8-w8a8-dyn-asym", 2, StepSpec(True), "int8", "float32"),
        ("tiny-qwen2moe", 2, StepSpec(True), "int8", "bfloat16"),
        ("gguf-Q4_1", 2, StepSpec(False), "int16", "int8"),
    ],
)
def test_collectives(
    name: str, tensor: int, spec: StepSpec, numerics: str, all_reduce: str
) -> None:
    """Of other steps than those that decode the likeliest tokens in exact numerics."""
    params = replace(cases.split(checkpoint(name), tensor), all_reduce=all_reduce)
    assert params.mesh is not None
    parallel = Parts(params.mesh, params.config, all_reduce).parallel
    compiled = program(params, spec, numerics)
    text = compiled.as_text()
    assert text is not None
    found, _ = hlo.collectives(text)
    planned = planned_collectives(params.config, params.tree, parallel, spec, numerics)
    assert dict(found) == planned
    if spec.prefill:
        # What XLA lays out for it; kernels that make gate, up and product in one go hold less.
        analysis = compiled.memory_analysis()
        assert analysis is not None
        temporary = analysis.temp_size_in_bytes
        work = workspace(local_config(params.config, parallel), 512, 4, TOKENS)
        assert 0.3 * work < temporary < work
