"""Scheduling on the host alone: admission, chunks, preemption, and that no page is lost."""

import random
from collections import Counter

import numpy as np
import pytest

from qjax.engine.block_manager import BlockManager, page_names
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


def request_of(prompt: int | tuple[int, ...], max_tokens: int = 10, **options) -> Request:
    of_request = {k: options.pop(k) for k in ("number", "priority", "cache_salt") if k in options}
    params = SamplingParams(max_tokens=max_tokens, **options)
    return Request(
        prompt_ids=tuple(range(prompt)) if isinstance(prompt, int) else prompt,
        params=params,
        text=OutputText(Silent(), params),
        eos_ids=frozenset(),
        max_tokens=max_tokens,
        key=np.zeros(2, np.uint32),
        **of_request,
    )


def scheduler_of(
    num_blocks: int = 100, seqs: int = 4, tokens: int = 16, **options: bool
) -> Scheduler:
    return Scheduler(
        BlockManager(num_blocks, 4),
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        **options,
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


def test_slots_bound_a_step() -> None:
    scheduler = scheduler_of(seqs=3)
    for _ in range(4):
        scheduler.add(request_of(1))
    assert counts(scheduler.schedule(may_preempt=True)) == (True, (1, 1, 1))
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


def test_block_manager_finds_pages_again() -> None:
    manager = BlockManager(4, 2)
    names = names_of((1, 2, 3, 4, 5))
    blocks: list[int] = []
    assert manager.grow(blocks, 5)
    for block, name in zip(blocks, names, strict=False):
        manager.name(block, name)
    first = list(blocks)
    other: list[int] = []
    assert manager.found([*names, b"?"]) == 2
    manager.share(other, names)
    assert other == first[:2]
    manager.free(blocks)
    assert manager.num_free == 2  # the other one still has them
    manager.free(other)
    assert (manager.num_free, manager.found(names)) == (4, 2)
    # Space that holds nothing goes first, then the end of what was used longest ago.
    assert manager.grow(blocks, 4)
    assert manager.found(names) == 2
    assert manager.grow(blocks, 6)
    assert manager.found(names) == 1
    assert manager.grow(blocks, 8)
    assert manager.found(names) == 0
    assert sorted(blocks) == [0, 1, 2, 3]


def names_of(tokens: tuple[int, ...], salt: str = "") -> list[bytes]:
    names: list[bytes] = []
    page_names(tokens, 2, salt, names)
    return names


def test_names_stand_for_all_tokens_before() -> None:
    names = names_of((1, 2, 3, 4, 5))
    assert len(names) == 2
    assert names_of((9, 2, 3, 4))[1] != names[1]
    assert names_of((1, 2, 3, 4), "other")[0] != names[0]
    page_names((1, 2, 3, 4, 5, 6), 2, "", names)
    assert names == names_of((1, 2, 3, 4, 5, 6))


def test_who_begins_alike_waits_for_the_first_and_shares_its_pages() -> None:
    scheduler = scheduler_of(tokens=100, seqs=8, enable_prefix_caching=True)
    requests = [request_of(11, number=i) for i in range(3)]
    other = request_of((7, 7, 7), number=3)
    for request in (*requests, other):
        scheduler.add(request)
    plan = scheduler.schedule(may_preempt=True)
    assert plan is not None
    assert (plan.requests, plan.counts) == ((requests[0], other), (11, 3))
    plan = scheduler.schedule(may_preempt=True)
    assert plan is not None
    assert (plan.requests, plan.counts) == (tuple(requests[1:]), (3, 3))
    assert [r.num_cached_tokens for r in requests] == [0, 8, 8]
    assert requests[0].blocks[:2] == requests[1].blocks[:2] == requests[2].blocks[:2]
    assert (scheduler.cache_queries, scheduler.cache_hits) == (3 * 11 + 3, 16)


def test_a_whole_prompt_in_the_cache_still_runs_its_last_token() -> None:
    scheduler = scheduler_of(tokens=100, enable_prefix_caching=True)
    for number in range(2):
        scheduler.add(request_of(8, number=number))
    assert counts(scheduler.schedule(may_preempt=True)) == (True, (8,))
    assert counts(scheduler.schedule(may_preempt=True)) == (True, (4,))


def test_salts_share_nothing() -> None:
    scheduler = scheduler_of(tokens=100, enable_prefix_caching=True)
    for number, salt in enumerate(("a", "b")):
        scheduler.add(request_of(8, number=number, cache_salt=salt))
    assert counts(scheduler.schedule(may_preempt=True)) == (True, (8, 8))


def test_prompts_join_those_that_decode() -> None:
    scheduler = scheduler_of(tokens=100, alike=True)
    first, second = request_of(5), request_of(20)
    scheduler.add(first)
    assert counts(scheduler.schedule(may_preempt=True)) == (True, (5,))
    scheduler.add(second)
    plan = scheduler.schedule(may_preempt=True)
    assert plan is not None
    assert (plan.prefill, plan.requests, plan.counts) == (True, (second, first), (20, 1))
    assert counts(scheduler.schedule(may_preempt=True)) == (False, (1, 1))


def test_what_was_generated_is_replayed_by_itself() -> None:
    """Where decode rounds other than prefill does, so must what is computed again."""
    scheduler = scheduler_of(tokens=100)
    request = request_of(6)
    request.output_ids = [1, 2, 3]
    request.restart()
    scheduler.add(request)
    plan = scheduler.schedule(may_preempt=True)
    assert plan is not None
    assert (plan.counts, plan.replays, request.wants_decode) == ((6,), False, False)
    plan = scheduler.schedule(may_preempt=True)
    assert plan is not None
    assert (plan.counts, plan.replays, request.wants_decode) == ((3,), True, True)


def test_priority_goes_before_order() -> None:
    scheduler = scheduler_of(seqs=1)
    low, high = request_of(2, number=0, priority=5), request_of(2, number=1, priority=-1)
    later = request_of(2, number=2, priority=-1)
    for request in (low, later, high):
        scheduler.add(request)
    assert scheduler.waiting == [high, later, low]
    plan = scheduler.schedule(may_preempt=True)
    assert plan is not None
    assert plan.requests == (high,)


@pytest.mark.parametrize("seed", range(40))
def test_random_traffic_ends_and_loses_no_page(seed: int) -> None:
    rng = random.Random(seed)
    alike, caching = rng.random() < 0.5, rng.random() < 0.5
    scheduler = scheduler_of(
        rng.choice([8, 12, 40]), rng.randint(1, 4), alike=alike, enable_prefix_caching=caching
    )
    requests = [
        request_of(rng.randint(1, 20), rng.randint(1, 10), number=i, priority=rng.randint(0, 1))
        for i in range(12)
    ]
    for request in requests:
        scheduler.add(request)
    pending: tuple[Plan, list[bool]] | None = None
    for _ in range(2000):
        plan = scheduler.schedule(may_preempt=pending is None)
        if plan is not None:
            # A page that is written to has one holder.
            held = Counter(block for request in scheduler.running for block in request.blocks)
            for request, count in zip(plan.requests, plan.counts, strict=True):
                start = request.num_computed - count - (plan.steps - 1)
                assert {held[block] for block in request.blocks[start // 4 :]} == {1}
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
