"""The sequences of one request: they start together, are read as one stream, and end together."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from types import TracebackType

from qjax.engine.async_engine import Delta
from qjax.engine.request import GenerationResult
from qjax.engine.sampling_params import SamplingParams
from qjax.errors import EngineError
from qjax.server.errors import ApiError, invalid
from qjax.server.prompts import too_long
from qjax.server.service import Model, Service

# Deltas that may wait for a client that reads more slowly than the model writes.
_BACKLOG = 256


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a request asks of the engine.

    Attributes:
      prompts: token ids; each gets `params.n` sequences, which are numbered one prompt after the
        other.
      priority, cache_salt: see `Engine.add`.
    """

    prompts: tuple[tuple[int, ...], ...]
    params: SamplingParams
    priority: int = 0
    cache_salt: str = ""

    def check(self, model: Model, param: str) -> None:
        """Raises ApiError for what the model has no room for; `param` is the prompts' field."""
        vocab_size, max_model_len = model.params.config.vocab_size, model.max_model_len
        for name in ("logit_bias", "allowed_token_ids"):
            count = len(getattr(self.params, name) or ())
            if count > vocab_size:
                raise invalid(
                    f"{name} must hold at most {vocab_size} token ids, got {count}.", name
                )
        for ids in self.prompts:
            if not ids:
                raise invalid(f"{param} is empty: give at least one token.", param)
            if len(ids) >= max_model_len:
                raise too_long(str(len(ids)), max_model_len, param)
            wanted = self.params.max_tokens
            if wanted is not None and len(ids) + wanted > max_model_len:
                raise invalid(
                    f"max_tokens must be at most {max_model_len - len(ids)} after a prompt of "
                    f"{len(ids)} tokens, as max_model_len is {max_model_len}, got {wanted}.",
                    "max_tokens",
                    "context_length_exceeded",
                )


class Generation:
    """Use it in an `async with`, and iterate over (number of the sequence, its delta).

    Leaving it aborts what still runs, whose pages are free at once.

    Raises:
      ApiError: there is no room; or what `interrupt` said.
      RequestError, EngineError: see `AsyncEngine.stream`.
    """

    def __init__(self, service: Service, model: Model, work: Work):
        self.first_token: float | None = None  # seconds from its start
        self._service = service
        self._model = model
        self._work = work
        self._count = len(work.prompts) * work.params.n
        self._left = self._count
        self._queue: asyncio.Queue[tuple[int, Delta] | None] = asyncio.Queue()
        self._error: Exception | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._started = time.perf_counter()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> "Generation":
        self._stack.enter_context(self._service.admitted(self, self._count))
        n = self._work.params.n
        for index in range(self._count):
            prompt, sample = divmod(index, n)
            task = asyncio.create_task(self._pump(index, self._work.prompts[prompt], sample))
            self._tasks.append(task)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:
            await self._stack.aclose()

    def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        return self

    async def __anext__(self) -> tuple[int, Delta]:
        if self._left == 0:
            raise StopAsyncIteration
        found = await self._queue.get()
        if self._error is not None:
            raise self._error
        assert found is not None
        self._left -= found[1].result is not None
        return found

    async def results(self) -> list[GenerationResult]:
        """What all of them came to, in order."""
        done: list[GenerationResult | None] = [None] * self._count
        async for index, delta in self:
            done[index] = delta.result
        return [result for result in done if result is not None]

    def interrupt(self, error: Exception) -> None:
        """Ends it: what runs is aborted now, and who reads gets the error next."""
        if self._error is None:
            self._error = error
            self._cancel()
            self._queue.put_nowait(None)

    def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _pump(self, index: int, prompt: tuple[int, ...], sample: int) -> None:
        work, metrics = self._work, self._service.metrics
        last, reason = self._started, "abort"
        stream = self._model.engine.stream(
            prompt, work.params, sample, priority=work.priority, cache_salt=work.cache_salt
        )
        try:
            async with aclosing(stream):
                async for delta in stream:
                    now = time.perf_counter()
                    if delta.token_ids:
                        if last == self._started:
                            self.first_token = self.first_token or now - last
                            metrics.first_token(now - last)
                        else:
                            metrics.next_tokens(now - last, len(delta.token_ids))
                        last = now
                    if delta.result is not None:
                        reason = delta.result.finish_reason
                    elif self._queue.qsize() >= _BACKLOG + 4 * self._count:
                        self.interrupt(ApiError(408, "the client reads too slowly."))
                        return
                    self._queue.put_nowait((index, delta))
        except EngineError as error:
            self._service.fail(error)
            self.interrupt(error)
        except Exception as error:
            self.interrupt(error)
        finally:
            metrics.ended(time.perf_counter() - self._started, reason)
