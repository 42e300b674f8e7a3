"""A smaller model that guesses what a larger one will say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from qjax.engine.batch import BLOCK_TABLE_WIDTHS, PREFILL_TOKENS, bucket
from qjax.engine.block_manager import BlockManager
from qjax.engine.request import Request
from qjax.engine.runner import Runner
from qjax.engine.scheduler import Plan
from qjax.errors import RequestError
from qjax.params import Params


@dataclass(eq=False)
class _Shadow:
    """A sequence as the smaller model has it: `cached` are the tokens whose pages are written."""

    request: Request
    cached: tuple[int, ...] = field(default=())


class DraftModel:
    """Guesses by its own greedy or sampled tokens; sampling takes the same random numbers as the
    larger model, so that both often come to the same token.

    Args:
      params: the smaller model. vocab_size: of the larger one.
      max_num_seqs: most sequences that it guesses for; each has pages for its whole length.
      max_model_len: most tokens of a sequence.

    Raises:
      RequestError: the two have other vocabularies.
    """

    def __init__(
        self,
        params: Params,
        vocab_size: int,
        *,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        numerics: str,
        kv_cache_dtype: str,
    ):
        if params.config.vocab_size != vocab_size:
            raise RequestError(
                f"the draft model {params.source} has a vocabulary of {params.config.vocab_size} "
                f"tokens, and this model one of {vocab_size}: take a smaller model of its family."
            )
        limit = min(max_model_len, params.config.max_position_embeddings)
        each = -(-limit // block_size)
        self._limit = limit
        self._blocks = BlockManager(max_num_seqs * each, block_size)
        self._slots = list(range(max_num_seqs))
        self._shadows: dict[Request, _Shadow] = {}
        self._runner = Runner(
            params,
            num_blocks=max_num_seqs * each,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            table_width=bucket(BLOCK_TABLE_WIDTHS, each),
            numerics=numerics,
            kv_cache_dtype=kv_cache_dtype,
        )

    def propose(self, requests: Sequence[Request], most: Sequence[int]) -> list[tuple[int, ...]]:
        """See `qjax.engine.speculation.Proposer`."""
        for ended in [r for r in self._shadows if r.finish_reason is not None]:
            self._drop(ended)
        count = min(most)
        room = [r for r in requests if len(r.known_ids) + count <= self._limit]
        if not room:
            return [()] * len(requests)
        shadows = [self._follow(request, room) for request in room]
        first = self._read_known(shadows)
        drafts = [[token] for token in first]
        if count > 1:
            rows = tuple(shadow.request for shadow in shadows)
            for row in rows:
                row.advance(1, count - 1)
            more = self._run(Plan(False, rows, (1,) * len(rows), count - 1))
            for row, draft in enumerate(drafts):
                draft += more[: count - 1, row].tolist()
        for shadow, draft in zip(shadows, drafts, strict=True):
            shadow.cached = (*shadow.request.known_ids, *draft[:-1])
        found = dict(zip(room, map(tuple, drafts), strict=True))
        return [found.get(request, ()) for request in requests]

    def _follow(self, request: Request, beside: Sequence[Request]) -> _Shadow:
        """The shadow of a sequence, which forgets what was guessed wrong. A new one may take the
        place of a sequence that nobody asks for now."""
        shadow = self._shadows.get(request)
        if shadow is None:
            own = Request(
                prompt_ids=request.prompt_ids,
                params=request.params,
                text=request.text,
                eos_ids=request.eos_ids,
                max_tokens=request.max_tokens,
                key=request.key,
            )
            if not self._slots:
                self._drop(next(each for each in self._shadows if each not in beside))
            own.slot = self._slots.pop()
            shadow = self._shadows[request] = _Shadow(own)
        own, known = shadow.request, request.known_ids
        own.output_ids = list(request.output_ids)
        own.prefill_target = len(known)
        own.num_sampled = len(own.output_ids)
        pairs = enumerate(zip(shadow.cached, known, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(len(shadow.cached), len(known)))
        own.num_computed = min(same, len(known) - 1)
        grown = self._blocks.grow(own.blocks, self._limit)
        assert grown, "each sequence has pages for its whole length"
        return shadow

    def _read_known(self, shadows: list[_Shadow]) -> list[int]:
        """Runs what each does not have yet, in chunks; the tokens that follow."""
        found: dict[Request, int] = {}
        left = [shadow.request for shadow in shadows]
        while left:
            rows: list[Request] = []
            counts: list[int] = []
            for request in left:
                room = PREFILL_TOKENS[2] - sum(counts)
                if room > 0:
                    rows.append(request)
                    counts.append(min(request.prefill_target - request.num_computed, room))
            for request, taken in zip(rows, counts, strict=True):
                request.advance(taken)
            tokens = self._run(Plan(True, tuple(rows), tuple(counts)))
            for row, request in enumerate(rows):
                if not request.wants_prefill:
                    found[request] = int(tokens[0, row])
            left = [request for request in left if request.wants_prefill]
        return [found[shadow.request] for shadow in shadows]

    def _run(self, plan: Plan) -> np.ndarray:
        output = self._runner.run(self._runner.prepare(plan))
        return jax.device_get(output.tokens)

    def _drop(self, request: Request) -> None:
        own = self._shadows.pop(request).request
        self._blocks.free(own.blocks)
        assert own.slot is not None
        self._slots.append(own.slot)
