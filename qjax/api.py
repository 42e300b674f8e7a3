"""`qjax.load` and `qjax.generate`: a checkpoint in, text out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qjax.engine.block_manager import BlockManager
from qjax.engine.engine import BLOCK_SIZE, Engine, check_request, model_len, peak_memory
from qjax.engine.replicas import Replicas, one_or_replicas
from qjax.engine.request import GenerationResult, Request
from qjax.engine.runner import numerics_for
from qjax.engine.sampling_params import SamplingParams
from qjax.engine.serving import MAX_NUM_SEQS
from qjax.errors import RequestError
from qjax.kv_cache import bytes_per_token, cache_dtypes
from qjax.params import Params

if TYPE_CHECKING:
    from jax.sharding import Mesh, Sharding

    from qjax.formats.base import QuantizationConfig

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]

# Past this, sequences wait for pages instead of the cache growing.
CACHE_BYTES = 1 << 30


def load(
    source: str | PathLike[str] = "smollm2-135m",
    *,
    quantization: str | None = None,
    quantize_activations: bool = True,
    sharding: Callable[[str, tuple[int, ...]], Sharding] | None = None,
    mesh: Mesh | None = None,
    tensor_parallel_size: int | None = None,
    all_reduce: str = "float32",
) -> Params:
    """Loads a model, its weights as they are stored.

    Args:
      source: a built-in name ("smollm2-135m", "gemma3-270m"), a GGUF file, a folder of safetensors,
        or "org/name" or "org/name:Q4_K_M" on the Hugging Face hub.
      quantization: a method that full-precision safetensors are quantized with while they are read,
        such as "fp8"; None takes a checkpoint as it is. A quantized one needs nothing: its method
        stands in its config.
      quantize_activations: whether activations and cache are rounded where the method says so, as
        its maker's own runtime does; False computes with the quantized weights alone, which shows
        what the rounding costs.
      sharding: of a folder that was saved with format="orbax": where each array is to lie, by its
        name ("model.layers.0.mlp.up_proj.weight/scale") and its shape.
      mesh: devices to split the model over, from `qjax.make_mesh`.
      tensor_parallel_size: or, instead, how many of them; None for one device.
      all_reduce: what devices send each other of the sums behind attention and feed-forward
        networks: "float32", "bfloat16", or codes with scales, "int8" or "fp8_e4m3", which take a
        quarter of the bytes and round what is summed.

    Raises:
      CheckpointError: the files are damaged or do not fit together.
      DownloadError: the name is unknown, or it cannot be fetched.
      UnsupportedError: the model is of a kind that qjax does not run.
      ShardingError: it cannot be split over so many devices; tells over how many it can.
    """
    from qjax.checkpoint import loader
    from qjax.engine import compile_cache
    from qjax.sharding import ALL_REDUCE, make_mesh

    compile_cache.enable()
    if tensor_parallel_size is not None:
        if mesh is not None:
            raise RequestError("give mesh or tensor_parallel_size, not both.")
        mesh = make_mesh(tensor_parallel_size)
    if all_reduce not in ALL_REDUCE:
        known = ", ".join(ALL_REDUCE)
        raise RequestError(f"all_reduce must be one of {known}, got {all_reduce!r:.80}.")
    params = loader.load(
        source,
        quantization=quantization,
        quantize_activations=quantize_activations,
        sharding=sharding,
        mesh=mesh,
    )
    return replace(params, all_reduce=all_reduce)


def save(
    params: Params,
    folder: str | PathLike[str],
    format: str | QuantizationConfig | Mapping[str, Any] | None = None,
    *,
    dtype: str | None = None,
    dense: Sequence[str] = (),
    lossy: bool = False,
) -> Path:
    """Saves a model: a folder of safetensors with config.json and tokenizer, or a GGUF file.

    Args:
      params: from `qjax.load`, of files that are still there; its tree may hold other weights.
      folder: must not exist, or be empty; of GGUF, the file. It appears complete or not at all.
      format: "compressed-tensors", "gptq", "awq", "bitsandbytes", "fp8" or "hqq": its settings are
        derived from the weights. "safetensors" (or "dense") dequantizes them. "gguf" writes one
        file, in the types that hold the same numbers. A dict is taken for the quantization_config
        of config.json, also of any other method that is saved. "orbax" keeps every weight as it is
        held, on several devices too. None keeps the format that was loaded.
      dtype: "float32", "bfloat16" or "float16": of all that is not quantized. None keeps that as
        it is, with float32 for what is dequantized.
      dense: layers to be dequantized where the format cannot hold them: names, "re:" and a pattern,
        or a class ("Embedding").
      lossy: allows that numbers are rounded where the format holds fewer digits of them, as 16 bits
        of a float32 scale; else that is an error.

    Returns:
      The folder, or the file.

    Raises:
      CheckpointError: the folder holds something, or the source has gone.
      UnsupportedError: the format cannot hold one of the weights (which is named, with the formats
        that could), or is not written by qjax.
    """
    from qjax.checkpoint import saver

    return saver.save(params, folder, format, dtype=dtype, dense=dense, lossy=lossy).folder


def generate(
    params: Params,
    prompt: Prompt | Sequence[Prompt],
    sampling_params: SamplingParams | None = None,
    *,
    numerics: str = "fast",
    stream: bool = False,
    max_model_len: int | None = None,
    kv_cache_dtype: str = "auto",
    kv_cache_dtype_skip_layers: Sequence[int | str] = (),
    **sampling: Any,
) -> Any:
    """Generates text.

    Of a model's generation_config.json only the end-of-sequence tokens apply: decoding is greedy
    unless asked otherwise. `**qjax.sampling_defaults(params)` asks for the model's own settings.

    Args:
      params: from `qjax.load`.
      prompt: a string (completed as it is), a list of messages {"role", "content"} (put through the
        model's chat template), a list of token ids, or a list of any of these.
      sampling_params: or, instead, its fields as keywords: `max_tokens=64, temperature=0.8`.
      numerics: "fast" rounds activations to bfloat16 on an accelerator; on a CPU to int8 in prompts
        and to int16 in decoding (to int8 with more than 8 sequences); with a bfloat16 cache.
        "exact" computes in float32 throughout. Weights stay as they are in both.
      stream: give an iterator of pieces of text, whose `result` is set at its end; one prompt only.
      max_model_len: most tokens of prompt and output; None for the model's own limit.
      kv_cache_dtype: what keys and values are held in: "bfloat16", "float32", "int8" (a scale for
        each token and head, the one to try first), "fp8_e4m3" or "fp8" (with the scales that came
        with the model, else 1), "fp8_e5m2" (not with such scales) or "int4". "auto" is fp8_e4m3
        where scales for it came with the model, otherwise bfloat16, and float32 in exact numerics.
        For int4, and 8-bit floats without scales, the model first runs once over 256 tokens, see
        `qjax.key_bases`.
      kv_cache_dtype_skip_layers: layers whose cache is not quantized: their numbers, negative ones
        from the end, or "sliding_window".

    Returns:
      A GenerationResult, or a list of them for n > 1; for a list of prompts, a list of these.

    Raises:
      RequestError: a prompt or a parameter is out of range.
    """
    if sampling_params is not None and sampling:
        raise RequestError("give sampling_params or keywords, not both.")
    if sampling_params is None:
        sampling_params = SamplingParams.of(**sampling)
    single = is_single(prompt)
    if stream and (not single or sampling_params.n > 1):
        raise RequestError("stream=True takes one prompt and n=1.")
    prompts = [encode(params, one) for one in ([prompt] if single else prompt)]
    engine = engine_for(
        params,
        prompts,
        sampling_params,
        numerics=numerics,
        max_model_len=max_model_len,
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_dtype_skip_layers=kv_cache_dtype_skip_layers,
    )
    groups = [
        [engine.add(ids, sampling_params, sample) for sample in range(sampling_params.n)]
        for ids in prompts
    ]
    if stream:
        return TextStream(engine, groups[0][0])
    while engine.busy:
        engine.step()
    peak = peak_memory()
    results = [[request.result(peak) for request in group] for group in groups]
    found = [group[0] if sampling_params.n == 1 else group for group in results]
    return found[0] if single else found


class TextStream(Iterator[str]):
    """The text of one request, piece by piece; `result` is set when it is exhausted or closed."""

    def __init__(self, engine: Engine | Replicas, request: Request):
        self.result: GenerationResult | None = None
        self._engine = engine
        self._request = request

    def __next__(self) -> str:
        while self.result is None:
            if self._request.finish_reason is not None:
                self.close()
            else:
                self._engine.step()
            if piece := self._request.text.take():
                return piece
        raise StopIteration

    def close(self) -> None:
        """Ends the generation here."""
        self._engine.abort(self._request)
        self.result = self._request.result(peak_memory())


def sampling_defaults(params: Params) -> dict[str, Any]:
    """The sampling parameters that the model's generation_config.json recommends.

    For `qjax.generate(params, prompt, **qjax.sampling_defaults(params))`. Empty for a model that
    says nothing, or that asks for greedy decoding (`do_sample: false`).
    """
    config = params.generation_config or {}
    if config.get("do_sample") is False:
        return {}
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    found = {name: config[name] for name in names if config.get(name) is not None}
    # transformers samples at temperature 1 where only do_sample is given.
    return {"temperature": 1.0} | found if found or config.get("do_sample") else {}


def is_single(prompt: Any) -> bool:
    """Whether this is one prompt, rather than a list of prompts."""
    if isinstance(prompt, str):
        return True
    if not isinstance(prompt, Sequence) and not hasattr(prompt, "tolist"):
        raise RequestError(
            "prompt must be a string, a list of messages, a list of token ids or a list of "
            f"these, got {type(prompt).__name__}."
        )
    if len(prompt) == 0:
        raise RequestError("prompt is empty: give at least one token.")
    return not isinstance(prompt[0], str) and (
        isinstance(prompt[0], Mapping) or not hasattr(prompt[0], "__len__")
    )


def encode(params: Params, prompt: Any) -> tuple[int, ...]:
    """The token ids of one prompt."""
    tokenizer = params.tokenizer
    if isinstance(prompt, str):
        if not prompt:
            raise RequestError("prompt is empty: give at least one token.")
        return tuple(tokenizer.encode(prompt))
    if not is_single(prompt):
        raise RequestError("a list of prompts may not hold another list of prompts.")
    if isinstance(prompt[0], Mapping):
        if not tokenizer.has_chat_template:
            raise RequestError(
                "this model has no chat template: give the prompt as a string, to be completed."
            )
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
        return tuple(tokenizer.encode(text, add_special_tokens=False))
    try:
        if any(isinstance(token, bool) for token in prompt):
            raise TypeError
        return tuple(token.__index__() for token in prompt)
    except (AttributeError, TypeError):
        raise RequestError("a prompt of token ids must hold integers only.") from None


def engine_for(
    params: Params,
    prompts: Sequence[tuple[int, ...]],
    sampling: SamplingParams,
    *,
    numerics: str = "fast",
    max_model_len: int | None = None,
    kv_cache_dtype: str = "auto",
    kv_cache_dtype_skip_layers: Sequence[int | str] = (),
    seed: int | None = None,
    together: bool = False,
) -> Engine | Replicas:
    """An engine just large enough for these prompts, in one of a few sizes; of a model with several
    copies, one on each.

    Args:
      together: all of them run at a time, whatever the cache then takes; else as many as are
        usual, and the others wait.
    """
    limit = model_len(params, max_model_len)
    copies = 1 if params.mesh is None else params.mesh.devices.shape[0]
    lengths = []
    for ids in prompts:
        check_request(ids, sampling, params, limit)
        room = limit - len(ids)
        lengths += [len(ids) + min(room, sampling.max_tokens or room)] * sampling.n
    blocks_for = BlockManager(0, BLOCK_SIZE).blocks_for
    need = sorted((blocks_for(length) for length in lengths), reverse=True)
    max_num_seqs = -(-len(lengths) // copies)
    if not together:
        max_num_seqs = min(max_num_seqs, MAX_NUM_SEQS)
    wanted = sum(need[:max_num_seqs])
    unrounded = numerics_for(numerics, max_num_seqs).cache_dtype
    dtypes = cache_dtypes(params.config, kv_cache_dtype, unrounded, kv_cache_dtype_skip_layers)
    affordable = CACHE_BYTES // (BLOCK_SIZE * bytes_per_token(params.config, dtypes))
    num_blocks = wanted if together else max(need[0], min(wanted, affordable))
    make = partial(
        Engine,
        num_blocks=1 << max(4, (num_blocks - 1).bit_length()),
        max_num_seqs=max_num_seqs,
        max_model_len=limit,
        numerics=numerics,
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_dtype_skip_layers=kv_cache_dtype_skip_layers,
    )
    return one_or_replicas(params, make, seed)
