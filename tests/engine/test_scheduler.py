"""Scheduling on the host alone: admission, chunks, preemption, and that no page is lost."""

import random

import numpy as np
import pytest

from qjax.engine.block_manager import BlockManager
from qjax.engine.request import OutputText, Request
from qjax.engine.sampling_params import SamplingParams
from qjax.engine.scheduler import Plan, Scheduler


class Silent:
    def stream(self, skip_special_tokens: bool = True) -> "Silent":
        return self

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def request_of(prompt: int, max_tokens: int = 10, **sampling) -> Request:
    params = SamplingParams(max_tokens=max_tokens, **sampling)
    return Request(
        prompt_ids=tuple(range(prompt)),
        params=params,
        text=OutputText(Silent(), params),
        eos_ids=frozenset(),
        max_tokens=max_tokens,
        key=np.zeros(2, np.uint32),
    )


def scheduler_of(num_blocks: int = 100, seqs: int = 4, tokens: int = 16, rows: int = 4):
    return Scheduler(
        BlockManager(num_blocks, 4),
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_prefill_seqs=rows,
    )


def counts(plan: Plan | None) -> tuple[bool, tuple[int, ...]]:
    assert plan is not None
    return plan.prefill, plan.counts


def test_block_manager_lends_and_takes_back() -> None:
    manager = BlockManager(3, 4)
    blocks: list[int] = []
    assert manager.grow(blocks, 5)
    assert (len(blocks), manager.num_free) == (2, 1)
    assert not manager.grow(blocks, 13)
    assert (len(blocks), manager.num_free) == (2, 1)
    manager.free(blocks)
    assert (blocks, manager.num_free) == ([], 3)


def test_prompts_share_a_step_and_long_ones_are_cut() -> None:
    scheduler = scheduler_of()
    for length in (5, 20, 3):
        scheduler.add(request_of(length))
    assert counts(scheduler.schedule(may_preempt=True)) == (True, (5, 11))
    assert counts(scheduler.schedule(may_preempt=True)) == (True, (9, 3))
    assert counts(scheduler.schedule(may_preempt=True)) == (False, (1, 1, 1))


def test_rows_and_slots_bound_a_step() -> None:
    scheduler = scheduler_of(seqs=3, rows=2)
    for _ in range(4):
        scheduler.add(request_of(1))
    assert counts(scheduler.schedule(may_preempt=True)) == (True, (1, 1))
    assert counts(scheduler.schedule(may_preempt=True)) == (True, (1,))
    assert counts(scheduler.schedule(may_preempt=True)) == (False, (1, 1, 1))
    assert {request.slot for request in scheduler.running} == {0, 1, 2}
    scheduler.release(scheduler.running[1])
    assert counts(scheduler.schedule(may_preempt=True)) == (True, (1,))


def test_prompt_logprobs_run_alone() -> None:
    scheduler = scheduler_of(tokens=100)
    for request in (request_of(2), request_of(70, prompt_logprobs=1), request_of(3)):
        scheduler.add(request)
    assert counts(scheduler.schedule(may_preempt=True)) == (True, (2,))
    assert counts(scheduler.schedule(may_preempt=True)) == (True, (64,))
    assert counts(scheduler.schedule(may_preempt=True)) == (True, (6,))
    assert counts(scheduler.schedule(may_preempt=True)) == (True, (3,))


def test_a_full_cache_sends_the_youngest_back() -> None:
    scheduler = scheduler_of(num_blocks=4)
    old, young = request_of(7), request_of(3)
    scheduler.add(old)
    scheduler.add(young)
    assert counts(scheduler.schedule(may_preempt=False)) == (True, (7, 3))
    assert counts(scheduler.schedule(may_preempt=False)) == (False, (1, 1))
    for request in (old, young):
        request.receive(9, 0.0)
        request.receive(9, 0.0)
    # Tokens 9 and 5 want a third and a second page: three are lent, one is left.
    assert scheduler.schedule(may_preempt=False) is None
    assert counts(scheduler.schedule(may_preempt=True)) == (False, (1,))
    assert scheduler.num_preemptions == 1
    assert list(scheduler.waiting) == [young]
    assert (young.blocks, young.slot, young.prefill_target) == ([], None, 5)


@pytest.mark.parametrize("seed", range(20))
def test_random_traffic_ends_and_loses_no_page(seed: int) -> None:
    rng = random.Random(seed)
    scheduler = scheduler_of(num_blocks=rng.choice([8, 12, 40]), seqs=rng.randint(1, 4))
    requests = [request_of(rng.randint(1, 20), rng.randint(1, 10)) for _ in range(12)]
    for request in requests:
        scheduler.add(request)
    pending: tuple[Plan, list[bool]] | None = None
    for _ in range(2000):
        plan = scheduler.schedule(may_preempt=pending is None)
        if plan is not None:
            held = [block for request in scheduler.running for block in request.blocks]
            assert len(held) == len(set(held))
            for request in plan.requests:
                assert len(request.blocks) * 4 >= request.num_computed
        if pending is not None:
            for request, emit in zip(pending[0].requests, pending[1], strict=True):
                for _ in range(pending[0].steps):
                    if emit and request.finish_reason is None:
                        request.receive(1, 0.0)
                        if request.finish_reason is not None:
                            scheduler.release(request)
        pending = plan and (plan, [not request.wants_prefill for request in plan.requests])
        if plan is None and not scheduler.running and not scheduler.waiting:
            break
    assert [len(r.output_ids) for r in requests] == [r.max_tokens for r in requests]
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks
