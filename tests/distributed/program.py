"""A program that several processes run together; test_processes.py starts it.

python -m tests.distributed.program ADDRESS COUNT NUMBER MODEL WHAT STEP_TIMEOUT
"""

import asyncio
import json
import os
import sys
import time

import qjax
from qjax import distributed
from qjax.engine.async_engine import AsyncEngine
from tests.distributed.peak import memory


def texts(params):
    """Greedy, sampled without a seed of their own, one cut short, and of a second engine."""
    llm = qjax.LLM(params, seed=7, max_num_seqs=4, max_model_len=96, numerics="exact")
    greedy = llm.generate([[1, 2, 3], [5, 6, 7, 8]], qjax.SamplingParams(max_tokens=20))
    sampled = llm.generate(
        [[9, 10]], qjax.SamplingParams(max_tokens=12, n=2, temperature=1.0, logit_bias={11: 2.0})
    )
    stream = qjax.generate(params, [4, 5, 6], stream=True, max_tokens=40, ignore_eos=True)
    next(stream)
    stream.close()
    return [list(r.token_ids) for r in (*greedy, *sampled[0])]


def threaded(params):
    """Some at the same time, with the engine in a thread."""

    async def at_once(engine):
        sampling = qjax.SamplingParams(max_tokens=20, ignore_eos=True)
        left = engine.stream((1, 2), sampling)
        await anext(left)
        await left.aclose()
        prompts = [(3, 4, last) for last in range(6)]
        return await asyncio.gather(*(engine.generate(ids, sampling) for ids in prompts))

    llm = qjax.LLM(params, max_num_seqs=4, max_model_len=96)
    with AsyncEngine(llm.engine) as engine:
        results = asyncio.run(at_once(engine))
    return [list(r.token_ids) for r in results]


def forever(params):
    """Steps without end; the numbers of finished rounds go out as they come."""
    llm = qjax.LLM(params, seed=7, max_num_seqs=4, max_model_len=96, numerics="exact")
    while True:
        llm.generate([[1, 2, 3]] * 4, qjax.SamplingParams(max_tokens=64, ignore_eos=True))
        print("round", flush=True)


def main(address: str, count: str, number: str, model: str, what: str, step_timeout: str) -> None:
    """`what` begins with "split-" where each process has a part of the model only."""
    meeting = address, int(count), int(number)
    with distributed.initialize(
        *meeting, initialization_timeout=60, step_timeout=float(step_timeout)
    ) as processes:
        print(processes, os.getpid(), flush=True)
        before = memory("VmRSS")
        split = what.startswith("split-")
        params = qjax.load(model, tensor_parallel_size=processes.num_devices if split else None)
        if what == "fail" and processes.process_id == 1:
            raise qjax.CheckpointError("no such thing here")
        if processes.lead(params):
            what = what.removeprefix("split-")
            if what == "memory":
                qjax.generate(params, [1, 2, 3], max_tokens=8, ignore_eos=True)
            elif what in ("texts", "threaded"):
                print(json.dumps({"texts": texts, "threaded": threaded}[what](params)))
            elif what == "idle":
                print("round", flush=True)
                time.sleep(200)
            else:
                forever(params)
    print(
        json.dumps({"before": before, "peak": memory("VmHWM"), "whole": params.nbytes}), flush=True
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
