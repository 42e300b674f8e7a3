"""Copies of a model that Ray Serve starts, stops, restarts and balances (pip install 'qjax[ray]').

    cd configs/serve
    serve run ray_serve:build model=smollm2-135m max_replicas=4
    serve run ray_serve:build model=org/name tensor_parallel_size=8 gpus=8 min_replicas=2
    curl localhost:8000 -d '{"prompt": "The capital of France is", "max_tokens": 16}'

`prompt` is a string, a list of messages or a list of token ids, as `qjax.generate` takes them; what
stands beside it are fields of `qjax.SamplingParams`. With `"stream": true` the text comes in
pieces, as server-sent events. Requests join the batch of their replica at once; one whose client
goes leaves it. Run as a program, `python ray_serve.py model=...`, it serves on all interfaces.
"""

import json
import signal
import sys
from collections.abc import AsyncGenerator
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

import qjax
from qjax.api import MAX_NUM_SEQS, encode
from qjax.engine.async_engine import AsyncEngine, Delta


class Options(BaseModel):
    """Arguments of `serve run`. `gpus` and `cpus` are what Ray keeps for a replica."""

    model_config = ConfigDict(extra="forbid")

    model: str = "smollm2-135m"
    min_replicas: int = 1
    max_replicas: int = 1
    gpus: float = 0
    cpus: float = 1
    # Of qjax.LLM:
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = MAX_NUM_SEQS
    numerics: str = "fast"
    tensor_parallel_size: int | None = None
    data_parallel_size: int = 1
    enable_expert_parallel: bool = False


@serve.deployment
class Model:
    """A replica: `generate` and `stream` for other deployments, by a handle; HTTP for the rest."""

    def __init__(self, model: str, **options: Any):
        llm = qjax.LLM(model, **options)
        self.params = llm.params
        self.engine = AsyncEngine(llm.engine)

    def check_health(self) -> None:
        """Ray calls this again and again, and replaces a replica where it raises."""
        self.engine.check()

    async def generate(self, prompt: Any, **sampling: Any) -> qjax.GenerationResult:
        """One prompt, one result."""
        return await self.engine.generate(*self._request(prompt, sampling))

    async def stream(self, prompt: Any, **sampling: Any) -> AsyncGenerator[str, None]:
        """The same in pieces of text."""
        async for delta in self.engine.stream(*self._request(prompt, sampling)):
            if delta.text:
                yield delta.text

    async def __call__(self, request: Request) -> Response:
        """POST runs a prompt; GET is answered as soon as that can be."""
        if request.method == "GET":
            self.engine.check()
            return JSONResponse({"model": self.params.source})
        try:
            asked = json.loads(await request.body())
            if not isinstance(asked, dict) or "prompt" not in asked:
                raise qjax.RequestError('send JSON: {"prompt": ...}')
            prompt, streams = asked.pop("prompt"), asked.pop("stream", False)
            if not streams:
                return JSONResponse(_summary(await self.generate(prompt, **asked)))
            deltas = self.engine.stream(*self._request(prompt, asked))
            first = await anext(deltas)  # what is refused is so before anything is sent
            return StreamingResponse(_events(first, deltas), media_type="text/event-stream")
        except (qjax.RequestError, json.JSONDecodeError, UnicodeDecodeError) as error:
            return JSONResponse({"error": str(error)}, status_code=400)

    def _request(
        self, prompt: Any, sampling: dict[str, Any]
    ) -> tuple[tuple[int, ...], qjax.SamplingParams]:
        params = qjax.SamplingParams.of(**sampling)
        if params.n != 1:
            raise qjax.RequestError(f"n must be 1 here, got {params.n}: send the request again.")
        return encode(self.params, prompt), params


def _summary(result: qjax.GenerationResult) -> dict[str, Any]:
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "prompt_tokens": len(result.prompt_token_ids),
    }


async def _events(first: Delta, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[str, None]:
    delta = first
    while delta.result is None:
        if delta.text:
            yield f"data: {json.dumps({'text': delta.text})}\n\n"
        delta = await anext(deltas)
    last = _summary(delta.result) | {"text": delta.text}
    yield f"data: {json.dumps(last)}\n\n"


def build(options: Options) -> serve.Application:
    """The application, for `serve run` and `serve deploy`."""
    engine = options.model_dump(exclude={"min_replicas", "max_replicas", "gpus", "cpus"})
    of_all = options.max_num_seqs * options.data_parallel_size
    deployment = Model.options(
        ray_actor_options={"num_gpus": options.gpus, "num_cpus": options.cpus},
        # As many again wait in the engine, where they join the batch as soon as there is room.
        max_ongoing_requests=2 * of_all,
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "max_replicas": max(options.min_replicas, options.max_replicas),
            "target_ongoing_requests": of_all,
        },
    )
    return deployment.bind(**engine)


if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    application = build(Options.model_validate(given))
    serve.start(http_options={"host": "0.0.0.0", "port": 8000})
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        serve.run(application, blocking=True)
    except KeyboardInterrupt:
        serve.delete("default")  # waits for the requests that run
    finally:
        serve.shutdown()
