"""`qjax serve`: a model behind OpenAI's endpoints."""

import json
import os
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qjax.cli import config_file, options, processes

if TYPE_CHECKING:
    from qjax.engine.engine import Engine
    from qjax.engine.replicas import Replicas
    from qjax.params import Params

SERVER = "Server"
ENGINE = "Engine"


class LogFormat(StrEnum):
    text = "text"
    json = "json"


class LogLevel(StrEnum):
    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


def serve(
    model: Annotated[
        str,
        typer.Argument(help="A built-in name, a GGUF file, a folder, or org/name[:variant]."),
    ] = options.DEFAULT_MODEL,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on.", rich_help_panel=SERVER)
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            "--port", help="0 takes a free one.", min=0, max=65535, rich_help_panel=SERVER
        ),
    ] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            help="A key that requests must bring, as bearer; may be repeated.",
            envvar="QJAX_API_KEY",
            rich_help_panel=SERVER,
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            "--served-model-name",
            help="The model's name in requests; may be repeated. Default: as it is given here.",
            rich_help_panel=SERVER,
        ),
    ] = None,
    max_queue: Annotated[
        int,
        typer.Option(
            "--max-queue",
            help="Most sequences that wait; more are refused (429).",
            min=0,
            rich_help_panel=SERVER,
        ),
    ] = 1024,
    drain_timeout: Annotated[
        float,
        typer.Option(
            "--drain-timeout",
            help="Seconds that requests may go on after SIGTERM.",
            min=0,
            rich_help_panel=SERVER,
        ),
    ] = 30.0,
    ssl_keyfile: Annotated[
        str | None, typer.Option("--ssl-keyfile", help="For HTTPS.", rich_help_panel=SERVER)
    ] = None,
    ssl_certfile: Annotated[
        str | None, typer.Option("--ssl-certfile", help="For HTTPS.", rich_help_panel=SERVER)
    ] = None,
    ssl_ca_certs: Annotated[
        str | None,
        typer.Option(
            "--ssl-ca-certs",
            help="Clients must show a certificate that one of these has signed.",
            rich_help_panel=SERVER,
        ),
    ] = None,
    log_format: Annotated[
        LogFormat, typer.Option("--log-format", rich_help_panel=SERVER)
    ] = LogFormat.text,
    log_level: Annotated[
        LogLevel, typer.Option("--log-level", rich_help_panel=SERVER)
    ] = LogLevel.info,
    log_prompts: Annotated[
        bool,
        typer.Option(
            "--log-prompts", help="Write prompts and answers to the log.", rich_help_panel=SERVER
        ),
    ] = False,
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(
            "--max-num-seqs",
            help="Most sequences that run at a time; default 32, on an accelerator 128.",
            min=1,
            rich_help_panel=ENGINE,
        ),
    ] = None,
    max_num_batched_tokens: Annotated[
        int,
        typer.Option(
            "--max-num-batched-tokens",
            help="Most tokens of a step; longer prompts go in chunks.",
            min=1,
            rich_help_panel=ENGINE,
        ),
    ] = 2048,
    gpu_memory_utilization: Annotated[
        float,
        typer.Option(
            "--gpu-memory-utilization",
            help="Share of an accelerator's memory for weights and cache.",
            rich_help_panel=ENGINE,
        ),
    ] = 0.9,
    kv_cache_memory_bytes: Annotated[
        int | None,
        typer.Option(
            "--kv-cache-memory-bytes", help="Or, instead, the cache's size.", rich_help_panel=ENGINE
        ),
    ] = None,
    kv_cache_dtype: options.KVCacheDtype = "auto",
    kv_cache_dtype_skip_layers: options.KVCacheSkipLayers = None,
    enable_prefix_caching: Annotated[
        bool,
        typer.Option(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            help="Keep what prompts have in common.",
            rich_help_panel=ENGINE,
        ),
    ] = True,
    speculative_config: Annotated[
        str | None,
        typer.Option(
            "--speculative-config",
            help='Guess tokens ahead: JSON such as {"method": "ngram"} or {"model": "org/name"}.',
            rich_help_panel=ENGINE,
        ),
    ] = None,
    quantization: Annotated[
        str | None,
        typer.Option("--quantization", help='Quantize full-precision weights, such as to "fp8".'),
    ] = None,
    numerics: options.NumericsOption = options.Numerics.fast,
    seed: options.Seed = None,
    warm_up: Annotated[
        bool,
        typer.Option(
            "--warm-up/--no-warm-up",
            help="Compile all sizes before the first request.",
            rich_help_panel=ENGINE,
        ),
    ] = True,
    tensor_parallel_size: processes.TensorParallelSize = None,
    data_parallel_size: Annotated[
        int,
        typer.Option(
            "--data-parallel-size",
            help="Copies of the model, each on devices of its own.",
            min=1,
            rich_help_panel=processes.PANEL,
        ),
    ] = 1,
    enable_expert_parallel: processes.EnableExpertParallel = False,
    all_reduce: processes.AllReduce = "float32",
    distributed: processes.Distributed = False,
    coordinator_address: processes.CoordinatorAddress = None,
    num_processes: processes.NumProcesses = None,
    process_id: processes.ProcessId = None,
    config: config_file.Config = None,
) -> None:
    """Serve a model behind OpenAI's endpoints, and a page to chat with it."""
    _check_installed()
    import qjax
    from qjax.engine import serving
    from qjax.llm import speculative
    from qjax.server import logs, run
    from qjax.server.app import create_app
    from qjax.server.service import Settings

    if os.environ.get("QJAX_API_KEY") == "" or not all(api_key or ["none"]):
        raise qjax.RequestError("--api-key (QJAX_API_KEY) must not be empty.")
    if (ssl_keyfile or ssl_ca_certs) and not ssl_certfile:
        raise qjax.RequestError("--ssl-keyfile and --ssl-ca-certs go with --ssl-certfile.")
    guessing = _object(speculative_config)
    logs.configure(log_format.value, log_level.value)
    settings = Settings(
        names=tuple(served_model_name or [model]),
        api_keys=tuple(api_key or ()),
        max_queue=max_queue,
        log_prompts=log_prompts,
    )
    tls = {"ssl_keyfile": ssl_keyfile, "ssl_certfile": ssl_certfile, "ssl_ca_certs": ssl_ca_certs}
    with processes.joined(distributed, coordinator_address, num_processes, process_id) as group:
        mesh = processes.mesh_of(
            group, tensor_parallel_size, enable_expert_parallel, data_parallel_size
        )

        def load() -> "Params | None":
            params = qjax.load(model, quantization=quantization, mesh=mesh, all_reduce=all_reduce)
            return params if group is None or group.lead(params) else None

        def make() -> "Engine | Replicas":
            params = load()
            assert params is not None
            engine = serving.serving_engine(
                params,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
                gpu_memory_utilization=gpu_memory_utilization,
                kv_cache_memory_bytes=kv_cache_memory_bytes,
                max_num_batched_tokens=max_num_batched_tokens,
                enable_prefix_caching=enable_prefix_caching,
                numerics=numerics.value,
                kv_cache_dtype=kv_cache_dtype,
                kv_cache_dtype_skip_layers=kv_cache_dtype_skip_layers or (),
                speculative=speculative(guessing),
                seed=seed,
            )
            if warm_up:
                serving.warm_up(engine)
            return engine

        if group is not None and group.process_id > 0:
            load()  # and does what process 0 does, until that ends
            return
        run.serve(create_app(make, settings), host, port, drain_timeout, **tls)


def _check_installed() -> None:
    """Raises UnsupportedError where the server's packages are missing."""
    from importlib.util import find_spec

    from qjax.errors import UnsupportedError

    names = "starlette", "uvicorn", "msgspec", "prometheus_client"
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            f"qjax serve needs {', '.join(missing)}: run `pip install 'qjax[server]'`."
        )


def _object(text: str | None) -> dict[str, Any] | None:
    """What --speculative-config says."""
    from qjax.errors import RequestError

    if text is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise RequestError(f"--speculative-config must be a JSON object, got {text[:80]!r}.")
    return found


command = serve
