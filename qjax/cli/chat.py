"""`qjax chat`: a conversation in the terminal."""

import sys

import typer

from qjax.cli import options, processes


def chat(
    model: options.Model = options.DEFAULT_MODEL,
    system: options.System = None,
    max_tokens: options.MaxTokens = 1024,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    numerics: options.NumericsOption = options.Numerics.fast,
    max_model_len: options.MaxModelLen = None,
    kv_cache_dtype: options.KVCacheDtype = "auto",
    kv_cache_dtype_skip_layers: options.KVCacheSkipLayers = None,
    tensor_parallel_size: processes.TensorParallelSize = None,
    enable_expert_parallel: processes.EnableExpertParallel = False,
    all_reduce: processes.AllReduce = "float32",
) -> None:
    """Talk with a model. Ctrl-C stops a reply, Ctrl-D leaves."""
    import qjax
    from qjax import api
    from qjax.engine.engine import model_len

    sampling = qjax.SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    mesh = processes.mesh_of(None, tensor_parallel_size, enable_expert_parallel)
    params = qjax.load(model, mesh=mesh, all_reduce=all_reduce)
    if not params.tokenizer.has_chat_template:
        raise qjax.RequestError(
            f"{model} has no chat template: use `qjax generate`, which completes a text."
        )
    limit = model_len(params, max_model_len)
    opening = [{"role": "system", "content": system}] if system else []
    turns: list[dict[str, str]] = []
    typer.echo(f"{model}. Ctrl-C stops a reply, Ctrl-D leaves.", err=True)
    while (text := _read_line()) is not None:
        if not text.strip():
            continue
        turns.append({"role": "user", "content": text})
        # The oldest exchanges make room for the newest one and a reply.
        while len(turns) > 1 and len(api.encode(params, opening + turns)) > limit // 2:
            del turns[:2]
            typer.echo("(the beginning of the conversation no longer fits)", err=True)
        try:
            stream = qjax.generate(
                params,
                opening + turns,
                sampling,
                numerics=numerics.value,
                stream=True,
                max_model_len=max_model_len,
                kv_cache_dtype=kv_cache_dtype,
                kv_cache_dtype_skip_layers=kv_cache_dtype_skip_layers or (),
            )
        except qjax.RequestError as error:
            typer.echo(f"qjax: {error}", err=True)
            turns.pop()
            continue
        try:
            for piece in stream:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            stream.close()
        print()
        turns.append({"role": "assistant", "content": stream.result.text})


def _read_line() -> str | None:
    """The user's next line; None at the end of input."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except KeyboardInterrupt:
            print()  # what was typed is dropped
        except EOFError:
            if sys.stdin.isatty():
                print()
            return None


command = chat
