"""qjax as a model of EleutherAI's lm-evaluation-harness (lm-eval), under the name "qjax".

`python -m qjax.evaluate.harness` is the command `lm_eval` with that model known to it:

    python -m qjax.evaluate.harness --model qjax --model_args pretrained=smollm2-135m \\
        --batch_size auto --tasks piqa

From Python, `harness.model_class()` registers it; then `lm_eval.simple_evaluate(model="qjax",
model_args={"pretrained": ...}, ...)` finds it.
"""

from __future__ import annotations

from collections import defaultdict
from functools import cache, cached_property
from typing import Any

from qjax.api import MAX_NUM_SEQS, load
from qjax.engine.engine import model_len
from qjax.engine.sampling_params import SamplingParams
from qjax.errors import RequestError, UnsupportedError
from qjax.evaluate.continuations import continuations
from qjax.evaluate.rolling import prefix_token, rolling_pairs
from qjax.llm import LLM
from qjax.params import Params


@cache
def model_class() -> Any:
    """The class that lm-eval knows as "qjax", registered when it is first asked for.

    Its arguments, also those of `--model_args`:
      pretrained: a model, or anything that `qjax.load` takes.
      quantization: see `qjax.load`.
      numerics, kv_cache_dtype: see `qjax.generate`; "exact" unless asked otherwise.
      max_length: most tokens of a sequence, None for as many as the model takes; the beginning of
        what is longer is left out.
      max_gen_toks: most tokens to generate where a task does not say.
      batch_size: most sequences that generate together, at most 32; "auto" for `max_batch_size`, or
        for 32. Likelihoods are batched by themselves.
      device: lm-eval's command always names one, a GPU unless told otherwise. It is not followed:
        JAX runs on what it finds first, or on what the variable JAX_PLATFORMS says.

    Raises:
      UnsupportedError: lm-eval is not installed.
    """
    try:
        from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
        from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
        from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
        from tqdm import tqdm
    except ImportError as error:
        raise UnsupportedError(
            f"lm-eval, which runs tasks, cannot be imported ({error}): install it with "
            "pip install 'qjax[eval]'"
        ) from None

    @register_model("qjax")
    class QjaxLM(TemplateLM):
        def __init__(
            self,
            pretrained: Any = "smollm2-135m",
            *,
            quantization: str | None = None,
            numerics: str = "exact",
            kv_cache_dtype: str = "auto",
            max_length: int | None = None,
            max_gen_toks: int = 256,
            batch_size: int | str = "auto",
            max_batch_size: int | None = None,
            device: str | None = None,
        ):
            super().__init__()
            loaded = isinstance(pretrained, Params)
            self.params = pretrained if loaded else load(pretrained, quantization=quantization)
            if self.params.tokenizer is None:
                raise RequestError("the model has no tokenizer, which tasks need.")
            self.rounding: dict[str, Any] = {"numerics": numerics, "kv_cache_dtype": kv_cache_dtype}
            self.max_length = model_len(self.params, max_length)
            self.max_gen_toks = max_gen_toks
            most = max_batch_size or MAX_NUM_SEQS
            self.batch_size = most if batch_size == "auto" else int(batch_size)

        @cached_property
        def _llm(self) -> LLM:
            return LLM(
                self.params,
                max_model_len=self.max_length,
                max_num_seqs=self.batch_size,
                **self.rounding,
            )

        @property
        def eot_token_id(self) -> int:
            eos = self.params.tokenizer.eos_id
            return self.prefix_token_id if eos is None else eos

        @property
        def prefix_token_id(self) -> int:
            return prefix_token(self.params)

        @property
        def tokenizer_name(self) -> str:
            return self.params.source.replace("/", "__")

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            template = self.params.tokenizer.chat_template
            return template.text if chat_template and template is not None else None

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            text = self.params.tokenizer.apply_chat_template(chat_history, add_generation_prompt)
            if add_generation_prompt:
                return text
            # The last message is the beginning of an answer, which goes on: nothing may end it.
            begun = chat_history[-1]["content"].strip()
            at = text.rfind(begun)
            if at < 0:
                raise RequestError(f"the chat template changes the message {begun[:60]!r}")
            return text[: at + len(begun)]

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            tokenizer = self.params.tokenizer
            if add_special_tokens is None:
                begins = tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
                add_special_tokens = not (begins and string.startswith(begins))
            return tokenizer.encode(string, add_special_tokens)

        def _loglikelihood_tokens(
            self, requests: list, disable_tqdm: bool = False, **_: Any
        ) -> list[tuple[float, bool]]:
            found = continuations(
                self.params,
                [(context, continuation) for _, context, continuation in requests],
                max_length=self.max_length,
                progress=lambda all_: tqdm(all_, desc="loglikelihood", disable=disable_tqdm),
                **self.rounding,
            )
            results = [(float(one.logprobs.sum()), one.greedy) for one in found]
            for (texts, _, _), result in zip(requests, results, strict=True):
                self.cache_hook.add_partial("loglikelihood", texts, result)
            return results

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
            pairs = [
                (number, pair)
                for number, request in enumerate(requests)
                for pair in rolling_pairs(
                    self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length
                )
            ]
            found = continuations(
                self.params,
                [pair for _, pair in pairs],
                max_length=self.max_length,
                progress=lambda all_: tqdm(all_, desc="rolling", disable=disable_tqdm),
                **self.rounding,
            )
            sums = [0.0] * len(requests)
            for (number, _), one in zip(pairs, found, strict=True):
                sums[number] += float(one.logprobs.sum())
            for request, total in zip(requests, sums, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            return sums

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            groups: dict[Any, list[int]] = defaultdict(list)
            for number, request in enumerate(requests):
                groups[repr(request.args[1])].append(number)
            texts = [""] * len(requests)
            for numbers in tqdm(groups.values(), desc="generate", disable=disable_tqdm):
                asked: Any = normalize_gen_kwargs(requests[numbers[0]].args[1], self.max_gen_toks)
                most, stop = asked.pop("max_gen_toks"), asked.pop("until")
                if not asked.pop("do_sample"):
                    asked["temperature"] = 0.0
                room = self.max_length - most
                if room < 1:
                    raise RequestError(
                        f"max_gen_toks must be less than the {self.max_length} tokens that the "
                        f"model holds, got {most}."
                    )
                sampling = SamplingParams.of(
                    max_tokens=most, stop=list(filter(None, stop)), **asked
                )
                prompts = [self.tok_encode(requests[n].args[0])[-room:] for n in numbers]
                for number, result in zip(
                    numbers, self._llm.generate(prompts, sampling), strict=True
                ):
                    texts[number] = result.text
                    self.cache_hook.add_partial(
                        "generate_until", requests[number].args, result.text
                    )
            return texts

    return QjaxLM


def main() -> None:
    """The command line of lm-eval, which then knows the model "qjax"."""
    model_class()
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()


if __name__ == "__main__":
    main()
