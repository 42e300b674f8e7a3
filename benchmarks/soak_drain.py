"""SIGTERM under load: whoever was accepted gets the whole answer, or is told."""

import asyncio
import json
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass

from soak_requests import words
from soak_watch import Process

from qjax.bench.serving.client import COMPLETIONS, Server
from qjax.bench.serving.connection import request
from qjax.bench.serving.events import Events
from qjax.errors import ServingError

# What may become of a request: all of its tokens came; an error was sent; it broke off without
# one; the connection was refused, or closed before any answer.
COMPLETED, TOLD, CUT, NOT_ACCEPTED = "completed", "told", "cut", "not accepted"


@dataclass(frozen=True)
class Drained:
    """How a drain went.

    Attributes:
      accepted: what became of the requests that ran when the signal came.
      late: of those that were sent after it.
      seconds: from the signal to the end of the process; None where it went on past the deadline.
    """

    accepted: dict[str, int]
    late: dict[str, int]
    seconds: float | None


async def drain(
    server: Server, process: Process, rng: random.Random, streams: int, deadline: float
) -> Drained:
    """Sends SIGTERM while `streams` requests run, half of them in streams, and more keep coming.

    Args:
      deadline: seconds in which the process must have ended.
    """
    begun = asyncio.Semaphore(0)
    tasks = [
        asyncio.create_task(_fate(server, rng, bool(index % 2), begun)) for index in range(streams)
    ]
    async with asyncio.timeout(120):
        for _ in range(streams // 2):  # each stream has a token, so that all were accepted
            await begun.acquire()
    os.kill(process.pid, signal.SIGTERM)
    start = time.monotonic()
    late = []
    while process.alive and time.monotonic() - start < deadline:
        late.append(asyncio.create_task(_fate(server, rng, True, begun)))
        await asyncio.sleep(0.2)
    seconds = None if process.alive else time.monotonic() - start
    async with asyncio.timeout(60):
        fates = await asyncio.gather(*tasks)
        late_fates = await asyncio.gather(*late)
    return Drained(dict(Counter(fates)), dict(Counter(late_fates)), seconds)


async def _fate(
    server: Server, rng: random.Random, in_pieces: bool, begun: asyncio.Semaphore
) -> str:
    body = {
        "model": server.model,
        "prompt": words(rng, 20),
        "max_tokens": 100,
        "ignore_eos": True,
        "stream": in_pieces,
    }
    status, text = None, b""
    try:
        async with request(
            server.address,
            "POST",
            COMPLETIONS,
            headers=server.headers,
            body=json.dumps(body).encode(),
        ) as response:
            status = response.status
            async for piece in response.pieces():
                if in_pieces and not text:
                    begun.release()
                text += piece
    except ServingError:
        return CUT if status == 200 else NOT_ACCEPTED
    return fate(status, text, in_pieces)


def fate(status: int, body: bytes, in_pieces: bool) -> str:
    """What became of a request that has an answer."""
    try:
        if status != 200:
            return TOLD if json.loads(body)["error"] else CUT
        if not in_pieces:
            return COMPLETED if json.loads(body)["choices"][0]["finish_reason"] else CUT
        found = [json.loads(data) for data in Events().push(body) if data != b"[DONE]"]
    except (ValueError, KeyError, TypeError, IndexError):
        return CUT
    if any("error" in event for event in found):
        return TOLD
    reasons = [choice["finish_reason"] for event in found for choice in event.get("choices", ())]
    if "abort" in reasons:  # vLLM's word for a request that was ended from outside
        return TOLD
    return COMPLETED if any(reasons) else CUT
