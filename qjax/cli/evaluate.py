"""`qjax eval`: what quantization costs, as perplexity or as divergence from another model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from qjax.cli import options
from qjax.errors import RequestError

app = typer.Typer(help="Measure what quantization costs.", no_args_is_help=True)


class Format(StrEnum):
    md = "md"
    json = "json"


class Convention(StrEnum):
    llama_cpp = "llama.cpp"
    lm_eval = "lm-eval"


ModelArgument = Annotated[
    str, typer.Argument(help="A built-in name, a GGUF file, a folder, or org/name[:variant].")
]
File = Annotated[
    Path,
    typer.Option(
        "--file", "-f", help='The text, UTF-8; or documents, one {"text": ...} a line of a .jsonl.'
    ),
]
Window = Annotated[int, typer.Option("--window", "-c", help="Tokens of a window.")]
MaxWindows = Annotated[
    int | None, typer.Option("--max-windows", help="Only so many, from the start of the text.")
]
Output = Annotated[Format, typer.Option("--output", "-o", help="md or json.")]


@app.command()
def ppl(
    model: ModelArgument,
    file: File,
    convention: Annotated[
        Convention,
        typer.Option(
            "--convention",
            help="llama.cpp: of tokens, in windows of equal length. lm-eval: of words and bytes, "
            "document by document.",
        ),
    ] = Convention.llama_cpp,
    window: Annotated[
        int | None,
        typer.Option(
            "--window",
            "-c",
            help="Tokens of a window, by default 512, and for lm-eval what the model can read.",
        ),
    ] = None,
    max_windows: MaxWindows = None,
    numerics: options.NumericsOption = options.Numerics.exact,
    kv_cache_dtype: options.KVCacheDtype = "auto",
    kv_cache_dtype_skip_layers: options.KVCacheSkipLayers = None,
    output: Output = Format.md,
) -> None:
    """Perplexity of a text, as llama-perplexity or as lm-eval counts it."""
    import qjax
    from qjax import evaluate

    documents = read_documents(file)
    params = qjax.load(model)
    rounding: dict[str, Any] = {
        "numerics": numerics.value,
        "kv_cache_dtype": kv_cache_dtype,
        "kv_cache_dtype_skip_layers": kv_cache_dtype_skip_layers or (),
        "progress": progress,
    }
    if convention is Convention.lm_eval:
        if max_windows is not None:
            raise RequestError("--max-windows: lm-eval counts whole documents; shorten the file.")
        found = evaluate.rolling_perplexity(params, documents, window=window, **rounding)
        line = str(found)
    else:
        text = "\n\n".join(documents)
        length = 512 if window is None else window
        found = evaluate.perplexity(
            params, text, window=length, max_windows=max_windows, **rounding
        )
        counts = f"{found.tokens} tokens, {found.windows} windows of {found.window}"
        line = f"perplexity {found} ({counts})"
    typer.echo(json.dumps(asdict(found), indent=2) if output is Format.json else line)


@app.command()
def kld(
    base: ModelArgument,
    models: Annotated[list[str], typer.Argument(help="What is compared with it, one or more.")],
    file: File,
    window: Window = 512,
    max_windows: MaxWindows = None,
    numerics: options.NumericsOption = options.Numerics.exact,
    kv_cache_dtype: options.KVCacheDtype = "auto",
    kv_cache_dtype_skip_layers: options.KVCacheSkipLayers = None,
    output: Output = Format.md,
) -> None:
    """KL divergence of models from their base, on a text; numerics and cache are the models'."""
    import qjax
    from qjax import evaluate

    text = "\n\n".join(read_documents(file))
    params = qjax.load(base)
    exactly = evaluate.reference(
        params, text, window=window, max_windows=max_windows, progress=progress
    )
    found = {
        model: evaluate.divergence(
            exactly,
            params if model == base else qjax.load(model),
            numerics=numerics.value,
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_dtype_skip_layers=kv_cache_dtype_skip_layers or (),
            progress=progress,
        )
        for model in models
    }
    if output is Format.json:
        rows = [{"model": model, **asdict(one)} for model, one in found.items()]
        typer.echo(json.dumps(rows, indent=2))
    else:
        typer.echo(evaluate.divergence_table(base, found))


@app.command()
def tasks(
    model: ModelArgument,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            "-t",
            help="Names, parted by commas; by default four small tasks that need no network: "
            "qjax_facts, qjax_sense, qjax_cloze, qjax_sums. lm-eval fetches the data of its own.",
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            "--num-fewshot", help="Examples before each item, instead of the task's.", min=0
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Only so many items of each task.", min=1)
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put items through the chat template.")
    ] = False,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="A folder with task files of your own.")
    ] = None,
    numerics: options.NumericsOption = options.Numerics.exact,
    kv_cache_dtype: options.KVCacheDtype = "auto",
    output: Output = Format.md,
) -> None:
    """Tasks of lm-eval, which pip install 'qjax[eval]' brings."""
    import qjax
    from qjax.evaluate import harness
    from qjax.evaluate import tasks as running

    harness.model_class()  # says that lm-eval is missing before a model is loaded
    names = [name.strip() for each in tasks or running.OFFLINE for name in each.split(",")]
    found = running.run_tasks(
        qjax.load(model),
        names,
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=apply_chat_template,
        numerics=numerics.value,
        kv_cache_dtype=kv_cache_dtype,
        include_path=None if include_path is None else str(include_path),
    )
    if output is Format.json:
        typer.echo(json.dumps(found["results"], indent=2))
    else:
        typer.echo(running.table(found))


def read_documents(file: Path) -> list[str]:
    """The documents in a file: the lines of a .jsonl, or the one that any other file is."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix != ".jsonl":
            return [text]
        lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot read the text {file}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not (isinstance(line, dict) and isinstance(line.get("text"), str)):
            raise RequestError(f'{file}: document {number} is not {{"text": "..."}}')
    return [line["text"] for line in lines]


def progress(windows: Iterable[Any]) -> Iterator[Any]:
    from tqdm import tqdm

    return iter(tqdm(windows, unit="window", leave=False, disable=None))
