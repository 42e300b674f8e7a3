"""The engine on several devices: caches, sampling, experts, and one text whatever the mesh."""

from __future__ import annotations

import asyncio
from typing import Any

import jax
import numpy as np
import pytest

import qjax
from qjax import ops
from qjax.engine.async_engine import AsyncEngine
from qjax.engine.replicas import Replicas
from qjax.sharding import make_mesh
from tests.parallel import cases

LLAMA = cases.GOLDEN / "gguf-Q4_1"
EXPERTS = cases.GOLDEN / "ct-qwen3moe-w4a16-g32"


@pytest.mark.parametrize("cache", ["auto", "int8", "int4", "fp8_e4m3"])
@pytest.mark.filterwarnings("ignore:kv_cache_dtype fp8")
def test_caches(cache: str) -> None:
    """Two heads of keys on four devices: each is held twice."""
    sampling = cases.ALL if cache == "auto" else None
    whole = cases.found(qjax.load(LLAMA), sampling, kv_cache_dtype=cache)
    parts = cases.found(cases.split(LLAMA, 4), sampling, kv_cache_dtype=cache)
    if cache == "auto":
        cases.check(whole, parts)
    # A sum in another order may round a key to the next code.
    assert abs(whole.logits - parts.logits).max() < 0.02 * abs(whole.logits).max()


@pytest.mark.parametrize(("expert", "tensor"), [(4, 1), (2, 2), (1, 4)])
def test_experts(expert: int, tensor: int) -> None:
    whole = cases.found(qjax.load(EXPERTS))
    cases.check(whole, cases.found(cases.split(EXPERTS, tensor, expert)))


def test_prompt_logprobs_and_chunks() -> None:
    def run(params: qjax.Params) -> list[Any]:
        engine = qjax.Engine(params, num_blocks=16, numerics="exact", max_num_batched_tokens=64)
        sampling = qjax.SamplingParams(max_tokens=3, prompt_logprobs=2, logprobs=1)
        request = engine.add(tuple(cases.IDS * 4), sampling)
        while engine.busy:
            engine.step()
        return [
            {token: (round(each.logprob, 3), each.rank) for token, each in (entry or {}).items()}
            for entry in [*request.prompt_logprobs, *request.logprobs]
        ]

    assert run(cases.split(LLAMA, 2)) == run(qjax.load(LLAMA))


def test_structured_outputs() -> None:
    """Each device has the mask of its part of the vocabulary."""
    sampling = cases.PLAIN | {"structured_outputs": {"regex": "[a-z]{3}-[0-9]{1,4}é{9}"}}
    whole = cases.found(qjax.load(LLAMA), sampling)
    cases.check(whole, cases.found(cases.split(LLAMA, 4), sampling))


def test_generate() -> None:
    """By default numerics too, which round activations."""
    options: dict[str, Any] = {"max_tokens": 6, "temperature": 0.7, "seed": 1}
    params = qjax.load(LLAMA, tensor_parallel_size=2)
    texts = qjax.generate(params, ["Once upon a time", "The sea"], **options)
    assert [len(text.token_ids) for text in texts] == [6, 6]
    assert params.mesh is not None
    assert params.nbytes >= qjax.load(LLAMA).nbytes


def test_what_does_not_divide() -> None:
    with pytest.raises(qjax.ShardingError, match=r"4 attention heads .* over 8 devices: 1, 2, 4"):
        qjax.load(LLAMA, tensor_parallel_size=8)
    with pytest.raises(qjax.ShardingError, match="takes 16 devices, and there are 8"):
        make_mesh(16)
    with pytest.raises(qjax.ShardingError, match=r"o_proj\.weight: 256 inputs in blocks of 256"):
        qjax.load(cases.GOLDEN / "gguf-Q2_K", tensor_parallel_size=2)
    with pytest.raises(qjax.RequestError, match="not both"):
        qjax.load(LLAMA, tensor_parallel_size=2, mesh=make_mesh(2))


def test_copies() -> None:
    """Two copies on two devices each: every prompt has the answer it has alone."""
    prompts = [cases.IDS[:n] for n in (5, 9, 13, 17)]
    options: dict[str, Any] = {"max_tokens": 5, "numerics": "exact", "ignore_eos": True}
    alone = qjax.generate(qjax.load(LLAMA), prompts, **options)
    llm = qjax.LLM(LLAMA, tensor_parallel_size=2, data_parallel_size=2, numerics="exact")
    found = llm.generate(prompts, qjax.SamplingParams(max_tokens=5, ignore_eos=True))
    assert [each.token_ids for each in found] == [each.token_ids for each in alone]
    assert isinstance(llm.engine, Replicas)
    meshes = [engine.params.mesh for engine in llm.engine.engines]
    one, other = [set() if mesh is None else set(mesh.devices.flat) for mesh in meshes]
    assert len(one) == len(other) == 2
    assert not one & other
    sampled = qjax.SamplingParams(max_tokens=8, temperature=1.0, n=2, ignore_eos=True)
    (texts,) = llm.generate([prompts[0]], sampled)
    assert texts[0].token_ids != texts[1].token_ids

    async def at_once(engine: AsyncEngine) -> list[qjax.GenerationResult]:
        greedy = qjax.SamplingParams(max_tokens=5, ignore_eos=True)
        left = engine.stream(
            tuple(prompts[0]), qjax.SamplingParams(max_tokens=200, ignore_eos=True)
        )
        await anext(left)
        await left.aclose()
        return await asyncio.gather(*(engine.generate(tuple(prompt), greedy) for prompt in prompts))

    with AsyncEngine(llm.engine) as engine:
        found = asyncio.run(at_once(engine))
    assert [each.token_ids for each in found] == [each.token_ids for each in alone]
    assert not llm.engine.busy


@pytest.mark.parametrize(
    ("sent", "least", "most"),
    [("bfloat16", 1e-8, 1e-4), ("int8", 1e-8, 1e-3), ("fp8_e4m3", 1e-8, 1e-2)],
)
def test_rounded_sums(sent: str, least: float, most: float) -> None:
    """What is sent in fewer bits costs a little, in Kullback-Leibler divergence."""

    def logprobs(params: qjax.Params) -> np.ndarray:
        return np.asarray(jax.nn.log_softmax(jax.jit(qjax.forward)(params, np.array(cases.IDS))))

    whole = logprobs(qjax.load(LLAMA))
    parts = logprobs(qjax.load(LLAMA, tensor_parallel_size=4, all_reduce=sent))
    divergence = (np.exp(whole) * (whole - parts)).sum(-1).mean()
    assert least < divergence < most
    with pytest.raises(qjax.RequestError, match=r"all_reduce must be .*, got 'int3'"):
        qjax.load(LLAMA, all_reduce="int3")


def test_what_takes_whole_models() -> None:
    """A weight in pieces is never taken for a whole one."""
    params = cases.split(LLAMA, 2)
    weight = params.tree["model"]["layers"]["0"]["mlp"]["down_proj"]["weight"]
    for use in (ops.unprepare, qjax.QArray.dequantize):
        with pytest.raises(ValueError, match="lies in pieces on several devices"):
            use(weight)
    with pytest.raises(qjax.UnsupportedError, match="load it without a mesh"):
        qjax.oneshot(params, "W4A16")
