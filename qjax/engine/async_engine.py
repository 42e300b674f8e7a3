"""An engine in a thread of its own, for callers in event loops: requests come and go as it runs."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Iterable
from contextvars import copy_context
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Literal

from qjax.engine.engine import Engine, matcher_for, peak_memory
from qjax.engine.replicas import Replicas
from qjax.engine.request import GenerationResult, Logprob, Request
from qjax.engine.sampling_params import SamplingParams
from qjax.engine.stats import EngineStats
from qjax.errors import EngineError


@dataclass(frozen=True)
class Delta:
    """What a sequence got since the delta before.

    Attributes:
      text: may be empty, while a character or a stop string may still be in the making.
      token_ids: the new tokens.
      logprobs: of these tokens, if asked, see `GenerationResult`.
      result: with the last one, all of it.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[dict[int, Logprob], ...]
    result: GenerationResult | None


@dataclass(eq=False)
class _Caller:
    """Who waits in an event loop, and for what. The last two fields are of the engine's thread."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    options: dict[str, Any]
    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Delta | Exception] = field(default_factory=asyncio.Queue)
    request: Request | None = None
    num_told: int = 0


class AsyncEngine:
    """Steps an engine in a thread, for as long as there is something to do.

    All calls of the engine are made in that thread, between steps. Methods may be called from any
    number of event loops. Use it in a `with` statement, or `close()` it. Of several processes
    (`qjax.distributed`), it must be the only one that runs the model meanwhile, and no step that
    another thread sent may still be on its way: of several threads, steps may cross.

    Args:
      engine: belongs to this from here on.
    """

    def __init__(self, engine: Engine | Replicas):
        self.engine = engine
        self._calls: SimpleQueue[tuple[Literal["add", "abort"], _Caller] | None] = SimpleQueue()
        self._callers: dict[Request, _Caller] = {}
        self._ended: tuple[str, BaseException | None] | None = None
        self._ending = threading.Lock()  # so that no call is posted that nobody will read
        # What is set in the context, such as a named implementation, holds in the thread, too.
        run = copy_context().run
        self._thread = threading.Thread(target=run, args=(self._run,), name="engine", daemon=True)
        self._thread.start()

    async def stream(
        self,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
        sample: int = 0,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncGenerator[Delta, None]:
        """Runs a prompt, see `Engine.add`. One that is left early, or cancelled, is aborted.

        Raises:
          RequestError: something is out of range.
          EngineError: the engine failed, or was closed.
        """
        options: dict[str, Any]
        options = {"sample": sample, "priority": priority, "cache_salt": cache_salt}
        if params.structured_outputs is not None:
            options["matcher"] = await asyncio.to_thread(matcher_for, self.engine.params, params)
        caller = _Caller(prompt_ids, params, options, asyncio.get_running_loop())
        self._post("add", caller)
        ended = False
        try:
            while not ended:
                found = await caller.queue.get()
                ended = isinstance(found, Exception) or found.result is not None
                if isinstance(found, Exception):
                    raise found
                yield found
        finally:
            if not ended:
                with contextlib.suppress(EngineError):  # then it holds nothing any more
                    self._post("abort", caller)

    async def generate(
        self, prompt_ids: tuple[int, ...], params: SamplingParams, sample: int = 0, **options: Any
    ) -> GenerationResult:
        """`stream`, all at once."""
        result = None
        async for delta in self.stream(prompt_ids, params, sample, **options):
            result = delta.result
        assert result is not None
        return result

    def check(self) -> None:
        """Raises EngineError where no more requests are taken."""
        if self._ended is not None:
            raise self._error()

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        return self.engine.stats()

    def close(self) -> None:
        """Ends the thread after the step that it is in. Who still waits gets an EngineError."""
        self._calls.put(None)
        self._thread.join()

    def __enter__(self) -> "AsyncEngine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _post(self, call: Literal["add", "abort"], caller: _Caller) -> None:
        with self._ending:
            self.check()
            self._calls.put((call, caller))

    def _error(self) -> EngineError:
        assert self._ended is not None
        why, cause = self._ended
        error = EngineError(why)
        error.__cause__ = cause
        return error

    # What follows runs in the thread.

    def _run(self) -> None:
        try:
            while self._answer():
                if self.engine.busy:
                    self._publish(self.engine.step())
            for request in self._callers:
                self.engine.abort(request)
            while self.engine.busy:  # a step that is on the device is read
                self.engine.step()
            self._end("the engine is closed")
        except BaseException as error:
            self._end(f"the engine failed: {type(error).__name__}: {error}", error)

    def _answer(self) -> bool:
        """Makes the calls that have come, or waits for one if there is nothing else to do; whether
        to go on."""
        while True:
            try:
                found = self._calls.get(block=not self.engine.busy)
            except Empty:
                return True
            if found is None:
                return False
            call, caller = found
            if call == "add":
                self._add(caller)
            elif caller.request in self._callers:
                self._abort(caller.request)

    def _add(self, caller: _Caller) -> None:
        try:
            request = self.engine.add(caller.prompt_ids, caller.params, **caller.options)
        except Exception as error:
            self._tell(caller.loop, [(caller, error)])
        else:
            caller.request = request
            self._callers[request] = caller

    def _abort(self, request: Request) -> None:
        del self._callers[request]
        self.engine.abort(request)

    def _publish(self, changed: Iterable[Request]) -> None:
        """Tells each event loop once, all that is new in it."""
        news: dict[asyncio.AbstractEventLoop, list[tuple[_Caller, Delta | Exception]]] = {}
        for request in changed:
            caller = self._callers.get(request)
            if caller is None:
                continue
            new = tuple(request.output_ids[caller.num_told :])
            caller.num_told += len(new)
            result = None
            if request.finish_reason is not None:
                result = request.result(peak_memory())
                del self._callers[request]
            logprobs = tuple(request.logprobs[len(request.output_ids) - len(new) :]) if new else ()
            delta = Delta(request.text.take(), new, logprobs, result)
            news.setdefault(caller.loop, []).append((caller, delta))
        for loop, found in news.items():
            self._tell(loop, found)

    def _tell(
        self, loop: asyncio.AbstractEventLoop, news: list[tuple[_Caller, Delta | Exception]]
    ) -> None:
        def put() -> None:
            for caller, found in news:
                caller.queue.put_nowait(found)

        try:
            loop.call_soon_threadsafe(put)
        except RuntimeError:  # the loop is closed, and nobody waits any more
            for caller, _ in news:
                if caller.request in self._callers:
                    self._abort(caller.request)

    def _end(self, why: str, cause: BaseException | None = None) -> None:
        with self._ending:
            self._ended = why, cause
        left = list(self._callers.values())
        self._callers.clear()
        while not self._calls.empty():
            found = self._calls.get()
            if found is not None and found[0] == "add":
                left.append(found[1])
        for caller in left:
            self._tell(caller.loop, [(caller, self._error())])
