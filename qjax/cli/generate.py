"""`qjax generate`: answer one prompt, as it is produced."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qjax.cli import config_file, options, processes

if TYPE_CHECKING:
    from qjax.engine.request import GenerationResult
    from qjax.params import Params


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    model: options.Model = options.DEFAULT_MODEL,
    raw: Annotated[
        bool, typer.Option("--raw", help="Complete the prompt as it is, without chat template.")
    ] = False,
    system: options.System = None,
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    json_schema: Annotated[
        str | None,
        typer.Option("--json-schema", "-j", help="A JSON schema that the text must follow."),
    ] = None,
    grammar_file: Annotated[
        str | None,
        typer.Option("--grammar-file", help="A file with a Lark grammar that it must follow."),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past the end-of-sequence token.")
    ] = False,
    numerics: options.NumericsOption = options.Numerics.fast,
    max_model_len: options.MaxModelLen = None,
    kv_cache_dtype: options.KVCacheDtype = "auto",
    kv_cache_dtype_skip_layers: options.KVCacheSkipLayers = None,
    quantization: Annotated[
        str | None,
        typer.Option("--quantization", help='Quantize full-precision weights, such as to "fp8".'),
    ] = None,
    quantize_activations: Annotated[
        bool,
        typer.Option(
            "--quantize-activations/--no-quantize-activations",
            help="Round activations where the checkpoint's method does, or leave them.",
        ),
    ] = True,
    tensor_parallel_size: processes.TensorParallelSize = None,
    enable_expert_parallel: processes.EnableExpertParallel = False,
    all_reduce: processes.AllReduce = "float32",
    distributed: processes.Distributed = False,
    coordinator_address: processes.CoordinatorAddress = None,
    num_processes: processes.NumProcesses = None,
    process_id: processes.ProcessId = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole result as JSON, at the end.")
    ] = False,
    config: config_file.Config = None,
) -> None:
    """Generate text from a prompt."""
    import qjax

    sampling = qjax.SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=stop or (),
        structured_outputs=form(json_schema, grammar_file),
        ignore_eos=ignore_eos,
    )
    if not prompt:
        raise qjax.RequestError("prompt is empty: give at least one token.")
    if raw and system:
        raise qjax.RequestError("--system needs the chat template: leave out --raw.")
    with processes.joined(distributed, coordinator_address, num_processes, process_id) as group:
        params = qjax.load(
            model,
            quantization=quantization,
            quantize_activations=quantize_activations,
            mesh=processes.mesh_of(group, tensor_parallel_size, enable_expert_parallel),
            all_reduce=all_reduce,
        )
        if group is not None and not group.lead(params):
            return
        text = sys.stdin.read() if prompt == "-" else prompt
        stream = qjax.generate(
            params,
            question(params, text, system, raw),
            sampling,
            numerics=numerics.value,
            stream=True,
            max_model_len=max_model_len,
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_dtype_skip_layers=kv_cache_dtype_skip_layers or (),
        )
        try:
            for piece in stream:
                if not as_json:
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            stream.close()
        if as_json:
            print(json.dumps(asdict(stream.result), ensure_ascii=False))
        else:
            print()
            print(summary(stream.result), file=sys.stderr)
    if stream.result.finish_reason == "abort":
        raise typer.Exit(130)


def form(json_schema: str | None, grammar_file: str | None) -> dict[str, str] | None:
    """`structured_outputs` as the options have it."""
    from qjax.errors import RequestError

    if json_schema is not None and grammar_file is not None:
        raise RequestError("give --json-schema or --grammar-file, not both.")
    if json_schema is not None:
        return {"json": json_schema}
    if grammar_file is None:
        return None
    try:
        return {"grammar": Path(grammar_file).read_text("utf-8")}
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--grammar-file: cannot read {grammar_file}: {error}") from None


def question(params: "Params", text: str, system: str | None, raw: bool) -> Any:
    """The prompt: of a model with a chat template, a message."""
    from qjax.errors import RequestError

    if not text:
        raise RequestError("prompt is empty: give at least one token.")
    if not raw and params.tokenizer.has_chat_template:
        first = [{"role": "system", "content": system}] if system else []
        return [*first, {"role": "user", "content": text}]
    if system:
        raise RequestError(f"--system needs a chat template, and {params.source} has none.")
    return text


def summary(result: "GenerationResult") -> str:
    """One line of figures."""
    return (
        f"[prompt {len(result.prompt_token_ids)} tokens, {result.prompt_tps:.1f} tokens/s; "
        f"generated {len(result.token_ids)}, {result.generation_tps:.1f} tokens/s; "
        f"finish: {result.finish_reason}; peak memory {result.peak_memory / 1e6:.0f} MB]"
    )


command = generate
