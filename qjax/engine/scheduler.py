"""Which sequences run in the next step, with how many tokens each."""

from bisect import insort_left, insort_right
from dataclasses import dataclass, field

from qjax.engine.block_manager import BlockManager, page_names
from qjax.engine.request import Request
from qjax.engine.step import DECODE_STEPS

# Logits of whole chunks are large (a row of the vocabulary for each token): such chunks stay small.
PROMPT_LOGPROBS_CHUNK = 64

# Most tokens of a step that prompts share with sequences which wait for their next token; more
# where there are many of these.
MIXED_TOKENS = 512


@dataclass(frozen=True)
class Plan:
    """One step: `counts[i]` tokens of `requests[i]`.

    Prefill takes tokens that are known here, beside, in a mixed step, one of each sequence that
    decodes. Decode takes one token of each request, `steps` times over, each token fed back.

    Attributes:
      replays: the tokens of a prefill step were generated before; the numerics are those of decode.
      checks: of each request one token and those of its `draft`; each gets the token that follows.
    """

    prefill: bool
    requests: tuple[Request, ...]
    counts: tuple[int, ...]
    steps: int = 1
    replays: bool = False
    checks: bool = False


class Scheduler:
    """Admits, chunks, preempts and releases sequences: by priority, then first come, first served.

    Args:
      blocks: the pages to lend.
      max_num_seqs: most sequences that run at a time; each has a slot of its own.
      max_num_batched_tokens: most tokens of a prefill step; longer prompts go in chunks.
      alike: whether prefill and decode compute alike. Then one step may do both, and pages of
        generated tokens are found again as those of prompts are. Otherwise a chunk has either
        tokens of the prompt or generated ones.
      enable_prefix_caching: whether sequences that begin alike share pages.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        alike: bool = False,
        enable_prefix_caching: bool = False,
    ):
        self.blocks = blocks
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_preemptions: int = 0
        self.cache_queries: int = 0  # tokens that were looked for in the cache, and found
        self.cache_hits: int = 0
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self._alike = alike
        self._caching = enable_prefix_caching
        self._slots = list(range(max_num_seqs - 1, -1, -1))

    def add(self, request: Request) -> None:
        insort_right(self.waiting, request, key=_turn)

    def schedule(self, *, may_preempt: bool) -> Plan | None:
        """The next step, whose tokens are taken as dispatched; None when nothing can run.

        `may_preempt` says that all sampled tokens have been read, so that a sequence may be sent
        back to wait: without it, a full cache gives None.
        """
        plan = self._prefill() or self._decode(may_preempt)
        if plan is not None:
            for request, count in zip(plan.requests, plan.counts, strict=True):
                request.advance(count, plan.steps)
                self.name_pages(request)
        return plan

    def name_pages(self, request: Request) -> None:
        """Names the pages that are full of tokens known here and sent through the model."""
        length = len(request.prompt_ids) + (len(request.output_ids) if self._alike else 0)
        full = min(length, request.num_computed) // self.blocks.block_size
        if self._caching and full > request.num_named:
            names = self._names(request)
            for i in range(request.num_named, full):
                self.blocks.name(request.blocks[i], names[i])
            request.num_named = full

    def release(self, request: Request) -> None:
        """Takes back the pages and the slot of a sequence that has ended, wherever it is."""
        queue = self.running if request in self.running else self.waiting
        queue.remove(request)
        self._take_back(request)

    def _prefill(self) -> Plan | None:
        decoding = [r for r in self.running if r.wants_decode] if self._alike else []
        if not all(self.blocks.grow(r.blocks, r.num_computed + 1) for r in decoding):
            return None  # pages are scarce: those that run go first
        budget = self.max_num_batched_tokens
        if decoding:
            budget = min(budget, max(MIXED_TOKENS, 4 * len(decoding)))
        room = _Room(max(1, budget - len(decoding)))
        promised: set[bytes] = set()  # names of pages that are being filled
        for request in self.running:
            if request.wants_prefill:
                promised.update(request.page_names)
                room.take(request, *self._chunk(request))
        for request in list(self.waiting) if self._slots else ():
            if not self._slots or not room.fits(request, replays=False):
                break
            if self._awaits(request, promised):
                continue
            if not self._lend(request):
                break
            self.waiting.remove(request)
            self.running.append(request)
            request.slot = self._slots.pop()
            promised.update(request.page_names)
            room.take(request, *self._chunk(request))
        if not room.requests:
            return None
        if not room.alone:
            room.requests += decoding
            room.counts += [1] * len(decoding)
        return Plan(True, tuple(room.requests), tuple(room.counts), replays=room.replays)

    def _chunk(self, request: Request) -> tuple[int, bool]:
        """(where its next chunk has to end, whether that has generated tokens only)."""
        prompt = len(request.prompt_ids)
        if self._alike or request.num_computed < prompt < request.prefill_target:
            return request.prefill_target if self._alike else prompt, False
        return request.prefill_target, request.num_computed >= prompt

    def _lend(self, request: Request) -> bool:
        """Lends the pages of all that is known of a sequence; False if too few are free."""
        names = self._sharable(request)
        names = names[: self.blocks.found(names)]
        self.blocks.share(request.blocks, names)
        if not self.blocks.grow(request.blocks, request.prefill_target + 1):
            self.blocks.free(request.blocks)
            return False
        self.cache_queries += request.prefill_target if self._caching else 0
        self.cache_hits += len(names) * self.blocks.block_size
        request.found(len(names) * self.blocks.block_size)
        request.num_named = len(names)
        return True

    def _awaits(self, request: Request, promised: set[bytes]) -> bool:
        """Whether a page that it needs is being filled, so that the next step will find it."""
        names = self._sharable(request)
        return any(name in promised for name in names[self.blocks.found(names) :][:1])

    def _sharable(self, request: Request) -> list[bytes]:
        """Names of the pages that it may share: not the last token's, whose logits are wanted."""
        if not self._caching or request.params.prompt_logprobs is not None:
            return []
        known = request.prefill_target if self._alike else len(request.prompt_ids)
        return self._names(request)[: (known - 1) // self.blocks.block_size]

    def _names(self, request: Request) -> list[bytes]:
        """Of all full pages of tokens that are known and may be found again."""
        tokens = request.known_ids if self._alike else request.prompt_ids
        page_names(tokens, self.blocks.block_size, request.cache_salt, request.page_names)
        return request.page_names

    def _decode(self, may_preempt: bool) -> Plan | None:
        wanting = [r for r in self.running if r.wants_decode]
        # None runs past its max_tokens; and if pages are scarce, one token at a time.
        steps = min([DECODE_STEPS, *(r.max_tokens - r.num_sampled for r in wanting)])
        checks = any(r.draft for r in wanting)
        # What may come in a form depends on the token before.
        steps = 1 if checks or any(r.matcher is not None for r in wanting) else steps
        ends = [r.num_computed + steps + len(r.draft) for r in wanting]
        missing = map(self.blocks.missing, (r.blocks for r in wanting), ends)
        if sum(missing) > self.blocks.num_free:
            steps, checks = 1, False
            for request in wanting:
                request.draft = ()
        requests = []
        for request in wanting:
            # An earlier turn of this loop may have sent it back to wait.
            while request in self.running:
                if self.blocks.grow(
                    request.blocks, request.num_computed + steps + len(request.draft)
                ):
                    requests.append(request)
                    break
                if not may_preempt:
                    return None
                self._preempt(max(reversed(self.running), key=_turn))
        requests = [request for request in requests if request in self.running]
        if not requests:
            return None
        counts = tuple(1 + len(request.draft) for request in requests)
        return Plan(checks, tuple(requests), counts, steps, replays=checks, checks=checks)

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._take_back(request)
        request.restart()
        insort_left(self.waiting, request, key=_turn)
        self.num_preemptions += 1

    def _take_back(self, request: Request) -> None:
        self.name_pages(request)
        self.blocks.free(request.blocks)
        if request.slot is not None:
            self._slots.append(request.slot)
            request.slot = None


@dataclass
class _Room:
    """What a prefill step has, and what it may still take."""

    tokens: int
    requests: list[Request] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    replays: bool = False
    alone: bool = False

    def fits(self, request: Request, replays: bool) -> bool:
        """Whether at least one token of a sequence may go in."""
        if not self.requests:
            return True
        same = replays == self.replays and request.params.prompt_logprobs is None and not self.alone
        return same and self.tokens > 0

    def take(self, request: Request, end: int, replays: bool) -> None:
        """Takes the next chunk of a sequence, up to its token `end`, if it fits."""
        if not self.fits(request, replays):
            return
        self.replays = replays
        self.alone = request.params.prompt_logprobs is not None
        limit = min(self.tokens, PROMPT_LOGPROBS_CHUNK) if self.alone else self.tokens
        count = min(end - request.num_computed, limit)
        self.requests.append(request)
        self.counts.append(count)
        self.tokens -= count


def _turn(request: Request) -> tuple[int, int]:
    return request.priority, request.number
