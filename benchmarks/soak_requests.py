"""What the soak asks of a server: requests to be answered, left, refused, or not even parsed."""

import asyncio
import json
import random
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from qjax.bench.serving.client import CHAT, COMPLETIONS, Server
from qjax.bench.serving.connection import request
from qjax.bench.serving.events import Events
from qjax.bench.serving.prompts import WORDS
from qjax.errors import ServingError

TOKENIZE = "/tokenize"
# Bytes of headers, and of a body, that no honest client sends.
FLOOD = 1 << 20
HUGE_BODY = 1 << 25


@dataclass(frozen=True)
class Seen:
    """What became of a request.

    Attributes:
      status: of HTTP; None where no answer was waited for, or none came.
      problem: what should have been otherwise, or "".
    """

    status: int | None = None
    problem: str = ""


Action = Callable[[Server, random.Random], Awaitable[Seen]]


@dataclass(frozen=True)
class Refused:
    """A request that must get a 4xx.

    Attributes:
      body: bytes as they are; of a dict, the model is added.
      names: one of these words must stand in the error's message or `param`.
    """

    name: str
    body: dict[str, Any] | bytes
    names: tuple[str, ...]
    path: str = COMPLETIONS
    method: str = "POST"


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


# --- requests to be answered ----------------------------------------------------------------------


async def post(server: Server, path: str, body: Any, method: str = "POST") -> tuple[int, bytes]:
    """Status and body of an answer."""
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with request(server.address, method, path, headers=server.headers, body=sent) as response:
        return response.status, await response.read()


async def stream(server: Server, path: str, body: dict[str, Any]) -> tuple[int, list[Any]]:
    """Status and events of an answer that comes in pieces; of another status, its error."""
    sent = json.dumps({**body, "stream": True}).encode()
    async with request(server.address, "POST", path, headers=server.headers, body=sent) as response:
        if response.status != 200:
            return response.status, [json.loads(await response.read())]
        events, found = Events(), []
        async for piece in response.pieces():
            found += events.push(piece)
    return 200, [{"done": True} if data == b"[DONE]" else json.loads(data) for data in found]


def completion(server: Server, rng: random.Random) -> dict[str, Any]:
    """A request of some length, with some of the fields that users set."""
    body: dict[str, Any] = {
        "model": server.model,
        "prompt": words(rng, rng.randint(1, 100)),
        "max_tokens": rng.randint(1, 48),
        "ignore_eos": True,
        "temperature": rng.choice([0, 0.7, 1.5]),
    }
    for name, value in {
        "seed": rng.randint(0, 1 << 32),
        "top_p": 0.9,
        "top_k": 20,
        "frequency_penalty": 0.5,
        "stop": ["the", "\n"],
        "logprobs": 3,
        "logit_bias": {"5": -10},
        "n": 2,
    }.items():
        if rng.random() < 0.2:
            body[name] = value
    return body


def as_chat(body: dict[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in body.items() if name not in ("prompt", "logprobs")}
    return rest | {"messages": [{"role": "user", "content": body["prompt"]}]}


async def answered(server: Server, rng: random.Random) -> Seen:
    body = completion(server, rng)
    path, asked = rng.choice([(COMPLETIONS, body), (CHAT, as_chat(body))])
    status, found = await post(server, path, asked)
    return _judged(status, found, asked.get("n", 1))


async def streamed(server: Server, rng: random.Random) -> Seen:
    body = completion(server, rng)
    path, asked = rng.choice([(COMPLETIONS, body), (CHAT, as_chat(body))])
    status, events = await stream(server, path, asked)
    return _judged_stream(status, events, asked.get("n", 1))


async def shared_prefix(server: Server, rng: random.Random) -> Seen:
    """Like others before it, so that pages are shared, and let go at different times."""
    body = completion(server, rng)
    body["prompt"] = words(random.Random(rng.randint(0, 3)), 120) + " " + body["prompt"]
    return _judged(*await post(server, COMPLETIONS, body), body.get("n", 1))


async def structured(server: Server, rng: random.Random) -> Seen:
    body = completion(server, rng) | {"max_tokens": 32, "response_format": {"type": "json_object"}}
    body.pop("logit_bias", None)
    return _judged(*await post(server, CHAT, as_chat(body)), body.get("n", 1))


async def looked_up(server: Server, rng: random.Random) -> Seen:
    path = rng.choice(["/health", "/metrics", "/version", "/v1/models", TOKENIZE])
    if path == TOKENIZE:
        status, _ = await post(server, path, {"model": server.model, "prompt": words(rng, 20)})
    else:
        status, _ = await post(server, path, b"", "GET")
    return Seen(status, "" if status == 200 else f"{path} answered {status}")


def _judged(status: int, body: bytes, n: int) -> Seen:
    if status == 429:
        return Seen(status)  # told that there is too much to do
    try:
        choices = json.loads(body)["choices"]
        complete = len(choices) == n and all(choice["finish_reason"] for choice in choices)
    except (ValueError, KeyError, TypeError):
        complete = False
    good = status == 200 and complete
    return Seen(status, "" if good else f"answered {status}: {body[:300]!r}")


def _judged_stream(status: int, events: list[Any], n: int) -> Seen:
    if status == 429:
        return Seen(status)
    choices = [choice for event in events for choice in event.get("choices", ())]
    ended = {choice["index"] for choice in choices if choice.get("finish_reason")}
    good = status == 200 and len(ended) == n and events[-1:] == [{"done": True}]
    return Seen(status, "" if good else f"stream of status {status} ended with {events[-2:]}")


# --- requests that are left -----------------------------------------------------------------------


async def left_early(server: Server, rng: random.Random) -> Seen:
    """Disconnects after some pieces, or before the first, while there is much left to do."""
    body = completion(server, rng) | {"max_tokens": 200, "stream": True}
    sent = json.dumps(body).encode()
    pieces = rng.choice([0, 0, 1, 3, 20])
    async with request(
        server.address, "POST", COMPLETIONS, headers=server.headers, body=sent
    ) as response:
        seen = 0
        async for _ in response.pieces():
            seen += 1
            if seen > pieces:
                break
        return Seen(response.status)


async def left_unanswered(server: Server, rng: random.Random) -> Seen:
    """Disconnects while the whole answer is still being made, or the request still being sent."""
    body = json.dumps(completion(server, rng) | {"max_tokens": 200}).encode()
    head = _head(server, len(body))
    await _raw(server, head + (body if rng.random() < 0.7 else body[: len(body) // 2]), 0.05)
    return Seen()


async def read_slowly(server: Server, rng: random.Random) -> Seen:
    """Takes long over what is sent fast, until the server's buffers are full; then goes, or reads
    on to the end."""
    body = completion(server, rng) | {"max_tokens": 150, "stream": True, "n": 3, "logprobs": 5}
    sent = json.dumps(body).encode()
    narrow = socket.socket(socket.AF_INET6 if ":" in server.address.host else socket.AF_INET)
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    narrow.setblocking(False)
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_connect(narrow, (server.address.host, server.address.port))
        await loop.sock_sendall(narrow, _head(server, len(sent)) + sent)
        found = b""
        for _ in range(40):
            found += await loop.sock_recv(narrow, 64)
            await asyncio.sleep(0.05)
        if rng.random() < 0.5:
            return Seen(_status(found))
        while piece := await loop.sock_recv(narrow, 1 << 16):
            found += piece
    finally:
        narrow.close()
    # To the end, or told that it takes too long.
    told = b"[DONE]" in found or b'"error"' in found
    return Seen(_status(found), "" if told else f"a slow reader's stream ended: {found[-300:]!r}")


# --- requests to be refused -----------------------------------------------------------------------


def refusals() -> list[Refused]:
    """What is wrong with a request, and what the answer must name."""
    x = {"prompt": "x", "max_tokens": 1}
    found = [
        Refused("over-long prompt", {**x, "prompt": "the " * 300_000}, ("prompt", "max_model_len")),
        Refused("over-long output", {**x, "max_tokens": 10**9}, ("max_tokens", "max_model_len")),
        Refused("unknown model", json.dumps({**x, "model": "none"}).encode(), ("model",)),
        Refused("no prompt", {"max_tokens": 1}, ("prompt",)),
        Refused("no messages", {"max_tokens": 1}, ("messages",), CHAT),
        Refused("no body", b"", ("body", "json")),
        Refused("wrong path", x, ("path", "found", "/v2"), "/v2/completions"),
        Refused("wrong method", b"", ("method",), COMPLETIONS, "GET"),
    ]
    for text in (
        b"{",
        b'{"prompt": "x"',
        b"nonsense",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"prompt": "x", "max_tokens": 1e999}',
        b'"x"',
        b"[]",
        b"null",
    ):
        found.append(Refused(f"bad JSON {text[:30]!r}", text, ("json", "body", "max_tokens")))
    wrong: dict[str, list[Any]] = {
        "prompt": ["", [], 7, {"a": 1}, [[1], "x"], [-1], [10**9], [1.5], None],
        "n": [0, -1, 10**6, 2**63, 10**30, "2", 1.5, [1]],
        "max_tokens": [0, -1, "10", 1.5, [], 2**64],
        "temperature": [-1, "hot", [], True],
        "top_p": [0, 2, "x"],
        "top_k": [-5, 1.5, "x"],
        "min_p": [-0.1, 2],
        "presence_penalty": [5, "x"],
        "frequency_penalty": [-5, {}],
        "repetition_penalty": [0, -1],
        "seed": ["x", 1.5],
        "stop": [5, {"a": 1}, [1], [""]],
        "stop_token_ids": ["x", [-1], 5],
        "logprobs": [10**6, -1, "x"],
        "logit_bias": [[1], {"x": 1}, {"1": "y"}, 7],
        "stream": ["yes", 2],
        "ignore_eos": ["x"],
        "model": [5, []],
    }
    for field, values in wrong.items():
        for value in values:
            found.append(Refused(f"{field}={json.dumps(value)}", {**x, field: value}, (field,)))
    user = {"role": "user", "content": "x"}
    chat: dict[str, list[Any]] = {
        "messages": ["x", [], [5], [{"role": 1, "content": "x"}], [{"role": "user", "content": 5}]],
        "n": [10**6],
        "top_logprobs": [99, "x"],
        "tools": ["x", [5], [{"type": "x"}]],
        "response_format": ["x", {"type": "x"}, {"type": "json_schema"}],
    }
    for field, values in chat.items():
        for value in values:
            body = {"messages": [user], "max_tokens": 1, field: value}
            names = (field, "role", "content") if field == "messages" else (field, "logprobs")
            found.append(Refused(f"chat {field}={json.dumps(value)}", body, names, CHAT))
    for kind, value in (
        ("regex", "("),
        ("regex", "(a)\\1"),
        ("json", {"type": "x"}),
        ("json", {"$ref": "http://127.0.0.1/x"}),
        ("grammar", "start: ("),
        ("choice", []),
    ):
        body = {**x, "structured_outputs": {kind: value}}
        name = f"structured {kind}={json.dumps(value)[:24]}"
        found.append(Refused(name, body, (kind, "structured_outputs")))
    return found


async def refused(server: Server, asked: Refused) -> Seen:
    """Sends what must be refused, and looks at the refusal."""
    body = asked.body
    if isinstance(body, dict):
        body = json.dumps({"model": server.model, **body}).encode()
    try:
        status, found = await post(server, asked.path, body, asked.method)
    except ServingError as error:
        return Seen(None, f"{asked.name}: {error}")
    return judge_refusal(asked, status, found)


def judge_refusal(asked: Refused, status: int, body: bytes) -> Seen:
    """Whether a refusal is a 4xx with OpenAI's form of an error that names what is wrong."""
    if not 400 <= status < 500:
        return Seen(status, f"{asked.name}: answered {status}: {body[:200]!r}")
    if status == 429:
        return Seen(status)
    try:
        error = json.loads(body)["error"]
        text = f"{error['message']} {error.get('param') or ''}".lower()
    except (ValueError, KeyError, TypeError):
        return Seen(status, f"{asked.name}: no error of OpenAI's form: {body[:200]!r}")
    if not any(name.lower() in text for name in asked.names):
        return Seen(status, f"{asked.name}: names none of {asked.names}: {text[:200]!r}")
    return Seen(status)


# --- what is hardly HTTP --------------------------------------------------------------------------


async def hostile(server: Server, rng: random.Random) -> Seen:
    """Bytes that a parser may choke on. They are answered with a 4xx, or the connection closed."""
    host = server.address.netloc.encode()
    start = b"POST /v1/completions HTTP/1.1\r\nHost: " + host + b"\r\n"
    small = b'{"prompt": "x"}'
    floods = {
        "many headers": start + b"".join(b"X-%d: y\r\n" % i for i in range(FLOOD // 12)),
        "a long header": start + b"X: " + b"y" * FLOOD + b"\r\n\r\n",
        "a long path": b"GET /" + b"x" * FLOOD + b" HTTP/1.1\r\nHost: " + host + b"\r\n\r\n",
        "a huge length": start + b"Content-Length: 1000000000000000000\r\n\r\n" + small,
        "a negative length": start + b"Content-Length: -1\r\n\r\n" + small,
        "a length in words": start + b"Content-Length: ten\r\n\r\n" + small,
        "a huge body": start + b"Content-Length: %d\r\n\r\n" % HUGE_BODY + b" " * HUGE_BODY,
        "bad chunks": start + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n" + small,
        "noise": rng.randbytes(4096),
        "no HTTP version": b"GARBAGE\r\n\r\n",
        "half a head": start + b"X-Slow: ",
    }
    name = rng.choice(list(floods))
    found = await _raw(server, floods[name], 2.0)
    status = _status(found)
    good = status is None or 400 <= status < 500
    return Seen(status, "" if good else f"{name}: answered {found[:200]!r}")


async def _raw(server: Server, sent: bytes, seconds: float) -> bytes:
    """The start of what comes back within some seconds, or before the connection is closed."""
    reader, writer = await asyncio.open_connection(server.address.host, server.address.port)
    try:
        async with asyncio.timeout(seconds):
            writer.write(sent)
            await writer.drain()
            return await reader.read(1 << 12)
    except (TimeoutError, ConnectionError):
        return b""
    finally:
        writer.transport.abort()


def _head(server: Server, length: int) -> bytes:
    lines = {"Host": server.address.netloc, "Content-Length": length, **server.headers}
    lines["Connection"] = "close"
    fields = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {COMPLETIONS} HTTP/1.1\r\n{fields}\r\n".encode()


def _status(found: bytes) -> int | None:
    first = found.split(b"\r\n")[0].split(b" ")
    return int(first[1]) if first[0].startswith(b"HTTP/") and len(first) > 1 else None


# How often each kind of request is sent, beside the others.
MIX: dict[str, tuple[float, Action]] = {
    "answered": (3, answered),
    "streamed": (3, streamed),
    "shared-prefix": (2, shared_prefix),
    "structured": (0.5, structured),
    "looked-up": (1, looked_up),
    "left-early": (2, left_early),
    "left-unanswered": (1, left_unanswered),
    "read-slowly": (0.5, read_slowly),
    "hostile": (1, hostile),
}
