"""`qjax serve` as a process: what it prints, how it ends, and what it refuses to begin with."""

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import qjax
from qjax.cli.main import main

pytestmark = pytest.mark.usefixtures("own_loggers")

ROOT = Path(__file__).parents[2]
KEY = "a-key-that-nobody-sees"


class Process:
    """A server as users start it; its log is read line by line."""

    def __init__(self, *options: str, **env: str):
        command = [sys.executable, "-m", "qjax", "serve", *options]
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--log-format", "json", "--no-warm-up"],
            env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **env},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []

    def event(self, name: str) -> dict[str, Any]:
        """The next line of the log that says so."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("{") and (found := json.loads(line))["event"] == name:
                return found
        raise AssertionError("".join(self.lines))

    def end(self) -> int:
        """Its exit code, and the rest of its log."""
        _, rest = self.process.communicate(timeout=120)
        self.lines.append(rest)
        return self.process.returncode


Start = Callable[..., Process]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[Process] = []

    def call(*options: str, **env: str) -> Process:
        started.append(Process(*options, **env))
        return started[-1]

    yield call
    for each in started:
        each.process.kill()
        each.process.communicate()


def test_it_serves_until_it_is_told_to_end(start: Start, golden: Path) -> None:
    model = str(golden / "gguf-Q4_1" / "model.gguf")
    config = str(ROOT / "configs/serve/cpu.yaml")
    options = "--config", config, "--max-model-len", "64", "--served-model-name", "tiny"
    served = start(model, *options, QJAX_API_KEY=KEY)
    url = served.event("listening")["address"]
    assert url.startswith("http://127.0.0.1:")
    ready = served.event("ready")
    assert (ready["model"], ready["method"], ready["qtype"]) == ("tiny", "gguf", "q4_1")
    assert ready["weights_bytes"] == qjax.load(model).nbytes
    assert (ready["max_model_len"], ready["max_num_seqs"]) == (64, 32)
    assert ready["cache_tokens"] >= 64
    headers = {"Authorization": f"Bearer {KEY}"}
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 8, "temperature": 0}
    assert httpx.post(f"{url}/v1/completions", json=asked, timeout=60).status_code == 401
    found = httpx.post(f"{url}/v1/completions", json=asked, headers=headers, timeout=60)
    assert found.status_code == 200
    assert (
        found.json()["choices"][0]["text"]
        == qjax.generate(qjax.load(model), "hello", max_tokens=8).text
    )
    served.process.send_signal(signal.SIGTERM)
    served.event("draining")
    assert served.end() == 0
    assert not any(KEY in line for line in served.lines)


def test_a_second_signal_ends_it_at_once(start: Start, golden: Path) -> None:
    model, guess = str(golden / "base-tiny-llama"), '{"method": "ngram"}'
    served = start(model, "--drain-timeout", "600", "--speculative-config", guess)
    url = httpx.URL(served.event("listening")["address"])
    served.event("ready")
    with socket.create_connection((url.host, url.port)) as client:
        head = "POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += "Expect: 100-continue\r\nContent-Length: 9\r\n\r\n"
        client.sendall(head.encode())
        assert client.recv(100).startswith(b"HTTP/1.1 100 ")  # it waits for the body
        served.process.send_signal(signal.SIGTERM)
        assert served.event("draining")["requests"] == 1
        served.process.send_signal(signal.SIGTERM)
        assert served.end() == 128 + signal.SIGTERM


def test_the_end_does_not_wait_for_a_model_that_is_loading() -> None:
    program = """
import time
from qjax.server import logs, run
from qjax.server.app import create_app
from qjax.server.service import Settings

logs.configure("json", "info")
run.serve(create_app(lambda: time.sleep(600), Settings(names=("never",))), "127.0.0.1", 0, 30)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = json.loads(process.stderr.readline())["address"]
        assert httpx.get(f"{url}/health", timeout=60).json() == {"status": "loading"}
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0


def test_a_model_that_is_not_there(start: Start, tmp_path: Path) -> None:
    served = start(str(tmp_path))
    served.event("failed")
    assert served.end() == 1
    assert served.lines[-1].startswith(f"qjax: {tmp_path}")
    assert served.lines[-1].count("\n") == 1


def test_https(start: Start, golden: Path, tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl")
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-keyout", key, "-out", certificate, "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    options = "--ssl-keyfile", key, "--ssl-certfile", certificate
    served = start(str(golden / "base-tiny-llama"), *options, "--ssl-ca-certs", certificate)
    url = served.event("listening")["address"]
    served.event("ready")
    assert url.startswith("https://127.0.0.1:")
    stranger = ssl.create_default_context(cafile=certificate)
    known = ssl.create_default_context(cafile=certificate)
    known.load_cert_chain(certificate, key)
    with httpx.Client(verify=known, timeout=60) as client:
        assert client.get(f"{url}/health").json() == {"status": "ready"}
    with httpx.Client(verify=stranger, timeout=60) as client, pytest.raises(httpx.TransportError):
        client.get(f"{url}/health")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


@contextmanager
def busy_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_what_it_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with busy_port() as port:
        for options, message in (
            (["--port", str(port)], f"cannot listen on 127.0.0.1:{port}: Address already in use"),
            (["--host", "256.0.0.1"], "cannot listen on 256.0.0.1:8000: "),
            (["--api-key", ""], "--api-key (QJAX_API_KEY) must not be empty."),
            (
                ["--speculative-config", "[]"],
                "--speculative-config must be a JSON object, got '[]'",
            ),
            (["--ssl-keyfile", "x"], "--ssl-keyfile and --ssl-ca-certs go with --ssl-certfile."),
            (["--ssl-certfile", str(tmp_path / "x")], f"cannot use {tmp_path / 'x'} for TLS: "),
        ):
            with pytest.raises(SystemExit) as ended:
                main(["serve", *options])
            assert ended.value.code == 1
            assert f"qjax: {message}" in capsys.readouterr().err


def test_an_empty_key_in_the_environment_is_no_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QJAX_API_KEY", "")
    with pytest.raises(SystemExit):
        main(["serve"])
    assert "must not be empty" in capsys.readouterr().err
