"""The client against a server that answers well, badly, in halves, or not at all."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from qjax.bench.serving.client import CHAT, Outcome, Sample, Server, ask, complete, first_model
from qjax.bench.serving.connection import Address, request
from qjax.bench.serving.load import benchmark
from qjax.errors import RequestError, ServingError
from tests.bench.serving.scripted import Asked, Handler, Scripted, beside, tokens

SAMPLE = Sample("one two three", 3, 4)
KEY = "sk-very-secret"


def server_at(scripted: Scripted, **fields: Any) -> Server:
    return Server(Address.of(scripted.url), "words", **fields)


def completed(handler: Handler, **fields: Any) -> tuple[Outcome, Asked]:
    async def run(scripted: Scripted) -> tuple[Outcome, Asked]:
        return await complete(server_at(scripted, **fields), SAMPLE), scripted.asked[0]

    return beside(handler, run)


def test_completion() -> None:
    outcome, asked = completed(tokens, ignore_eos=True, api_key=KEY, extra={"temperature": 0})
    assert outcome.error == ""
    assert (outcome.prompt_len, outcome.output_len, len(outcome.itl)) == (3, 4, 4)
    assert outcome.usage
    assert 0 < outcome.ttft <= outcome.latency
    assert outcome.latency == pytest.approx(outcome.ttft + sum(outcome.itl))
    assert asked.json == {
        "model": "words",
        "prompt": "one two three",
        "max_tokens": 4,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0,
    }
    assert asked.headers["authorization"] == f"Bearer {KEY}"
    assert KEY not in repr(server_at(Scripted(1), api_key=KEY))


def test_chat() -> None:
    async def handler(asked: Asked) -> None:
        asked.begin()
        for delta in ({"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}):
            asked.event({"choices": [{"index": 0, "delta": delta}]})
        asked.end()

    outcome, asked = completed(handler, endpoint=CHAT)
    assert (outcome.error, outcome.output_len, len(outcome.itl)) == ("", 2, 1)
    assert asked.json["messages"] == [{"role": "user", "content": "one two three"}]
    assert "prompt" not in asked.json
    assert "authorization" not in asked.headers


def test_a_stream_in_single_bytes_with_comments() -> None:
    async def handler(asked: Asked) -> None:
        asked.begin()
        event = '{"choices":[{"text":"\u00e9","finish_reason":"stop"}]}'
        for byte in f": ping\r\n\r\nevent: x\r\ndata:{event}\r\n\r\ndata: [DONE]\n\n".encode():
            asked.chunk(bytes([byte]))
            await asked.writer.drain()
        asked.write(b"0\r\n\r\n")

    outcome, _ = completed(handler)
    assert (outcome.error, outcome.output_len, outcome.itl) == ("", 1, ())


async def too_much(asked: Asked) -> None:
    asked.answer(500, {"error": {"message": "out of pages", "type": "internal_error"}})


async def html(asked: Asked) -> None:
    asked.answer(502, b"<html>Bad Gateway</html>", "text/html")


async def whole(asked: Asked) -> None:
    asked.answer(200, {"choices": [{"text": "a", "finish_reason": "stop"}]})


async def dropped(asked: Asked) -> None:
    asked.begin()
    asked.event({"choices": [{"text": "a"}]})
    await asked.writer.drain()
    asked.writer.transport.abort()


async def ended_early(asked: Asked) -> None:
    asked.begin()
    asked.event({"choices": [{"text": "a"}]})
    asked.write(b"0\r\n\r\n")


async def half_json(asked: Asked) -> None:
    asked.begin()
    asked.event('{"choices": [{"te')
    asked.end()


async def bad_chunk(asked: Asked) -> None:
    asked.begin()
    asked.write(b"nonsense\r\n")


async def no_http(asked: Asked) -> None:
    asked.write(b"220 mail.example.org ESMTP\r\n\r\n")


async def closed(asked: Asked) -> None:
    pass


async def tells(asked: Asked) -> None:
    asked.begin()
    asked.event({"choices": [{"text": "a"}]})
    asked.event({"error": {"message": "the server is shutting down", "code": 503}})
    asked.end()


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (too_much, "HTTP 500: out of pages"),
        (html, "HTTP 502: '<html>Bad Gateway"),
        (whole, "no stream but 'application/json'"),
        (dropped, "broke|cut short"),
        (ended_early, "ended without a finish_reason"),
        (half_json, "no JSON"),
        (bad_chunk, "no HTTP"),
        (no_http, "no HTTP"),
        (closed, "closed the connection|cut short|broke"),
        (tells, "the server is shutting down"),
    ],
)
def test_failures_are_told(handler: Handler, message: str) -> None:
    outcome, _ = completed(handler)
    assert outcome.ttft == outcome.output_len == 0
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(outcome.error)


def test_a_server_that_never_answers() -> None:
    async def handler(asked: Asked) -> None:
        await asked.reader.read()  # until the client goes

    async def run(scripted: Scripted) -> Outcome:
        return await complete(server_at(scripted, timeout=0.05), SAMPLE)

    assert beside(handler, run).error == "not done after 0.05 s"


def test_nobody_listens() -> None:
    async def run(scripted: Scripted) -> Outcome:
        return await complete(server_at(scripted), SAMPLE)

    outcome = asyncio.run(run(Scripted(1)))
    assert outcome.error.startswith("cannot connect to http://127.0.0.1:1")


def test_leaving_closes_the_connection() -> None:
    gone = asyncio.Event()

    async def handler(asked: Asked) -> None:
        asked.begin()
        asked.event({"choices": [{"text": "a"}]})
        await asked.reader.read()
        gone.set()

    async def run(scripted: Scripted) -> None:
        async with request(Address.of(scripted.url), "POST", "/", body=b"{}") as response:
            async for _ in response.pieces():
                break
        await asyncio.wait_for(gone.wait(), 60)

    beside(handler, run)


def test_limit_of_concurrency_holds() -> None:
    """The server answers nobody until as many are there as may be."""
    inside, most, full = 0, 0, asyncio.Event()

    async def handler(asked: Asked) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        if inside == 3:
            full.set()
        await full.wait()
        await asyncio.sleep(0)
        inside -= 1
        await tokens(asked)

    async def run(scripted: Scripted) -> list[Outcome]:
        samples = [replace(SAMPLE, output_len=1 + number % 2) for number in range(12)]
        ran = await benchmark(
            server_at(scripted),
            samples[:9],
            [0.0] * 9,
            warmups=samples[9:],
            max_concurrency=3,
        )
        assert len(scripted.asked) == 12
        assert ran.duration > 0
        return ran.outcomes

    outcomes = beside(handler, run)
    assert most == 3
    assert [one.output_len for one in outcomes] == [1, 2, 1, 2, 1, 2, 1, 2, 1]
    assert not any(one.error for one in outcomes)


def test_asking_for_the_model() -> None:
    async def run(scripted: Scripted) -> str:
        return (await first_model(replace(server_at(scripted), model=""))).model

    assert beside(tokens, run) == "words"

    async def none(asked: Asked) -> None:
        asked.answer(200, {"data": []})

    with pytest.raises(ServingError, match="names no model"):
        beside(none, run)
    with pytest.raises(ServingError, match="HTTP 500: out of pages"):
        beside(too_much, run)

    async def no_json(scripted: Scripted) -> Any:
        return await ask(server_at(scripted), "GET", "/v1/models")

    with pytest.raises(ServingError, match="no HTTP"):
        beside(no_http, no_json)


def test_addresses() -> None:
    assert str(Address.of("https://[::1]/base/")) == "https://[::1]:443/base"
    for wrong in (
        "127.0.0.1:80",
        "ftp://x",
        "http://",
        "http://x:y",
        "http://me:key@x",
        "http://x?y",
    ):
        with pytest.raises(RequestError, match="base_url"):
            Address.of(wrong)
    with pytest.raises(RequestError, match="endpoint must end in"):
        Server(Address.of("http://x"), "m", "/v1/embeddings")
