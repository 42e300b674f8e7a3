"""`LLM`: a model with an engine that stays, under the names that vLLM gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from qjax.api import encode, is_single, load
from qjax.engine.engine import Engine, peak_memory
from qjax.engine.replicas import Replicas
from qjax.engine.request import GenerationResult
from qjax.engine.sampling_params import SamplingParams
from qjax.engine.serving import serving_engine
from qjax.engine.speculation import SpeculativeConfig
from qjax.errors import RequestError
from qjax.params import Params
from qjax.sharding import make_mesh


def speculative(config: Mapping[str, Any] | None) -> SpeculativeConfig | None:
    """SpeculativeConfig from its fields; a model is loaded if it is not."""
    if config is None:
        return None
    model = config.get("model")
    if model is not None and not isinstance(model, Params):
        config = {**config, "model": load(model)}
    return SpeculativeConfig.of(config)


class LLM:
    """Generates for many prompts, one call after the other; cache and programs are kept.

    Args:
      model, quantization: see `qjax.load`; or a model that is loaded already.
      kv_cache_dtype, kv_cache_dtype_skip_layers, numerics: see `qjax.generate`.
      max_model_len: most tokens of a sequence; None for the model's own limit.
      max_num_seqs, max_num_batched_tokens, gpu_memory_utilization, kv_cache_memory_bytes,
        enable_prefix_caching: see `qjax.engine.serving.serving_engine`.
      seed: makes the samples of the same calls, one after the other, repeatable, where their
        `SamplingParams` have no seed, which goes first; None draws a fresh one.
      tensor_parallel_size: devices that share a copy of the model; None for one.
      data_parallel_size: how many copies there are; each takes some of the sequences.
      enable_expert_parallel: gives each of these devices whole experts, not a part of each.
      speculative_config: fields of `qjax.engine.speculation.SpeculativeConfig`, as in
        {"method": "ngram"}; {"model": ...} takes what `qjax.load` takes, or a loaded model.

    Raises:
      RequestError: an argument is out of range.
    """

    def __init__(
        self,
        model: str | PathLike[str] | Params,
        *,
        quantization: str | None = None,
        kv_cache_dtype: str = "auto",
        kv_cache_dtype_skip_layers: Sequence[int | str] = (),
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int = 2048,
        gpu_memory_utilization: float = 0.9,
        kv_cache_memory_bytes: int | None = None,
        enable_prefix_caching: bool = True,
        numerics: str = "fast",
        seed: int | None = None,
        tensor_parallel_size: int | None = None,
        data_parallel_size: int = 1,
        enable_expert_parallel: bool = False,
        speculative_config: Mapping[str, Any] | None = None,
    ):
        loaded = isinstance(model, Params)
        several = tensor_parallel_size is not None or data_parallel_size > 1
        if loaded and (several or enable_expert_parallel):
            raise RequestError("a model that is loaded already is split where it was loaded.")
        if enable_expert_parallel and tensor_parallel_size is None:
            raise RequestError("enable_expert_parallel goes with tensor_parallel_size.")
        mesh = None
        if several:
            n = tensor_parallel_size or 1
            sizes = (1, n) if enable_expert_parallel else (n, 1)
            mesh = make_mesh(sizes[0], expert=sizes[1], data=data_parallel_size)
        self.params: Params = model if loaded else load(model, quantization=quantization, mesh=mesh)
        self.engine: Engine | Replicas = serving_engine(
            self.params,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            max_num_batched_tokens=max_num_batched_tokens,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            enable_prefix_caching=enable_prefix_caching,
            numerics=numerics,
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_dtype_skip_layers=kv_cache_dtype_skip_layers,
            speculative=speculative(speculative_config),
            seed=seed,
        )

    def generate(self, prompts: Any, sampling_params: SamplingParams | None = None) -> list[Any]:
        """A GenerationResult for each prompt (a list of them for n > 1), in order.

        Args:
          prompts: one prompt or a list, of any kind that `qjax.generate` takes.

        Raises:
          RequestError: a prompt is out of range; none has been started then.
        """
        from tqdm import tqdm  # slow to import

        params = sampling_params or SamplingParams()
        ids = [encode(self.params, p) for p in ([prompts] if is_single(prompts) else prompts)]
        requests = []
        try:
            for prompt in ids:
                for sample in range(params.n):
                    requests.append(self.engine.add(prompt, params, sample))
            with tqdm(total=len(requests), desc="generating", delay=1.0, disable=None) as bar:
                while self.engine.busy:
                    done = [r for r in self.engine.step() if r.finish_reason is not None]
                    bar.update(len(done))
        except BaseException:
            # What was cut short leaves nothing behind for the next call.
            for request in requests:
                self.engine.abort(request)
            raise
        peak = peak_memory()
        results: list[GenerationResult] = [request.result(peak) for request in requests]
        if params.n == 1:
            return results
        return [results[i : i + params.n] for i in range(0, len(results), params.n)]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | None = None,
    ) -> list[Any]:
        """`generate` of a conversation, or a list of conversations, of {"role", "content"}."""
        return self.generate(messages, sampling_params)
