"""The application: which path does what, and what every request goes through."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import qjax
from qjax.engine.engine import Engine
from qjax.engine.replicas import Replicas
from qjax.server import page, protocol
from qjax.server.auth import BearerAuth
from qjax.server.chat import Chat
from qjax.server.completions import Completion
from qjax.server.errors import ApiError, as_api_error
from qjax.server.limits import ClientGone
from qjax.server.reply import Reply
from qjax.server.service import Phase, Service, Settings
from qjax.server.tokens import detokenize, tokenize

logger = logging.getLogger("qjax.server")

# Paths that are asked every few seconds.
_QUIET = {"/health", "/metrics"}


def create_app(load: Callable[[], Engine | Replicas], settings: Settings) -> Starlette:
    """An ASGI application that serves one model.

    Args:
      load: makes the engine; called in a thread when the application starts, which answers
        meanwhile, /health with 503.
      settings: how to serve.

    Its `state.service` is the `Service`; with its `drain` the application ends well.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.service.start()
        try:
            yield
        finally:
            await app.state.service.close()

    service = Service(load, settings)
    app = Starlette(
        routes=[
            Route("/", chat_page, methods=["GET"]),
            Route("/health", health, methods=["GET"]),
            Route("/version", version, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
            Route("/v1/models", models, methods=["GET"]),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/tokenize", tokens, methods=["POST"]),
            Route("/detokenize", text, methods=["POST"]),
        ],
        middleware=[
            Middleware(_Boundary, service=service),
            Middleware(BearerAuth, keys=settings.api_keys),
        ],
        exception_handlers={HTTPException: _no_such_path},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


class _Boundary:
    """Counts and logs requests, and makes answers of errors."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        event: dict[str, Any] = {"method": scope["method"], "path": scope["path"][:200]}
        scope.setdefault("state", {})["event"] = event
        started = time.perf_counter()

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                event["status"] = message["status"]
            await send(message)

        # Whoever asks after the server's health does not keep it from ending.
        counted = contextlib.nullcontext() if scope["path"] in _QUIET else self._service.request()
        with counted:
            try:
                await self._app(scope, receive, noted)
            except ClientGone:
                event["status"] = 499  # as nginx calls it
            except Exception as error:
                told = as_api_error(error, event.pop("fields", ()))
                if told is None:
                    logger.exception("internal error")
                    told = ApiError(500, "internal error.")
                event["error"] = told.message[:500]
                if "status" not in event:  # or the connection is closed in the middle
                    await _answer(told, scope)(scope, receive, noted)
            event.pop("fields", None)
            event["seconds"] = round(time.perf_counter() - started, 4)
            level = logging.DEBUG if scope["path"] in _QUIET else logging.INFO
            logger.log(level, "request", extra=event)


def _answer(error: ApiError, scope: Scope) -> Response:
    if error.status == 401 and (scope["method"], scope["path"]) == ("GET", "/"):
        # A browser has no key to send: it gets the page, which asks for one.
        return page.response(401)
    return _json(error.body, error.status, error.headers)


def _json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    body = msgspec.json.encode(content)
    return Response(body, status, headers, media_type="application/json")


def _no_such_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:200]}: {error.detail}."
    return _json(ApiError(error.status_code, what).body, error.status_code, error.headers)


def _service(request: Request) -> Service:
    return request.app.state.service


async def chat_page(request: Request) -> Response:
    """GET /: the chat page."""
    return page.response(200)


async def health(request: Request) -> Response:
    """GET /health: 200 where requests are taken."""
    phase = _service(request).phase
    headers = {} if phase is Phase.ready else {"Retry-After": "1"}
    return _json({"status": phase.value}, 200 if phase is Phase.ready else 503, headers)


async def version(request: Request) -> Response:
    """GET /version"""
    return _json({"version": qjax.__version__})


async def metrics(request: Request) -> Response:
    """GET /metrics: for Prometheus."""
    return Response(_service(request).metrics.text(), media_type="text/plain; version=0.0.4")


async def models(request: Request) -> Response:
    """GET /v1/models: the model, under each of its names."""
    service = _service(request)
    model = service.model
    cards = [
        {
            "id": name,
            "object": "model",
            "created": model.created,
            "owned_by": "qjax",
            "root": service.settings.names[0],
            "parent": None,
            "max_model_len": model.max_model_len,
            "quantization": model.quantization,
        }
        for name in service.settings.names
    ]
    return _json({"object": "list", "data": cards})


async def _read(request: Request, kind: type[protocol.T]) -> protocol.T:
    """The request in the body, for the model that is served."""
    service = _service(request)
    _ = service.model  # refuses before the body is waited for
    body = await service.bodies.read(request)
    _ = service.model  # and after it
    request.state.event["fields"] = kind.__struct_fields__
    found = protocol.decode(body, kind)
    service.check_name(getattr(found, "model", None))
    return found


async def chat_completions(request: Request) -> ASGIApp:
    """POST /v1/chat/completions"""
    found = await _read(request, protocol.ChatRequest)
    return await _reply(request, found, lambda model: Chat(found, model))


async def completions(request: Request) -> ASGIApp:
    """POST /v1/completions"""
    found = await _read(request, protocol.CompletionRequest)
    return await _reply(request, found, lambda model: Completion(found, model))


async def _reply(
    request: Request, found: protocol.Sampling, understand: Callable[[Any], Any]
) -> ASGIApp:
    service = _service(request)
    protocol.check(found)
    # A long text takes a while to become tokens; others are answered meanwhile.
    asked = await asyncio.to_thread(understand, service.model)
    return Reply(service, asked, found, request.state.event)


async def tokens(request: Request) -> Response:
    """POST /tokenize"""
    found = await _read(request, protocol.TokenizeRequest)
    return _json(await asyncio.to_thread(tokenize, found, _service(request).model))


async def text(request: Request) -> Response:
    """POST /detokenize"""
    found = await _read(request, protocol.DetokenizeRequest)
    return _json(await asyncio.to_thread(detokenize, found, _service(request).model))
