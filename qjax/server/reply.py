"""An answer, whole or as a stream, from the work that it takes to the last byte."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qjax.engine.async_engine import Delta
from qjax.engine.request import GenerationResult
from qjax.server.errors import ApiError, as_api_error
from qjax.server.generation import Generation, Work
from qjax.server.limits import ClientGone
from qjax.server.protocol import Sampling
from qjax.server.service import Model, Service
from qjax.server.sse import EventStream
from qjax.server.usage import counts, usage


class Asked(Protocol):
    """A request as the endpoints understand it: its work, and the choices of its answer."""

    kind: str
    prefix: str
    model: Model
    prompt: Any
    work: Work

    def whole(self, results: Sequence[GenerationResult]) -> list[dict[str, Any]]: ...

    def opening(self) -> Iterator[dict[str, Any]]: ...

    def chunks(self, index: int, delta: Delta) -> Iterator[dict[str, Any]]: ...


class Reply:
    """Runs the work and answers; an ASGI application for one request.

    Args:
      event: gets what the log should know.
    """

    def __init__(self, service: Service, asked: Asked, request: Sampling, event: dict[str, Any]):
        self._service = service
        self._asked = asked
        self._fields = set(request.__struct_fields__)
        self._streams = bool(request.stream)
        options = request.stream_options
        self._usage = options is not None and options.include_usage
        self._counting = options is not None and options.continuous_usage_stats
        self._prompt_tokens = sum(map(len, asked.work.prompts))
        self._generated = 0
        self._event = event
        self._id = asked.prefix + secrets.token_hex(12)
        self._envelope = {
            "id": self._id,
            "object": asked.kind,
            "created": int(time.time()),
            "model": service.settings.names[0] if request.model is None else request.model,
            "system_fingerprint": asked.model.fingerprint,
        }
        event.update(id=self._id, stream=self._streams)
        if service.settings.log_prompts:
            event["prompt"] = asked.prompt

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation = Generation(self._service, self._asked.model, self._asked.work)
        async with generation, _watched(receive, generation):
            if self._streams:
                await self._stream(generation, send)
                return
            results = await generation.results()
            self._note(generation, results)
        whole = {
            **self._envelope,
            "choices": self._asked.whole(results),
            "usage": usage(results, self._asked.work.params.n),
        }
        body = msgspec.json.encode(whole)
        await Response(body, media_type="application/json")(scope, receive, send)

    async def _stream(self, generation: Generation, send: Send) -> None:
        # What is refused is so before anything is sent.
        first = await anext(generation)
        events = EventStream(send, self._service.settings.stall_seconds)
        try:
            await events.start()
            for choice in self._asked.opening():
                await events.event(self._chunk([choice]))
            results: dict[int, GenerationResult] = {}
            async for index, delta in _chain(first, generation):
                self._generated += len(delta.token_ids)
                for choice in self._asked.chunks(index, delta):
                    await events.event(self._chunk([choice]))
                if delta.result is not None:
                    results[index] = delta.result
            ordered = [results[index] for index in sorted(results)]
            self._note(generation, ordered)
            if self._usage:
                found = usage(ordered, self._asked.work.params.n)
                await events.event(self._chunk([]) | {"usage": found})
            await events.done()
        except ClientGone:
            raise
        except Exception as error:
            await self._fail(generation, events, error)

    async def _fail(self, generation: Generation, events: EventStream, error: Exception) -> None:
        """Tells the reader of a stream that it ends early."""
        told = as_api_error(error, self._fields)
        if isinstance(error, TimeoutError):
            told = ApiError(408, "the client reads too slowly.")
        if told is None:
            self._event["error"] = f"{type(error).__name__}: {error}"
            told = ApiError(500, "internal error.")
        generation.interrupt(told)  # the pages are free before the reader comes
        self._event["told"] = told.message
        with contextlib.suppress(TimeoutError):
            await events.fail(told.body)

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = self._asked.kind
        chunk = {**self._envelope, "choices": choices}
        if kind == "chat.completion":
            chunk["object"] = f"{kind}.chunk"
        if self._usage:
            found = counts(self._prompt_tokens, self._generated)
            chunk["usage"] = found if self._counting else None
        return chunk

    def _note(self, generation: Generation, results: Sequence[GenerationResult]) -> None:
        """For the log."""
        found = usage(results, self._asked.work.params.n)
        self._event.update(
            prompt_tokens=found["prompt_tokens"],
            cached_tokens=found["prompt_tokens_details"]["cached_tokens"],
            completion_tokens=found["completion_tokens"],
            finish_reason=",".join(sorted({result.finish_reason for result in results})),
        )
        if generation.first_token is not None:
            self._event["ttft"] = round(generation.first_token, 4)
        if self._service.settings.log_prompts:
            self._event["text"] = [result.text for result in results]


@contextlib.asynccontextmanager
async def _watched(receive: Receive, generation: Generation) -> AsyncIterator[None]:
    """Interrupts the generation when the client goes."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        generation.interrupt(ClientGone())

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()


async def _chain(
    first: tuple[int, Delta], rest: AsyncIterator[tuple[int, Delta]]
) -> AsyncIterator[tuple[int, Delta]]:
    yield first
    async for each in rest:
        yield each
