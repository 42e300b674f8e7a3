"""`qjax bench serve`: how a server fares under load, as its clients see it."""

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qjax.errors import RequestError

if TYPE_CHECKING:
    from qjax.bench.serving.client import Outcome, Server
    from qjax.bench.serving.load import Run

PROMPTS, LOAD, RESULTS = "Prompts", "Load", "Results"
SETTINGS = {"allow_extra_args": True}
# The most different errors that are shown.
_ERRORS = 10


class Dataset(StrEnum):
    random = "random"
    custom = "custom"


def serve(
    context: typer.Context,
    base_url: Annotated[
        str | None,
        typer.Option("--base-url", help="Of any server with OpenAI's interface, without /v1."),
    ] = None,
    host: Annotated[str, typer.Option("--host")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8000,
    endpoint: Annotated[
        str, typer.Option("--endpoint", help="/v1/completions or /v1/chat/completions.")
    ] = "/v1/completions",
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="As served; by default its first one.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="OPENAI_API_KEY", help="Sent as a bearer token."),
    ] = None,
    dataset_name: Annotated[
        Dataset, typer.Option("--dataset-name", rich_help_panel=PROMPTS)
    ] = Dataset.random,
    dataset_path: Annotated[
        Path | None,
        typer.Option(
            "--dataset-path",
            help='For custom: a .jsonl of {"prompt": ..., "output_tokens": ...}, or a text with a '
            "prompt a line.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    num_prompts: Annotated[
        int, typer.Option("--num-prompts", min=1, max=1_000_000, rich_help_panel=PROMPTS)
    ] = 1000,
    random_input_len: Annotated[
        int, typer.Option("--random-input-len", help="Tokens.", rich_help_panel=PROMPTS)
    ] = 1024,
    random_output_len: Annotated[
        int, typer.Option("--random-output-len", help="Tokens.", rich_help_panel=PROMPTS)
    ] = 128,
    random_range_ratio: Annotated[
        float,
        typer.Option(
            "--random-range-ratio",
            help="Lengths are drawn from [L (1 - r), L (1 + r)].",
            rich_help_panel=PROMPTS,
        ),
    ] = 0.0,
    random_prefix_len: Annotated[
        int,
        typer.Option(
            "--random-prefix-len", help="Tokens that all begin with.", rich_help_panel=PROMPTS
        ),
    ] = 0,
    custom_output_len: Annotated[
        int,
        typer.Option(
            "--custom-output-len",
            help="Tokens, where the file does not say.",
            min=1,
            rich_help_panel=PROMPTS,
        ),
    ] = 256,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            help="A model, or a folder with tokenizer.json, whose tokens random prompts are "
            "measured in; by default the server's, if it has /tokenize; else a word is a token.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    ignore_eos: Annotated[
        bool | None,
        typer.Option(
            "--ignore-eos/--no-ignore-eos",
            help="Generate to the full length; by default where prompts are random.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="By default the server's.", rich_help_panel=PROMPTS),
    ] = None,
    extra_body: Annotated[
        str | None,
        typer.Option(
            "--extra-body", help="More fields of each request, as JSON.", rich_help_panel=PROMPTS
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", help="Of prompts and arrivals.", min=0, rich_help_panel=PROMPTS)
    ] = 0,
    request_rate: Annotated[
        float,
        typer.Option(
            "--request-rate",
            help="Requests a second that arrive, whether the server keeps up or not; inf sends all "
            "at once.",
            rich_help_panel=LOAD,
        ),
    ] = math.inf,
    burstiness: Annotated[
        float,
        typer.Option(
            "--burstiness",
            help="1 is a Poisson process, less is burstier, inf is evenly spaced.",
            rich_help_panel=LOAD,
        ),
    ] = 1.0,
    max_concurrency: Annotated[
        int | None,
        typer.Option(
            "--max-concurrency", help="Most requests at a time.", min=1, rich_help_panel=LOAD
        ),
    ] = None,
    num_warmups: Annotated[
        int,
        typer.Option(
            "--num-warmups",
            help="Requests of the same kind beforehand, which do not count.",
            min=0,
            rich_help_panel=LOAD,
        ),
    ] = 0,
    goodput: Annotated[
        list[str] | None,
        typer.Option(
            "--goodput",
            help="Objectives in milliseconds, of ttft, tpot and e2el: --goodput ttft:500 tpot:50.",
            rich_help_panel=RESULTS,
        ),
    ] = None,
    percentile_metrics: Annotated[
        str, typer.Option("--percentile-metrics", rich_help_panel=RESULTS)
    ] = "ttft,tpot,itl,e2el",
    metric_percentiles: Annotated[
        str, typer.Option("--metric-percentiles", rich_help_panel=RESULTS)
    ] = "99",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON.", rich_help_panel=RESULTS)
    ] = False,
    save_result: Annotated[
        bool, typer.Option("--save-result", help="Write a JSON file.", rich_help_panel=RESULTS)
    ] = False,
    save_detailed: Annotated[
        bool,
        typer.Option(
            "--save-detailed", help="With the times of each request.", rich_help_panel=RESULTS
        ),
    ] = False,
    result_dir: Annotated[
        Path | None, typer.Option("--result-dir", rich_help_panel=RESULTS)
    ] = None,
    result_filename: Annotated[
        str | None,
        typer.Option(
            "--result-filename",
            help="By default, of load, model and date.",
            rich_help_panel=RESULTS,
        ),
    ] = None,
    disable_tqdm: Annotated[
        bool, typer.Option("--disable-tqdm", help="No progress bar.", rich_help_panel=RESULTS)
    ] = False,
) -> None:
    """Send requests to a server and measure what its clients see, as `vllm bench serve` does."""
    from tqdm import tqdm

    from qjax.bench.serving import client, load, prompts
    from qjax.bench.serving.connection import Address
    from qjax.bench.serving.metrics import flat, metrics, parse_objectives
    from qjax.bench.serving.summary import summary

    # As in vLLM's command line, several may follow one --goodput.
    if context.args and not goodput:
        raise typer.BadParameter(f"unexpected: {' '.join(context.args)}")
    objectives = parse_objectives([*(goodput or ()), *context.args])
    shown = _times(percentile_metrics)
    percentiles = _percentiles(metric_percentiles)
    due = load.arrivals(num_prompts, request_rate, burstiness, seed)
    is_random = dataset_name is Dataset.random
    if is_random != (dataset_path is None):
        raise typer.BadParameter("--dataset-path belongs to --dataset-name custom")
    sizes = prompts.Random(
        random_input_len, random_output_len, random_range_ratio, random_prefix_len
    )
    count = num_prompts + num_warmups
    extra = _object("extra_body", extra_body)
    if temperature is not None:
        extra["temperature"] = temperature
    address = Address.of(base_url or f"http://{f'[{host}]' if ':' in host else host}:{port}")
    server = client.Server(
        address,
        model or "",
        endpoint,
        api_key,
        ignore_eos=is_random if ignore_eos is None else ignore_eos,
        extra=extra,
    )

    async def measured() -> tuple["Server", "Run"]:
        asked = server if model else await client.first_model(server)
        if is_random:
            tokens = (
                prompts.counted_with(tokenizer) if tokenizer else await prompts.counted_by(asked)
            )
            samples = await prompts.random_samples(sizes, count, seed, tokens)
        else:
            assert dataset_path is not None
            samples = prompts.file_samples(dataset_path, count, custom_output_len)
        with tqdm(total=num_prompts, unit="request", disable=True if disable_tqdm else None) as bar:
            ran = await load.benchmark(
                asked,
                samples[:num_prompts],
                due,
                warmups=samples[num_prompts:],
                max_concurrency=max_concurrency,
                done=bar.update,
            )
        return asked, ran

    asked, ran = asyncio.run(measured())
    found = metrics(ran.outcomes, ran.duration, percentiles=percentiles, objectives=objectives)
    report = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "base_url": str(address),
        "endpoint": endpoint,
        "model_id": asked.model,
        "tokenizer_id": tokenizer,
        "dataset_name": dataset_name.value,
        "num_prompts": num_prompts,
        "seed": seed,
        "request_rate": "inf" if math.isinf(request_rate) else request_rate,
        "burstiness": "inf" if math.isinf(burstiness) else burstiness,
        "max_concurrency": max_concurrency,
        "client_seconds": ran.client_seconds,
        **flat(found, shown),
    }
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        limits = {"request_rate": request_rate, "max_concurrency": max_concurrency}
        typer.echo(summary(found, times=shown, **limits))
    if save_result or save_detailed or result_filename:
        path = (result_dir or Path()) / (result_filename or _name(report))
        path.parent.mkdir(parents=True, exist_ok=True)
        details = _details(ran.outcomes) if save_detailed else {}
        path.write_text(json.dumps(report | details) + "\n")
    errors = Counter(one.error for one in ran.outcomes if one.error)
    for error, number in errors.most_common(_ERRORS):
        typer.echo(f"{number} failed: {error}", err=True)
    if not found.completed:
        raise typer.Exit(1)


def _times(text: str) -> list[str]:
    from qjax.bench.serving.metrics import TIMES

    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in TIMES:
            raise RequestError(f"percentile_metrics must be of {', '.join(TIMES)}, got {name!r}.")
    return names


def _percentiles(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",") if part]
    except ValueError:
        found = [math.nan]
    if not all(0 <= p <= 100 for p in found):
        raise RequestError(f"metric_percentiles must be numbers in [0, 100], got {text!r}.")
    return found


def _object(name: str, text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RequestError(f"{name} must be an object in JSON, got {text!r}.")
    return found


def _name(report: dict[str, Any]) -> str:
    """As vLLM names its files."""
    limit = report["max_concurrency"]
    concurrency = "" if limit is None else f"-concurrency{limit}"
    model = report["model_id"].rpartition("/")[2]
    return f"openai-{report['request_rate']}qps{concurrency}-{model}-{report['date']}.json"


def _details(outcomes: Sequence["Outcome"]) -> dict[str, Any]:
    return {
        "input_lens": [one.prompt_len for one in outcomes],
        "output_lens": [one.output_len for one in outcomes],
        "ttfts": [one.ttft for one in outcomes],
        "itls": [one.itl for one in outcomes],
        "latencies": [one.latency for one in outcomes],
        "start_times": [one.start for one in outcomes],
        "queue_times": [one.queued for one in outcomes],
        "errors": [one.error for one in outcomes],
    }


command = serve
