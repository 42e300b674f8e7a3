"""Completions as a client sees them: when each piece arrived, and how many tokens it came to."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from qjax.bench.serving.connection import Address, request
from qjax.bench.serving.events import Events
from qjax.errors import RequestError, ServingError

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
SIX_HOURS = 6 * 60 * 60.0


@dataclass(frozen=True)
class Server:
    """Whom requests go to, and what all of them ask.

    Attributes:
      endpoint: a path that ends in /completions or /chat/completions.
      api_key: sent as a bearer token.
      ignore_eos: has every request run to its length; a field that vLLM, qjax and llama.cpp know.
      extra: more fields of the body.
      timeout: seconds that one request may take.
    """

    address: Address
    model: str
    endpoint: str = COMPLETIONS
    api_key: str | None = field(default=None, repr=False)
    ignore_eos: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = SIX_HOURS

    def __post_init__(self) -> None:
        if not self.endpoint.endswith("/completions"):
            raise RequestError(
                f"endpoint must end in /completions or /chat/completions, got {self.endpoint!r}."
            )

    @property
    def chat(self) -> bool:
        return self.endpoint.endswith("/chat/completions")

    @property
    def headers(self) -> dict[str, str]:
        found = {"Content-Type": "application/json"}
        return found | ({"Authorization": f"Bearer {self.api_key}"} if self.api_key else {})


@dataclass(frozen=True)
class Sample:
    """A prompt, the tokens that it is thought to have, and the most that are generated."""

    prompt: str
    prompt_len: int
    output_len: int


@dataclass(frozen=True)
class Outcome:
    """How a request went; in seconds.

    Attributes:
      start: when it was sent, on the clock of the event loop.
      prompt_len, output_len: tokens, as the server counted them where it did (`usage`); otherwise
        those that the prompt was made to have, and one for each piece of text.
      cached: of the prompt's tokens, those that the server had in a cache, if it says so.
      ttft: from the start to the first piece. itl: between pieces. latency: to the last piece.
      queued: between when it was due and its start, where fewer were allowed at a time.
      error: why it failed, or "".
    """

    start: float
    prompt_len: int
    output_len: int = 0
    cached: int = 0
    ttft: float = 0.0
    itl: tuple[float, ...] = ()
    latency: float = 0.0
    queued: float = 0.0
    usage: bool = False
    error: str = ""


class Timeline:
    """An outcome in the making, from the events of a stream and when they came.

    As in vLLM's benchmark, each event with a choice counts, even one without text, and what has
    only the usage in it does not; nor does here an event that merely opens a chat message, which
    servers may send before there is a token.
    """

    def __init__(self, sample: Sample, start: float):
        self._start, self._prompt_len = start, sample.prompt_len
        self._arrivals: list[float] = []
        self._texts = 0
        self._usage: dict[str, Any] | None = None
        self._ended = False

    def add(self, data: bytes, now: float) -> None:
        """Raises ServingError: it is none of what such a server sends, or tells of an error."""
        if data == b"[DONE]":
            self._ended = True
            return
        try:
            event = json.loads(data)
        except ValueError:
            raise ServingError(f"an event of the stream is no JSON: {_shown(data)}") from None
        if not isinstance(event, dict) or "error" in event:
            raise ServingError(f"the stream tells of an error: {_message(data)}")
        if usage := event.get("usage"):
            self._usage = usage
        if not (choices := event.get("choices")):
            return
        choice = choices[0]
        delta = choice.get("delta") or {}
        text = choice.get("text") or delta.get("content")
        reason = choice.get("finish_reason")
        self._ended = self._ended or reason is not None
        if "role" in delta and not text and reason is None and delta.keys() <= {"role", "content"}:
            return
        self._arrivals.append(now)
        self._texts += bool(text)

    def outcome(self, error: str = "") -> Outcome:
        start, arrivals = self._start, self._arrivals
        if not error and not self._ended:
            error = "the stream ended without a finish_reason or [DONE]"
        if not error and not arrivals:
            error = "the stream had no token in it"
        if error:
            return Outcome(start, self._prompt_len, error=error)
        usage = self._usage or {}
        details = usage.get("prompt_tokens_details") or {}
        return Outcome(
            start=start,
            prompt_len=usage.get("prompt_tokens", self._prompt_len),
            output_len=usage.get("completion_tokens", self._texts),
            cached=details.get("cached_tokens") or 0,
            ttft=arrivals[0] - start,
            itl=tuple(b - a for a, b in pairwise(arrivals)),
            latency=arrivals[-1] - start,
            usage=bool(usage.get("completion_tokens")),
        )


async def complete(server: Server, sample: Sample) -> Outcome:
    """Asks for a completion, in a stream. Whatever goes wrong is in the outcome's `error`."""
    now = asyncio.get_running_loop().time
    body = json.dumps(_body(server, sample)).encode()
    timeline, events, error = Timeline(sample, now()), Events(), ""
    try:
        async with (
            asyncio.timeout(server.timeout),
            request(
                server.address, "POST", server.endpoint, headers=server.headers, body=body
            ) as response,
        ):
            if response.status != 200:
                raise ServingError(f"HTTP {response.status}: {_message(await response.read())}")
            if not response.content_type.startswith("text/event-stream"):
                raise ServingError(f"the answer is no stream but {response.content_type!r}")
            async for piece in response.pieces():
                arrived = now()
                for data in events.push(piece):
                    timeline.add(data, arrived)
    except TimeoutError:
        error = f"not done after {server.timeout:g} s"
    except ServingError as failed:
        error = str(failed)
    return timeline.outcome(error)


async def ask(server: Server, method: str, path: str, body: Any = None) -> Any:
    """The JSON that a server answers with.

    Raises:
      ServingError: it does not answer, or with another status than 200, or with something else.
    """
    sent = b"" if body is None else json.dumps(body).encode()
    try:
        async with (
            asyncio.timeout(min(server.timeout, 60)),
            request(server.address, method, path, headers=server.headers, body=sent) as response,
        ):
            found = await response.read()
    except TimeoutError:
        raise ServingError(f"{server.address}{path} does not answer") from None
    if response.status != 200:
        raise ServingError(
            f"{server.address}{path} answers HTTP {response.status}: {_message(found)}"
        )
    try:
        return json.loads(found)
    except ValueError:
        raise ServingError(f"{server.address}{path} answers no JSON: {_shown(found)}") from None


async def first_model(server: Server) -> Server:
    """The server, with the model that it names first.

    Raises:
      ServingError: as `ask`; or it names none.
    """
    found = await ask(server, "GET", "/v1/models")
    try:
        return replace(server, model=str(found["data"][0]["id"]))
    except (TypeError, KeyError, IndexError):
        raise ServingError(f"{server.address}/v1/models names no model: give --model") from None


def _body(server: Server, sample: Sample) -> dict[str, Any]:
    if server.chat:
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": sample.prompt}]}
    else:
        asked = {"prompt": sample.prompt}
    asked |= {
        "model": server.model,
        "max_tokens": sample.output_len,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return asked | ({"ignore_eos": True} if server.ignore_eos else {}) | dict(server.extra)


def _message(body: bytes) -> str:
    """What an error of OpenAI's form says, or the start of the body."""
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return _shown(body)


def _shown(body: bytes) -> str:
    return repr(body[:200].decode("utf-8", "replace"))
