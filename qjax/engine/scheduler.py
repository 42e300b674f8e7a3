"""Which sequences run in the next step: prompts first, then one token of everything that runs."""

from collections import deque
from dataclasses import dataclass

from qjax.engine.block_manager import BlockManager
from qjax.engine.request import Request
from qjax.engine.step import DECODE_STEPS

# Logits of whole chunks are large (a row of the vocabulary for each token): such chunks stay small.
PROMPT_LOGPROBS_CHUNK = 64


@dataclass(frozen=True)
class Plan:
    """One step: `counts[i]` tokens of `requests[i]`, either all prefill or all decode.

    Decode takes one token of each request, `steps` times over, each token fed back.
    """

    prefill: bool
    requests: tuple[Request, ...]
    counts: tuple[int, ...]
    steps: int = 1


class Scheduler:
    """Admits, chunks, preempts and releases sequences.

    Args:
      blocks: the pages to lend.
      max_num_seqs: most sequences that run at a time; each has a slot of its own.
      max_num_batched_tokens: most tokens of a prefill step; longer prompts go in chunks.
      max_prefill_seqs: most sequences of a prefill step.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_prefill_seqs: int,
    ):
        self.blocks = blocks
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0
        self._budget = max_num_batched_tokens
        self._rows = max_prefill_seqs
        self._slots = list(range(max_num_seqs - 1, -1, -1))

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self, *, may_preempt: bool) -> Plan | None:
        """The next step, whose tokens are taken as dispatched; None when nothing can run.

        `may_preempt` says that all sampled tokens have been read, so that a sequence may be sent
        back to wait: without it, a full cache gives None.
        """
        plan = self._prefill() or self._decode(may_preempt)
        if plan is not None:
            for request, count in zip(plan.requests, plan.counts, strict=True):
                request.advance(count, plan.steps)
        return plan

    def release(self, request: Request) -> None:
        """Takes back the pages and the slot of a sequence that has ended, wherever it is."""
        queue = self.running if request in self.running else self.waiting
        queue.remove(request)
        self._take_back(request)

    def _prefill(self) -> Plan | None:
        requests: list[Request] = []
        counts: list[int] = []

        def take(request: Request) -> bool:
            """Plans as much of the prompt as fits; whether there is room for another."""
            alone = request.params.prompt_logprobs is not None
            if alone and requests:
                return False
            limit = PROMPT_LOGPROBS_CHUNK if alone else self._budget - sum(counts)
            requests.append(request)
            counts.append(min(request.prefill_target - request.num_computed, limit))
            return not alone and sum(counts) < self._budget and len(requests) < self._rows

        room = all(take(request) for request in self.running if request.wants_prefill)
        while room and self.waiting and self._slots:
            request = self.waiting[0]
            if not self.blocks.grow(request.blocks, request.prefill_target + 1):
                break
            room = take(request)
            if requests[-1] is request:
                self.running.append(self.waiting.popleft())
                request.slot = self._slots.pop()
        return Plan(True, tuple(requests), tuple(counts)) if requests else None

    def _decode(self, may_preempt: bool) -> Plan | None:
        wanting = [r for r in self.running if r.wants_decode]
        # None runs past its max_tokens; and if pages are scarce, one token at a time.
        steps = min([DECODE_STEPS, *(r.max_tokens - r.num_sampled for r in wanting)])
        missing = sum(self.blocks.missing(r.blocks, r.num_computed + steps) for r in wanting)
        if missing > self.blocks.num_free:
            steps = 1
        requests = []
        for request in wanting:
            # An earlier turn of this loop may have sent it back to wait.
            while request in self.running:
                if self.blocks.grow(request.blocks, request.num_computed + steps):
                    requests.append(request)
                    break
                if not may_preempt:
                    return None
                self._preempt(self.running[-1])
        requests = [request for request in requests if request in self.running]
        return Plan(False, tuple(requests), (1,) * len(requests), steps) if requests else None

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._take_back(request)
        request.restart()
        self.waiting.appendleft(request)
        self.num_preemptions += 1

    def _take_back(self, request: Request) -> None:
        self.blocks.free(request.blocks)
        if request.slot is not None:
            self._slots.append(request.slot)
            request.slot = None
