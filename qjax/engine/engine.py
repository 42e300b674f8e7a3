"""The loop: plan a step, send it to the device, and meanwhile read the step before it."""

import resource
import secrets
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import numpy as np

from qjax.engine.batch import BLOCK_TABLE_WIDTHS, bucket
from qjax.engine.block_manager import BlockManager
from qjax.engine.draft_model import DraftModel
from qjax.engine.grammar import Matcher, grammars
from qjax.engine.request import Logprob, OutputText, Request
from qjax.engine.runner import Runner
from qjax.engine.sampling_params import SamplingParams
from qjax.engine.scheduler import Plan, Scheduler
from qjax.engine.speculation import PromptLookup, SpeculativeConfig, Speculator
from qjax.engine.stats import EngineStats
from qjax.engine.step import StepOutput
from qjax.engine.structured_outputs import StructuredOutputs
from qjax.errors import RequestError
from qjax.params import Params
from qjax.sampler import TokenLogprobs

BLOCK_SIZE = 32


@dataclass(frozen=True)
class _Sent:
    """A step on the device, as things stood when it was sent: `ends[i]` tokens of `requests[i]`
    went in so far, and `emits[i]` says whether it gets a token."""

    plan: Plan
    ends: list[int]
    emits: list[bool]
    output: StepOutput

    @property
    def decides_masks(self) -> bool:
        """Whether what may come in the next step depends on the tokens of this one."""
        pairs = zip(self.plan.requests, self.emits, strict=True)
        return any(emits and request.matcher is not None for request, emits in pairs)


class Engine:
    """Continuous batching: sequences join and leave between steps.

    Args:
      params: a loaded model.
      num_blocks: pages of the cache, `block_size` tokens each.
      max_num_seqs: most sequences that run at a time.
      max_model_len: most tokens of a sequence, prompt and output; None for the model's own limit.
      max_num_batched_tokens: longer prompts are cut into chunks of this many tokens.
      enable_prefix_caching: whether sequences that begin alike share pages of the cache, as long as
        they are not needed for something else.
      numerics, kv_cache_dtype, kv_cache_dtype_skip_layers: see `qjax.generate`.
      speculative: how to guess tokens ahead, see `qjax.engine.speculation`; None does not.
      seed: makes what requests without a seed of their own get repeatable, as long as they come in
        the same order; None draws a fresh one.

    An engine is deterministic: the same calls, in the same order, come to the same tokens.

    Attributes:
      journal: of all engines: told of each call before it is carried out, as (engine, "make",
        keywords), (engine, "add", prompt_ids, params, keywords), (engine, "step", digest) or
        (engine, "abort", number of the request); None where nobody asks.
      digest: of the tokens that came so far, to compare with another engine's.

    Raises:
      RequestError: an argument is out of range.
    """

    journal: ClassVar[Callable[..., None] | None] = None

    def __init__(
        self,
        params: Params,
        *,
        num_blocks: int,
        block_size: int = BLOCK_SIZE,
        max_num_seqs: int = 32,
        max_model_len: int | None = None,
        max_num_batched_tokens: int = 2048,
        enable_prefix_caching: bool = True,
        numerics: str = "fast",
        kv_cache_dtype: str = "auto",
        kv_cache_dtype_skip_layers: Sequence[int | str] = (),
        speculative: SpeculativeConfig | None = None,
        seed: int | None = None,
    ):
        self.params = params
        seed = SamplingParams(seed=seed).seed
        if seed is None:
            seed = secrets.randbits(64)
        self._record(
            "make",
            {
                "num_blocks": num_blocks,
                "block_size": block_size,
                "max_num_seqs": max_num_seqs,
                "max_model_len": max_model_len,
                "max_num_batched_tokens": max_num_batched_tokens,
                "enable_prefix_caching": enable_prefix_caching,
                "numerics": numerics,
                "kv_cache_dtype": kv_cache_dtype,
                "kv_cache_dtype_skip_layers": list(kv_cache_dtype_skip_layers),
                "speculative": None if speculative is None else speculative.as_dict(),
                "seed": seed,
            },
        )
        self.digest: int = 0
        self._added = 0
        self._seeds = np.random.SeedSequence(seed)
        self.max_model_len: int = model_len(params, max_model_len)
        self._eos_ids = eos_ids(params)
        widest = min(num_blocks, -(-self.max_model_len // block_size))
        self.runner: Runner = Runner(
            params,
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            table_width=bucket(BLOCK_TABLE_WIDTHS, widest),
            numerics=numerics,
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_dtype_skip_layers=kv_cache_dtype_skip_layers,
        )
        self.scheduler: Scheduler = Scheduler(
            BlockManager(num_blocks, block_size),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            alike=self.runner.alike,
            enable_prefix_caching=enable_prefix_caching,
        )
        self._speculator = self._speculator_of(speculative, numerics, kv_cache_dtype)
        self._pending: _Sent | None = None
        self._prompt_tokens = self._generation_tokens = 0

    def add(
        self,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
        sample: int = 0,
        *,
        priority: int = 0,
        cache_salt: str = "",
        matcher: Matcher | None = None,
    ) -> Request:
        """Queues a prompt.

        Args:
          sample: tells the n samples of one prompt apart.
          priority: lower ones run earlier; of the same one, first come, first served.
          cache_salt: only sequences of the same salt share pages of the cache.
          matcher: of the structured outputs, from `matcher_for`, where that was called elsewhere,
            since it may take long.

        Raises:
          RequestError: the prompt is empty or too long, a token id is not in the vocabulary, or
            structured outputs cannot be followed.
          UnsupportedError: they need llguidance, which is not installed.
        """
        check_request(prompt_ids, params, self.params, self.max_model_len)
        room = self.max_model_len - len(prompt_ids)
        max_tokens = min(room, params.max_tokens or room)
        blocks = self.scheduler.blocks
        if blocks.blocks_for(len(prompt_ids) + max_tokens) > blocks.num_blocks:
            held = blocks.num_blocks * blocks.block_size
            raise RequestError(
                f"prompt of {len(prompt_ids)} tokens and max_tokens of {max_tokens} do not fit "
                f"the cache, which holds {held} tokens: shorten them or make the cache larger."
            )
        matcher = matcher or matcher_for(self.params, params)
        told = {"sample": sample, "priority": priority, "cache_salt": cache_salt}
        self._record("add", prompt_ids, params, told)
        if params.seed is None:
            seeds = self._seeds.spawn(1)[0]
        else:
            seeds = np.random.SeedSequence([params.seed, sample])
        request = Request(
            prompt_ids=tuple(prompt_ids),
            params=params,
            text=OutputText(self.params.tokenizer, params),
            eos_ids=self._eos_ids,
            max_tokens=max_tokens,
            key=seeds.generate_state(2),
            number=self._added,
            priority=priority,
            cache_salt=cache_salt,
            matcher=matcher,
        )
        self._added += 1
        self.scheduler.add(request)
        return request

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running or self._pending)

    def step(self) -> list[Request]:
        """Sends one step to the device and reads the one before.

        Returns:
          The requests that got a token; the finished ones have a `finish_reason`.
        """
        self._record("step", self.digest)
        changed = self._speculate()
        if self._pending is not None and self._pending.decides_masks:
            changed += self._read()
        plan = self.scheduler.schedule(may_preempt=self._pending is None)
        if plan is None:
            return changed + self._read()
        prepared = self.runner.prepare(plan)
        if plan.prefill and (then := [r for r in plan.requests if r.wants_decode]):
            # What follows compiles while this runs.
            self.runner.prepare(Plan(False, tuple(then), (1,) * len(then)))
        if not prepared.program.done():
            # Hand out what there is before waiting for the compiler.
            changed += self._read()
        output = self.runner.run(prepared)
        now = self._clock()
        for request in plan.requests:
            request.started = request.started or now
        changed += self._read()
        ends = [request.num_computed for request in plan.requests]
        emits = [not request.wants_prefill for request in plan.requests]
        self._pending = _Sent(plan, ends, emits, output)
        return changed

    def abort(self, request: Request) -> None:
        """Ends a request early; its pages are free at once."""
        if request.finish_reason is None:
            self._record("abort", request.number)
            request.finish("abort")
            self.scheduler.release(request)

    def stats(self) -> EngineStats:
        """How things stand. May be called from any thread."""
        scheduler = self.scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_blocks=scheduler.blocks.num_blocks,
            num_free_blocks=scheduler.blocks.num_free,
            num_preemptions=scheduler.num_preemptions,
            prefix_cache_queries=scheduler.cache_queries,
            prefix_cache_hits=scheduler.cache_hits,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
        )

    def _speculator_of(
        self, config: SpeculativeConfig | None, numerics: str, kv_cache_dtype: str
    ) -> Speculator | None:
        if config is None:
            return None
        if config.model is None:
            lookup = PromptLookup(config.prompt_lookup_max, config.prompt_lookup_min)
            return Speculator(config, lookup)
        if Engine.journal is not None:
            raise RequestError(
                "a draft model runs in one process: with several, take the method 'ngram'."
            )
        draft = DraftModel(
            config.model,
            self.params.config.vocab_size,
            block_size=self.scheduler.blocks.block_size,
            max_num_seqs=config.disable_by_batch_size,
            max_model_len=self.max_model_len,
            numerics=numerics,
            kv_cache_dtype=kv_cache_dtype,
        )
        return Speculator(config, draft)

    def _speculate(self) -> list[Request]:
        """Guesses for what runs, where that may pay. Guesses go by the newest tokens, so these are
        read first; returns the requests that got them."""
        scheduler = self.scheduler
        waits = scheduler.waiting and len(scheduler.running) < scheduler.max_num_seqs
        if self._speculator is None or waits or not self._speculator.wants(scheduler.running):
            return []
        changed = self._read()
        if self._speculator.wants(scheduler.running):
            self._speculator.propose(scheduler.running)
        return changed

    def _accepted(self, request: Request, tokens: np.ndarray) -> np.ndarray:
        """Of the tokens that follow those which went in, the ones that follow what is right."""
        draft = np.array(request.draft, np.int32)
        right = int(np.cumprod(tokens[: len(draft)] == draft).sum())
        if self._speculator is not None and len(draft):
            self._speculator.checked(request, right)
        request.accept(right)
        return tokens[: right + 1]

    def _record(self, call: str, *arguments: Any) -> None:
        if Engine.journal is not None:
            Engine.journal(self, call, *arguments)

    def _clock(self) -> float:
        return time.perf_counter() - self.runner.compile_seconds

    def _read(self) -> list[Request]:
        """Waits for the pending step and hands out its tokens."""
        if self._pending is None:
            return []
        sent, self._pending = self._pending, None
        plan, output = sent.plan, sent.output
        tokens, logprobs, prompt_logprobs = jax.device_get(
            (output.tokens, output.logprobs, output.prompt_logprobs)
        )
        if plan.checks:
            columns = np.split(tokens[0], np.cumsum(plan.counts))[:-1]
        else:
            columns = list(tokens[: plan.steps, : len(plan.requests)].T)
        self.digest = zlib.crc32(b"".join(column.tobytes() for column in columns), self.digest)
        now = self._clock()
        changed = []
        for row, request in enumerate(plan.requests):
            if request.finish_reason is not None:
                continue  # its end was seen only after this step had been sent
            if request.params.prompt_logprobs is not None and prompt_logprobs is not None:
                self._add_prompt_logprobs(request, prompt_logprobs, sent.ends[0] - plan.counts[0])
            if not sent.emits[row]:
                continue
            changed.append(request)
            if not request.output_ids:
                self._prompt_tokens += len(request.prompt_ids)
            before = len(request.output_ids)
            column = self._accepted(request, columns[row]) if plan.checks else columns[row]
            for step, token in enumerate(column.tolist()):
                if request.params.logprobs is not None:
                    found = jax.tree.map(lambda x, i=step: x[i], logprobs)
                    request.logprobs.append(self._entry(found, row, token, request.params.logprobs))
                request.receive(token, now)
                if request.finish_reason is not None:
                    self.scheduler.release(request)
                    break
            self._generation_tokens += len(request.output_ids) - before
        return changed

    def _add_prompt_logprobs(self, request: Request, found: TokenLogprobs, start: int) -> None:
        """`found` is of the tokens after position `start`; such a request is alone in its step."""
        done = request.prompt_logprobs
        # One that was sent back to wait comes again with tokens whose logprobs are here already.
        for position in range(len(done), min(len(request.prompt_ids), start + len(found.rank) + 1)):
            token = request.prompt_ids[position]
            k = request.params.prompt_logprobs or 0
            done.append(self._entry(found, position - start - 1, token, k))

    def _entry(self, found: TokenLogprobs, row: int, token: int, k: int) -> dict[int, Logprob]:
        """{token: Logprob}: the token itself and the k likeliest ones."""
        decode = self.params.tokenizer.decode
        chosen = [(token, float(found.chosen[row]), int(found.rank[row]))]
        others = [(int(found.top_ids[row, i]), float(found.top[row, i]), i + 1) for i in range(k)]
        entry: dict[int, Logprob] = {}
        for other, logprob, rank in chosen + others:
            if other not in entry:
                text = decode([other], skip_special_tokens=False)
                entry[other] = Logprob(logprob, rank, text)
        return entry


def model_len(params: Params, asked: int | None) -> int:
    """The most tokens of a sequence: what was asked for, at most what the model was made for."""
    limit = params.config.max_position_embeddings
    if asked is not None and not 1 <= asked <= limit:
        raise RequestError(f"max_model_len must be in [1, {limit}], got {asked}.")
    return asked or limit


def matcher_for(model: Params, params: SamplingParams) -> Matcher | None:
    """What holds a new text to the form that is asked for; None where none is.

    Slow once for a model and for each form, and then quick; may be called from any thread.

    Raises:
      RequestError: the form is faulty or too large.
      UnsupportedError: llguidance is not installed.
    """
    if params.structured_outputs is None:
        return None
    assert isinstance(params.structured_outputs, StructuredOutputs)
    found = grammars(model.tokenizer, model.config.vocab_size, eos_ids(model))
    return found.matcher(params.structured_outputs)


def eos_ids(params: Params) -> frozenset[int]:
    """End-of-sequence tokens by the tokenizer and by generation_config.json."""
    more = (params.generation_config or {}).get("eos_token_id")
    more = [] if more is None else [more] if isinstance(more, int) else more
    return frozenset(params.tokenizer.eos_ids) | frozenset(more)


def check_request(
    prompt_ids: tuple[int, ...], params: SamplingParams, model: Params, max_model_len: int
) -> None:
    """Raises RequestError for what SamplingParams alone cannot know to be wrong."""
    vocab_size = model.config.vocab_size
    if not prompt_ids:
        raise RequestError("prompt is empty: give at least one token.")
    if len(prompt_ids) >= max_model_len:
        raise RequestError(
            f"prompt has {len(prompt_ids)} tokens, but the context holds {max_model_len} with at "
            f"least one token to generate: shorten the prompt to {max_model_len - 1} tokens."
        )
    named = {
        "prompt": prompt_ids,
        "stop_token_ids": params.stop_token_ids,
        "allowed_token_ids": params.allowed_token_ids or (),
        "logit_bias": params.logit_bias or (),
    }
    for name, ids in named.items():
        for token in ids:
            if not 0 <= token < vocab_size:
                raise RequestError(
                    f"{name} has token id {token}, but ids must be in [0, {vocab_size})."
                )


def peak_memory() -> int:
    """Most resident memory of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
