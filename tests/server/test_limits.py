"""Requests that would do harm: each is refused with a reason, and leaves nothing behind."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import qjax
from qjax.server import generation, limits, run, sse
from qjax.server.sse import EventStream
from tests.server.conftest import Raw, Running, engine_of, serving

LONG = {"prompt": "a", "max_tokens": 200, "ignore_eos": True, "temperature": 0}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"prompt"',
        b"{} {}",
        b'{"prompt": "a",}',
        b'{"prompt": NaN}',
        b'{"prompt": 1e999}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": null}',
        b'{"prompt": {}}',
        b'{"prompt": []}',
        b'{"prompt": [[]]}',
        b'{"prompt": ""}',
        b'{"prompt": ["a", [3]]}',
        b'{"prompt": [3, "a"]}',
        b'{"prompt": [true]}',
        b'{"prompt": [99999999999999999999999]}',
        b'{"prompt": [-1]}',
        b'{"prompt": "a", "n": 99999999999999999999999999}',
        b'{"prompt": "a", "max_tokens": "12"}',
        b'{"prompt": "a", "stop": [["x"]]}',
        b'{"prompt": "a", "temperature": []}',
        b'{"prompt": "a", "logprobs": 1000000}',
        b'{"prompt": "a", "stream_options": {"unknown": 1}, "stream": true}',
        b'{"prompt": ' + b"[" * 200_000,
        b'{"prompt": "a", "unknown": ' + b'{"a":' * 200_000,
        b'{"prompt": "a", "structured_outputs": ' + b'{"json":' * 200_000,
    ],
    ids=lambda body: body[:40].decode(errors="replace"),
)
def test_bad_bodies(running: Running, body: bytes) -> None:
    found = running.post("/v1/completions", body)
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]


def test_other_types_of_content(running: Running) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        found = running.post("/v1/completions", {"prompt": "a"}, headers={"Content-Type": kind})
        assert found.status_code == 415
        assert "Content-Type" in found.json()["error"]["message"]


def test_paths_that_are_not_there(running: Running) -> None:
    for path in ("/v1/models/", "/v1", "/docs", "/openapi.json", "/v1/embeddings", "/%2e%2e/"):
        assert running.get(path).status_code == 404
        assert running.get(path).json()["error"]["type"] == "invalid_request_error"
    found = running.get("/v1/completions")
    assert (found.status_code, found.headers["allow"]) == (405, "POST")


def test_prompts_far_too_long(running: Running) -> None:
    """Not even read to the end, which would take minutes."""
    found = running.post("/v1/completions", {"prompt": "word " * 1_000_000})
    assert found.status_code == 400
    error = found.json()["error"]
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    assert "max_model_len" in error["message"]


@pytest.mark.parametrize("how", ["long line", "long header", "many headers", "no HTTP"])
def test_header_floods(running: Running, how: str) -> None:
    sent = {
        "long line": b"GET /" + b"a" * 100_000,
        "long header": b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000,
        "many headers": b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 20_000,
        "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
    }[how]
    with Raw(running) as raw:
        raw.socket.sendall(sent)
        status, found = raw.answer()
    assert status == 400
    assert "32768 bytes" in found["error"]["message"]
    assert running.get("/health").status_code == 200


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HTTP/1.1\r\nHost"])
def test_slow_heads(running: Running, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(run, "_HEAD_SECONDS", 0.2)
    with Raw(running) as raw:
        raw.socket.sendall(sent)
        status, found = raw.answer()
    assert status == 408
    assert found["error"]["message"] == "the request's head must arrive within 0.2 seconds."


@pytest.fixture(scope="module")
def hasty(params: qjax.Params) -> Iterator[Running]:
    """A server without patience."""
    with serving(
        lambda: engine_of(params, max_num_seqs=1),
        max_queue=0,
        body_seconds=0.3,
        stall_seconds=0.3,
        buffer=4096,
    ) as hasty:
        yield hasty


def test_slow_bodies(hasty: Running) -> None:
    with Raw(hasty) as raw:
        raw.post("/v1/completions", b'{"prompt"', length=100)
        status, found = raw.answer()
    assert status == 408
    assert found["error"]["message"] == "the body must arrive within 0.3 seconds."


def test_large_bodies(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with Raw(running) as raw:
        raw.post("/v1/completions", b"", length=1 << 40)
        status, found = raw.answer()
    assert status == 413
    assert found["error"]["message"] == "the body must be at most 8388608 bytes."
    monkeypatch.setattr(limits, "MAX_BODY", 1000)
    for body in (b"a" * 100_000, iter([b"a" * 50_000, b"a" * 50_000])):  # known, and in chunks
        headers = {"Content-Type": "application/json"}
        found = httpx.post(f"{running.url}/tokenize", content=body, headers=headers, timeout=60)
        assert found.status_code == 413
        assert found.json()["error"]["message"] == "the body must be at most 1000 bytes."


def test_all_bodies_together(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_MAX_BODIES", 1000)
    with Raw(running) as one, Raw(running) as other:
        one.post("/tokenize", b'{"prompt": "' + b"a" * 900, length=914)
        running.until(lambda: running.service.bodies.held > 900)
        other.post("/tokenize", b" " * 200, length=300)
        assert other.socket.recv(65536).startswith(b"HTTP/1.1 429 ")
        one.socket.sendall(b'"}')
        assert one.socket.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert running.service.bodies.held == 0


def test_full_queue(hasty: Running, gate: threading.Event) -> None:
    gate.clear()
    found: list[httpx.Response] = []
    first = threading.Thread(target=lambda: found.append(hasty.post("/v1/completions", LONG)))
    first.start()
    hasty.until(lambda: hasty.service.sequences == 1)
    refused = hasty.post("/v1/completions", LONG)
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert "at most 0 sequences may wait" in refused.json()["error"]["message"]
    gate.set()
    first.join(60)
    assert found[0].json()["usage"]["completion_tokens"] == 200
    hasty.idle()


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_go(running: Running, gate: threading.Event, stream: bool) -> None:
    before = running.ended("abort")
    with Raw(running) as raw:
        if not stream:
            gate.clear()
        raw.post("/v1/completions", json.dumps({**LONG, "n": 3, "stream": stream}).encode())
        if stream:
            raw.socket.recv(1)
            gate.clear()
        running.until(lambda: running.service.sequences == 3)
    running.until(lambda: running.service.sequences == 0)
    gate.set()
    running.idle()
    assert running.ended("abort") - before == 3


def events(found: bytes) -> list[Any]:
    """What came as server-sent events, in chunks, but for the last one."""
    assert b"data: [DONE]\n\n" in found
    lines = [line for line in found.split(b"\n") if line.startswith(b"data: {")]
    return [json.loads(line.removeprefix(b"data: ")) for line in lines]


STREAM = json.dumps({**LONG, "stream": True, "logprobs": 20}).encode()  # some 200 KB


def test_readers_that_stall(hasty: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they hold is free before they come back, and are told."""
    monkeypatch.setattr(sse, "_LAST_WORDS", 60.0)
    failing, fail = threading.Event(), EventStream.fail

    async def noted(self: EventStream, content: Any) -> None:
        failing.set()
        await fail(self, content)

    monkeypatch.setattr(EventStream, "fail", noted)
    with Raw(hasty, buffer=4096) as raw:
        raw.post("/v1/completions", STREAM)
        assert failing.wait(60)
        hasty.idle()
        *pieces, last = events(raw.rest())
    assert last["error"]["message"] == "the client reads too slowly."
    assert len(pieces) > 0
    assert all(piece["choices"][0]["finish_reason"] is None for piece in pieces)


def test_readers_that_are_slower_than_the_model(
    params: qjax.Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "_BACKLOG", 0)
    with serving(lambda: engine_of(params), buffer=4096) as patient:
        with Raw(patient, buffer=4096) as raw:
            raw.post("/v1/completions", STREAM)
            patient.until(lambda: patient.ended("abort") == 1)
            patient.idle()
            *_, last = events(raw.rest())
        assert last["error"]["message"] == "the client reads too slowly."
