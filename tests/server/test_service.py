"""A server's life: loading, ready, draining, failed; who may use it; what it says of itself."""

import base64
import hashlib
import json
import logging
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import qjax
from qjax.server import logs, protocol
from tests.server.conftest import PAGES, Raw, Running, engine_of, serving

KEYS = "first-key", "zweiter-schlüssel"
HELLO = [{"role": "user", "content": "hello"}]
LONG = {"prompt": "a", "max_tokens": 200, "ignore_eos": True, "temperature": 0}
CLOSING = "the server is shutting down."


def bearer(key: str) -> dict[str, bytes]:
    return {"Authorization": b"Bearer " + key.encode()}


@pytest.fixture(scope="module")
def guarded(params: qjax.Params) -> Iterator[Running]:
    with serving(lambda: engine_of(params), api_keys=KEYS, log_prompts=True) as guarded:
        yield guarded


def test_loading(params: qjax.Params) -> None:
    """The port is open before there is a model."""
    loaded = threading.Event()

    def load() -> qjax.Engine:
        assert loaded.wait(60)
        return engine_of(params)

    with serving(load, wait=False) as running:
        found = running.get("/health")
        assert (found.status_code, found.json()) == (503, {"status": "loading"})
        for found in (
            running.get("/v1/models"),
            running.post("/v1/completions", {"prompt": "a"}),
            running.post("/tokenize", {"prompt": "a"}),
        ):
            assert found.status_code == 503
            assert int(found.headers["retry-after"]) > 0
            assert found.json()["error"]["message"] == "the model is still loading."
        assert running.get("/version").json() == {"version": qjax.__version__}
        assert "qjax:request_success" in running.get("/metrics").text
        loaded.set()
        running.until(lambda: running.get("/health").status_code == 200)
        assert running.post("/tokenize", {"prompt": "a"}).status_code == 200


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    def load() -> qjax.Engine:
        raise qjax.CheckpointError("no such file", file="model.gguf")

    with serving(load, wait=False) as running:
        running.thread.join(60)
        assert str(running.service.error) == "model.gguf: no such file"


def test_an_engine_that_fails_ends_the_server(
    params: qjax.Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: qjax.Engine) -> list[Any]:
        raise MemoryError("no memory left")

    with serving(lambda: engine_of(params)) as running:
        monkeypatch.setattr(qjax.Engine, "step", fails)
        found = running.post("/v1/completions", {"prompt": "a"})
        assert found.status_code == 500
        assert found.json()["error"]["type"] == "server_error"
        assert "no memory left" in found.json()["error"]["message"]
        running.thread.join(60)
        assert isinstance(running.service.error, qjax.EngineError)


def test_draining_lets_requests_finish(params: qjax.Params, gate: threading.Event) -> None:
    with serving(lambda: engine_of(params), drain_seconds=60) as running:
        with Raw(running) as raw:
            gate.clear()
            raw.post("/v1/completions", json.dumps(LONG).encode())
            running.until(lambda: running.service.sequences == 1)
            running.drain()
            running.until(lambda: running.get("/health").status_code == 503)
            assert running.get("/health").json() == {"status": "draining"}
            refused = running.post("/v1/completions", {"prompt": "a"})
            assert refused.status_code == 503
            assert refused.json()["error"]["message"] == CLOSING
            gate.set()
            status, found = raw.answer()
        assert status == 200
        assert found["usage"]["completion_tokens"] == 200
        running.thread.join(60)
        assert running.service.error is None


def test_who_does_not_finish_in_time_is_told(params: qjax.Params, gate: threading.Event) -> None:
    with serving(lambda: engine_of(params), drain_seconds=0) as running:
        with Raw(running) as whole, Raw(running) as stream, Raw(running) as slow:
            slow.post("/v1/completions", b"{", length=100)
            stream.post("/v1/completions", json.dumps({**LONG, "stream": True}).encode())
            assert stream.socket.recv(12) == b"HTTP/1.1 200"
            gate.clear()
            whole.post("/v1/completions", json.dumps(LONG).encode())
            running.until(lambda: running.service.sequences == 2)
            running.drain()
            for status, found in (whole.answer(), slow.answer()):
                assert status == 503
                assert found["error"]["message"] == CLOSING
            *_, last, done = [line for line in stream.rest().split(b"\n") if b"data: " in line]
            assert json.loads(last.removeprefix(b"data: "))["error"]["message"] == CLOSING
            assert done == b"data: [DONE]"
            gate.set()
        running.thread.join(60)
        assert running.service.error is None


PATHS = [
    *("/v1/models", "/version", "/metrics", "/nothing", "/health/", "//health", "/health%2f"),
    *("/HEALTH", "/v1/../health", "/;/health", "/health;a=b"),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST"])
def test_keys_guard_every_path(guarded: Running, path: str, method: str) -> None:
    with Raw(guarded) as raw:  # as it is, which no client sends
        raw.socket.sendall(
            f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
        )
        head = raw.rest()
    assert head.startswith(b"HTTP/1.1 401 ")
    assert b"www-authenticate: Bearer" in head


@pytest.mark.parametrize(
    "header",
    [
        *("", "Bearer", "Bearer first-ke", "Bearer first-keys", "bearer FIRST-KEY"),
        *("Basic first-key", "first-key", "Bearer first-key first-key", "Bearer first-key,a"),
    ],
)
def test_wrong_keys(guarded: Running, header: str) -> None:
    found = guarded.post("/v1/completions", {"prompt": "a"}, headers={"Authorization": header})
    assert found.status_code == 401
    assert found.json()["error"]["code"] == "invalid_api_key"
    assert not any(key in found.text for key in KEYS)


def test_right_keys(guarded: Running) -> None:
    assert guarded.get("/health").status_code == 200
    for key in KEYS:
        assert guarded.get("/v1/models", headers=bearer(key)).status_code == 200
    with guarded.client(KEYS[0]) as client:
        assert client.models.list().data


def test_what_is_logged(
    guarded: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "_warned", set())
    guarded.until(lambda: guarded.service.requests == 0)
    caplog.set_level(logging.INFO, "qjax.server")
    asked = {"messages": HELLO, "max_tokens": 3, "ignore_eos": True, "temperature": 0}
    headers = bearer(KEYS[0])
    found = guarded.post("/v1/chat/completions", {**asked, "unheard_of": 1}, headers=headers)
    guarded.post("/v1/chat/completions", {**asked, "unheard_of": 2}, headers=headers)
    guarded.get("/%0afake", headers=bearer("wrong"))
    guarded.until(lambda: guarded.service.requests == 0)
    records = [vars(record) for record in caplog.records]
    first, second, wrong = [r for r in records if r["msg"] == "request"]
    assert (first["status"], first["path"]) == (200, "/v1/chat/completions")
    assert (first["prompt_tokens"], first["completion_tokens"]) == (
        found.json()["usage"]["prompt_tokens"],
        3,
    )
    assert first["finish_reason"] == "length"
    assert first["id"] == found.json()["id"]
    assert first["seconds"] > first["ttft"] > 0
    assert "hello" in first["prompt"]  # it was asked for
    assert first["text"] == [found.json()["choices"][0]["message"]["content"]]
    assert second["status"] == 200
    assert wrong["status"] == 401
    assert [r["field"] for r in records if r["msg"] == "unknown field ignored"] == ["unheard_of"]
    assert not any(key in str(record) for key in KEYS for record in records)


def test_prompts_are_not_logged_unasked(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    running.until(lambda: running.service.requests == 0)
    caplog.set_level(logging.DEBUG, "qjax.server")
    secret = "xylophone"
    running.post("/v1/completions", {"prompt": secret, "max_tokens": 1, "temperature": 0})
    running.post("/v1/completions", {"prompt": f"{secret} " * 300})
    running.until(lambda: running.service.requests == 0)
    records = [vars(record) for record in caplog.records]
    # Who asked for the health of the server before is not waited for: a line of DEBUG may be late.
    asked = [r for r in records if r["msg"] == "request" and r["levelno"] >= logging.INFO]
    assert [r["status"] for r in asked] == [200, 400]
    assert secret not in str(records)


@pytest.mark.usefixtures("own_loggers")
@pytest.mark.parametrize("form", logs.FORMATS)
def test_lines_of_the_log(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(form, "info")
    logging.getLogger("qjax.server").info("request", extra={"path": "/\nfake", "status": 404})
    line, end = capsys.readouterr().err.split("\n")
    assert end == ""
    if form == "json":
        found = json.loads(line)
        assert found.pop("time").endswith("+00:00")
        assert found == {"level": "info", "event": "request", "path": "/\nfake", "status": 404}
    else:
        assert line.endswith('info request path="/\\nfake" status=404')


def test_metrics(running: Running) -> None:
    """Read by Prometheus' own parser: vLLM's names, and numbers that add up."""

    def read() -> dict[str, float]:
        families = text_string_to_metric_families(running.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        assert all(sample.labels["model_name"] == "tiny" for sample in samples)
        return {
            sample.name + sample.labels.get("finished_reason", ""): sample.value
            for sample in samples
            if not sample.name.endswith("_bucket")
        }

    options = {"max_tokens": 5, "ignore_eos": True, "temperature": 0}
    running.post("/v1/completions", {"prompt": [[3, 4]], **options})
    before = read()
    running.post("/v1/completions", {"prompt": [[3, 4, 5], [6, 7]], **options})
    running.idle()
    after = read()
    assert after["qjax:num_requests_running"] == 0
    assert after["qjax:num_requests_waiting"] == 0
    assert after["qjax:kv_cache_usage_perc"] == 0
    gained = {name: value - before[name] for name, value in after.items() if value != before[name]}
    assert gained["qjax:request_success_totallength"] == 2
    assert gained["qjax:prompt_tokens_total"] == 5
    assert gained["qjax:generation_tokens_total"] == 10
    assert gained["qjax:time_to_first_token_seconds_count"] == 2
    assert gained["qjax:inter_token_latency_seconds_count"] == 8
    assert gained["qjax:e2e_request_latency_seconds_count"] == 2
    first = gained["qjax:time_to_first_token_seconds_sum"]
    rest = gained["qjax:inter_token_latency_seconds_sum"]
    assert 0 < first + rest <= gained["qjax:e2e_request_latency_seconds_sum"]
    for name in ("prefix_cache_queries", "prefix_cache_hits", "num_preemptions"):
        assert f"qjax:{name}_total" in after


class Page(HTMLParser):
    """Scripts and styles of a page, and addresses in it."""

    def __init__(self, text: str):
        super().__init__()
        self.inside = ""
        self.parts: dict[str, str] = {}
        self.addresses: list[str | None] = []
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag
        for name, value in attrs:
            if name in ("src", "href", "action"):
                self.addresses.append(value)
            if name.startswith("on") or name == "style":
                self.handlers.append(name)

    def handle_data(self, data: str) -> None:
        if self.inside in ("script", "style"):
            self.parts[self.inside] = self.parts.get(self.inside, "") + data
            self.inside = ""


def test_chat_page(running: Running, guarded: Running) -> None:
    found = running.get("/")
    assert found.status_code == 200
    assert found.headers["content-type"].startswith("text/html")
    page = Page(found.text)
    policy = found.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.parts[name].encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert page.addresses == ["data:,"]
    assert page.handlers == []
    assert not any(word in found.text for word in ("innerHTML", "localStorage", "eval("))
    # A browser that asks for the page has no key to send: it is refused, and asked for one.
    refused = guarded.get("/")
    assert (refused.status_code, refused.text) == (401, found.text)
    assert guarded.post("/", {}).json()["error"]["code"] == "invalid_api_key"
    assert guarded.get("/", headers=bearer(KEYS[1])).status_code == 200


def test_cache_is_as_large_as_it_says(running: Running) -> None:
    stats = running.service.stats()
    assert stats is not None
    assert stats.num_blocks == stats.num_free_blocks == PAGES
