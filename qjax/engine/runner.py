"""Compiled steps, the cache, and what stays on the device between steps."""

import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch, platform
from qjax.engine import batch as batches
from qjax.engine.compile_cache import load_or_compile
from qjax.engine.device_cache import cache_shapes, device_cache, shape_of
from qjax.engine.scheduler import Plan
from qjax.engine.step import (
    Rows,
    State,
    StepOutput,
    StepSpec,
    enter_known,
    state_specs,
    step_program,
    step_results,
)
from qjax.errors import RequestError
from qjax.key_bases import key_bases
from qjax.kv_cache import Batch, cache_dtypes
from qjax.models.config import ModelConfig
from qjax.models.parts import Parts
from qjax.params import Params


@dataclass(frozen=True)
class Numerics:
    """How activations are rounded before products with weights, and what the cache holds."""

    prefill: str
    decode: str
    cache_dtype: str


# On a CPU a prompt is bound by arithmetic, where int8 products pay; decoding few sequences by
# memory, where 16-bit activations cost nothing; decoding many by arithmetic again. The choice
# goes by the most sequences that the engine may run, so that a sequence's tokens do not depend on
# the others. Matrix units of accelerators take bfloat16.
NUMERICS = {
    "fast": Numerics("int8", "int16", "bfloat16"),
    "fast, many": Numerics("int8", "int8", "bfloat16"),
    "fast, accelerator": Numerics("bfloat16", "bfloat16", "bfloat16"),
    "exact": Numerics("exact", "exact", "float32"),
}
FEW = 8

# Programs outlive the runner: a second `generate` with the same model and sizes compiles nothing.
_programs: dict[tuple, Future] = {}
_compilers = ThreadPoolExecutor(2, thread_name_prefix="compile")
_tracing = Lock()


def numerics_for(numerics: str, max_num_seqs: int) -> Numerics:
    """What "fast" or "exact" means on this machine, with so many sequences at most.

    Raises RequestError of another name.
    """
    if numerics not in ("fast", "exact"):
        raise RequestError(f"numerics must be 'fast' or 'exact', got {numerics!r}.")
    if numerics == "fast" and platform.device_kind() != "cpu":
        numerics = "fast, accelerator"
    elif numerics == "fast" and max_num_seqs > FEW:
        numerics = "fast, many"
    return NUMERICS[numerics]


@dataclass(frozen=True)
class Prepared:
    """A step that can be sent to the device as soon as its program is compiled."""

    plan: Plan
    spec: StepSpec
    args: list[Any]
    program: Future[Callable[..., Any]]


class Runner:
    """Runs plans on the device, without waiting for their results.

    Args:
      params: the model.
      num_blocks, block_size: of the paged cache.
      max_num_seqs: number of slots.
      table_width: most pages of one sequence.
      numerics: "fast" or "exact".
      kv_cache_dtype, kv_cache_dtype_skip_layers: see `qjax.generate`.

    Attributes:
      alike: whether a token comes to the same numbers in prefill and in decode.
    """

    def __init__(
        self,
        params: Params,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        table_width: int,
        numerics: str,
        kv_cache_dtype: str = "auto",
        kv_cache_dtype_skip_layers: Sequence[int | str] = (),
    ):
        config = params.config
        self.config: ModelConfig = config
        self.tree: Any = params.tree
        self.num_slots = max_num_seqs
        self.table_width = table_width
        self.compile_seconds: float = 0.0  # time spent waiting for compilers
        self._numerics = numerics_for(numerics, max_num_seqs)
        self.alike: bool = self._numerics.prefill == self._numerics.decode
        dtypes = cache_dtypes(
            config, kv_cache_dtype, self._numerics.cache_dtype, kv_cache_dtype_skip_layers
        )
        self.cache_dtypes: tuple[str, ...] = dtypes
        if not config.kv_scales and any(dtype.startswith("fp8") for dtype in dtypes):
            warnings.warn(
                f"kv_cache_dtype {kv_cache_dtype} without scales from the model takes 1.0, which "
                "may cost accuracy: int8 is closer at about the same size",
                RuntimeWarning,
                stacklevel=2,
            )
        bases = key_bases(params, dtypes, self._numerics.prefill)
        self._cache, self._formats = device_cache(params, num_blocks, block_size, dtypes, bases)
        self._mesh, self._all_reduce = params.mesh, params.all_reduce
        self._state = self._placed(State(last=np.zeros(max_num_seqs, np.int32)))
        self._near: dict[tuple, Future] = {}
        # The batch that the last decode step left on the device, and the plan that it continues.
        self._decoding: tuple[tuple, Batch, Rows] | None = None

    def prepare(self, plan: Plan) -> Prepared:
        """The arrays of a step; its compiling starts in a thread if that is still to be done."""
        spec, *args = self._arguments(plan)
        shapes = tuple(x.shape for x in jax.tree.leaves(args))
        known = spec, plan.replays, shapes
        program = self._near.get(known)
        if program is None:
            program = self._near[known] = self._program(spec, args)
        return Prepared(plan, spec, args, program)

    def run(self, prepared: Prepared) -> StepOutput:
        """Sends a step to the device. Its tokens are on their way when this returns."""
        start = time.perf_counter()
        program = prepared.program.result()
        self.compile_seconds += time.perf_counter() - start
        plan, args = prepared.plan, prepared.args
        output, self._cache, state, following = program(
            self.tree, self._cache, self._state_for(prepared.spec), *args
        )
        self._state = state if prepared.spec.full else replace(self._state, last=state.last)
        self._decoding = None if plan.prefill else (_identity(plan), following, args[-2])
        return output

    def _arguments(self, plan: Plan) -> tuple[StepSpec, Any, Any, Batch, Rows, Any]:
        spec = batches.step_spec(plan)
        if self._decoding is not None and self._decoding[0] == _identity(plan):
            rows = self._decoding[2]
            if any(request.matcher is not None for request in plan.requests):
                mask = batches.make_mask(plan, self.config.vocab_size)
                rows = replace(rows, sampling=replace(rows.sampling, mask=mask))
            return spec, None, None, self._decoding[1], rows, np.int32(plan.steps)
        numerics = self._numerics.prefill
        if not plan.prefill or plan.replays:
            numerics = self._numerics.decode
        # A token comes of the same logits after its prompt and, sent back to wait, after more.
        head = self._numerics.decode
        batch = batches.make_batch(plan, self.table_width, numerics, head)
        sampling = None if spec.greedy else batches.make_rows(plan, spec, self.config.vocab_size)
        rows = Rows(*batches.make_slots(plan, self.num_slots), sampling)
        if not plan.prefill:
            if self._mesh is None:  # it comes again with each step that follows
                rows = jax.device_put(rows)
            return spec, None, None, batch, rows, np.int32(plan.steps)
        if spec.full:
            self._enter_known(plan)
        tokens, targets = batches.make_tokens(plan)
        return spec, tokens, targets if spec.prompt_logprobs else None, batch, rows, None

    def _state_for(self, spec: StepSpec) -> State:
        """What a step of this kind takes of the state; counters are made when first wanted."""
        if not spec.full:
            return State(self._state.last)
        if self._state.counts is None:
            shape = self.num_slots, self.config.vocab_size
            made = self._placed(State(None, np.zeros(shape, bool), np.zeros(shape, np.int32)))
            self._state = replace(self._state, seen=made.seen, counts=made.counts)
        return self._state

    def _enter_known(self, plan: Plan) -> None:
        """Tokens whose pages were found in the cache go by no step that would count them."""
        self._state_for(StepSpec(True, full=True))
        for request, count in zip(plan.requests, plan.counts, strict=True):
            known, slot = request.num_cached, request.slot
            if not known or request.num_computed - count != known or not request.params.penalized:
                continue
            assert slot is not None
            ids, prompt = np.array(request.known_ids[:known]), len(request.prompt_ids)
            seen = np.bincount(ids[:prompt], minlength=self.config.vocab_size) > 0
            counts = np.bincount(ids[prompt:], minlength=self.config.vocab_size)
            state = enter_known(self._state, np.int32(slot), seen, counts.astype(np.int32))
            self._state = state if self._mesh is None else jax.device_put(state, self._split(state))

    def _program(self, spec: StepSpec, args: list[Any]) -> Future:
        state = self._state_for(spec)
        tree, state, *rest = jax.tree.map(shape_of, (self.tree, state, *args))
        structs = tree, cache_shapes(self._cache, self._formats), state, *rest
        leaves, structure = jax.tree.flatten(structs)
        shapes = tuple((x.shape, x.dtype.name) for x in leaves)
        key = self.config, spec, structure, shapes, self._mesh, self._all_reduce, dispatch.named()

        def compile_it() -> jax.stages.Compiled:
            # Tracing holds the interpreter anyway: in turns, the first asked for is first done.
            with _tracing:
                lowered = step_program(self._formats, self._mesh, self._all_reduce).lower(
                    *structs, config=self.config, spec=spec
                )
            return lowered.compile()

        def build() -> jax.stages.Compiled:
            try:
                if self._mesh is not None:  # its devices are not written to disk
                    return compile_it()
                results = step_results(spec, self._cache, state, batch=args[2])
                return load_or_compile(repr(key), (structs, {}), results, compile_it)
            except BaseException:
                del _programs[key]
                raise

        if key not in _programs:
            _programs[key] = _compilers.submit(copy_context().run, build)
        return _programs[key]

    def _placed(self, state: State) -> State:
        """Zeros of its own for a state, where the weights are."""
        if self._mesh is None:
            return jax.device_put(state, may_alias=False)
        zeros = jax.jit(
            lambda: jax.tree.map(jnp.zeros_like, state), out_shardings=self._split(state)
        )
        return zeros()

    def _split(self, state: State) -> Any:
        """Shardings of a state over the mesh."""
        assert self._mesh is not None
        parts = Parts(self._mesh, self.config)
        return parts.placed(state_specs(state, parts))


def _identity(plan: Plan) -> tuple:
    """Equal for two decode plans if the second merely continues the first."""
    return plan.prefill, tuple((request, len(request.blocks)) for request in plan.requests)
