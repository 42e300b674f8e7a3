"""Generation end to end, on a small model that llama.cpp quantized.

The reference is the model's dequantized weights run in float32 by transformers: its logits and its
greedy continuations.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qjax
from qjax.engine.engine import Engine
from qjax.engine.request import GenerationResult
from qjax.engine.sampling_params import SamplingParams
from qjax.engine.step import DECODE_STEPS

NEW = 32


@pytest.fixture(scope="module")
def params(golden: Path) -> qjax.Params:
    return qjax.load(golden / "gguf-Q4_1" / "model.gguf")


@pytest.fixture(scope="module")
def reference(golden: Path) -> dict[str, np.ndarray]:
    return dict(np.load(golden / "gguf-Q4_1" / "reference.npz"))


@pytest.fixture(scope="module")
def prompts(reference: dict[str, np.ndarray]) -> list[list[int]]:
    """Of 8, 33 and 120 tokens."""
    return [reference[f"ids_{i}"].tolist() for i in range(3)]


@pytest.fixture(scope="module")
def continuations(reference: dict[str, np.ndarray]) -> list[list[int]]:
    return [reference[f"greedy_{i}"].tolist() for i in range(3)]


@pytest.fixture(scope="module")
def generate(params: qjax.Params):
    def run(prompt: Any, **sampling: Any) -> Any:
        sampling = {"max_tokens": NEW, "ignore_eos": True, "numerics": "exact"} | sampling
        return qjax.generate(params, prompt, **sampling)

    return run


def run_engine(params: qjax.Params, prompts: list[list[int]], **sizes: Any) -> tuple[list, Engine]:
    engine = Engine(params, numerics="exact", **sizes)
    sampling = SamplingParams(max_tokens=NEW, ignore_eos=True)
    requests = [engine.add(tuple(prompt), sampling) for prompt in prompts]
    while engine.busy:
        engine.step()
    return [request.output_ids for request in requests], engine


def test_the_package_is_pickled_by_name() -> None:
    """As functions that use it are, on their way to other processes."""
    assert pickle.loads(pickle.dumps(qjax)) is qjax


def test_greedy_continues_as_the_reference(generate, prompts, continuations) -> None:
    results = generate(prompts)
    assert [list(result.token_ids) for result in results] == continuations
    assert {result.finish_reason for result in results} == {"length"}
    assert [list(result.prompt_token_ids) for result in results] == prompts


def test_alone_as_in_a_batch(generate, prompts, continuations) -> None:
    assert list(generate(prompts[1]).token_ids) == continuations[1]


def test_fast_numerics_stay_close(generate, prompts, continuations) -> None:
    result = generate(prompts[0], numerics="fast")
    # Every choice of this continuation is clear by more than rounding to 8 bits can move it.
    assert list(result.token_ids)[:6] == continuations[0][:6]


def test_chunked_prompts_as_whole_ones(params, prompts, continuations) -> None:
    outputs, _ = run_engine(params, prompts, num_blocks=16, max_num_batched_tokens=50)
    assert outputs == continuations


def test_a_full_cache_delays_and_changes_nothing(params, prompts, continuations) -> None:
    # The prompts take all 7 pages; with their outputs they would take 10.
    outputs, engine = run_engine(params, prompts, num_blocks=7)
    assert outputs == continuations
    assert engine.scheduler.num_preemptions > 0
    assert engine.scheduler.blocks.num_free == 7


def test_more_prompts_than_slots(params, prompts, continuations) -> None:
    outputs, _ = run_engine(params, prompts * 3, num_blocks=16, max_num_seqs=2)
    assert outputs == continuations * 3


def test_abort_frees_pages_at_once(params, prompts) -> None:
    engine = Engine(params, num_blocks=16, numerics="exact")
    kept, dropped = (
        engine.add(tuple(prompt), SamplingParams(max_tokens=NEW)) for prompt in prompts[:2]
    )
    engine.step()
    engine.abort(dropped)
    while engine.busy:
        engine.step()
    assert dropped.finish_reason == "abort"
    assert kept.finish_reason in ("stop", "length")
    assert engine.scheduler.blocks.num_free == 16


def test_result(generate, prompts, continuations, params) -> None:
    result = generate(prompts[0])
    assert isinstance(result, GenerationResult)
    assert str(result) == result.text == params.tokenizer.decode(continuations[0])
    assert result.stop_reason is None
    assert result.logprobs is None
    assert result.prompt_logprobs is None
    assert result.prompt_tps > 0
    assert result.generation_tps > 0
    assert result.peak_memory > 1 << 20


def test_stop_tokens_and_eos(generate, prompts, continuations, params) -> None:
    stop = continuations[0][9]
    first = continuations[0].index(stop)
    result = generate(prompts[0], stop_token_ids=[stop])
    assert list(result.token_ids) == continuations[0][: first + 1]
    assert (result.finish_reason, result.stop_reason) == ("stop", stop)
    assert result.text == params.tokenizer.decode(continuations[0][:first])
    # The model's own end of sequence, taken from generation_config.json, has no stop reason.
    host = type(params.host)("", lambda: params.tokenizer, {"eos_token_id": [stop]})
    other = qjax.Params(params.tree, params.config, host)
    result = qjax.generate(other, prompts[0], numerics="exact", max_tokens=NEW)
    assert (result.finish_reason, result.stop_reason) == ("stop", None)
    assert list(result.token_ids) == continuations[0][: first + 1]


def test_streaming_gives_the_same_text(generate, prompts) -> None:
    whole = generate(prompts[0])
    stream = generate(prompts[0], stream=True)
    pieces = list(stream)
    assert "".join(pieces) == whole.text
    assert len(pieces) >= NEW // DECODE_STEPS
    assert stream.result.token_ids == whole.token_ids
    stop = whole.text[20:24]
    stream = generate(prompts[0], stream=True, stop=stop)
    assert "".join(stream) == whole.text[: whole.text.index(stop)]
    assert stream.result.stop_reason == stop


def test_closing_a_stream_ends_it(generate, prompts) -> None:
    stream = generate(prompts[0], stream=True)
    first = next(stream)
    stream.close()
    assert list(stream) == []
    assert stream.result.finish_reason == "abort"
    assert stream.result.text.startswith(first)


def test_logprobs_are_the_reference_models(generate, prompts, continuations, reference) -> None:
    ids, where, logits = prompts[2], reference["pos_2"], reference["logits_2"]
    result = generate(ids, max_tokens=2, logprobs=3, prompt_logprobs=0)
    expected = logits.astype(np.float64)
    expected -= np.log(np.exp(expected).sum(-1, keepdims=True))
    assert len(result.prompt_logprobs) == len(ids)
    assert result.prompt_logprobs[0] is None
    for row, position in zip(expected, where, strict=True):
        if position + 1 < len(ids):
            token = ids[position + 1]
            entry = result.prompt_logprobs[position + 1]
            assert list(entry) == [token]
            assert entry[token].logprob == pytest.approx(row[token], abs=2e-3)
            assert entry[token].rank == 1 + (row > row[token]).sum()
    assert where[-1] == len(ids) - 1
    entry = result.logprobs[0]
    best = np.argsort(-expected[-1])[:3]
    assert list(entry) == best.tolist()
    assert [e.rank for e in entry.values()] == [1, 2, 3]
    np.testing.assert_allclose(
        [e.logprob for e in entry.values()], expected[-1][best], rtol=0, atol=2e-3
    )
    assert len(result.logprobs) == 2


def test_seeds_repeat_whatever_is_beside_them(generate, prompts) -> None:
    sampling = {"temperature": 1.5, "seed": 7, "top_p": 0.95}
    together = generate(prompts, **sampling)
    alone = generate(prompts[1], **sampling)
    assert together[1].token_ids == alone.token_ids
    assert generate(prompts[1], **sampling | {"seed": 8}).token_ids != alone.token_ids
    unseeded = {generate(prompts[1], temperature=1.5).token_ids for _ in range(3)}
    assert len(unseeded) == 3


def test_n_samples_differ_and_repeat(generate, prompts) -> None:
    sampling = {"temperature": 1.5, "seed": 7, "top_p": 0.95}
    samples = generate(prompts[1], n=3, **sampling)
    assert len({sample.token_ids for sample in samples}) == 3
    assert samples[0].token_ids == generate(prompts[1], **sampling).token_ids
    grouped = generate(prompts[:2], n=2, max_tokens=1)
    assert [len(group) for group in grouped] == [2, 2]


def test_penalties_follow_the_tokens(params, generate, prompts) -> None:
    """Step by step by the formulas, with the logits of `qjax.forward`."""
    import jax
    import jax.numpy as jnp

    ids, new = prompts[0], 12
    penalties: dict[str, Any] = {
        "repetition_penalty": 1.4,
        "frequency_penalty": 0.6,
        "presence_penalty": 0.3,
    }
    forward = jax.jit(qjax.forward)
    expected: list[int] = []
    for _ in range(new):
        known = ids + expected
        padded = jnp.array(known + [0] * (len(ids) + new - len(known)), jnp.int32)
        x = np.array(forward(params, padded)[len(known) - 1], np.float64)
        for token in set(known):
            x[token] = x[token] / 1.4 if x[token] > 0 else x[token] * 1.4
        for token in set(expected):
            x[token] -= 0.3 + 0.6 * expected.count(token)
        expected.append(int(x.argmax()))
    assert list(generate(ids, max_tokens=new, **penalties).token_ids) == expected
    # Also when the sequence is sent back to wait and starts again.
    sampling = SamplingParams(max_tokens=new, ignore_eos=True, **penalties)
    engine = Engine(params, num_blocks=2, block_size=16, max_num_seqs=2, numerics="exact")
    requests = [engine.add(tuple(ids), sampling) for _ in range(2)]
    while engine.busy:
        engine.step()
    assert engine.scheduler.num_preemptions > 0
    assert [request.output_ids for request in requests] == [expected] * 2


def test_bias_and_allowed_tokens(generate, prompts, continuations) -> None:
    only = generate(prompts[0], max_tokens=4, allowed_token_ids=[11, 12])
    assert set(only.token_ids) <= {11, 12}
    pushed = generate(prompts[0], max_tokens=4, logit_bias={13: 100})
    assert pushed.token_ids == (13,) * 4
    first = continuations[0][0]
    late = generate(prompts[0], max_tokens=8, min_tokens=5, stop_token_ids=[first])
    assert first not in late.token_ids[:5]


def test_prompts_of_every_kind(params, generate) -> None:
    text = generate("hello world", max_tokens=4)
    assert list(text.prompt_token_ids) == params.tokenizer.encode("hello world")
    messages = [{"role": "user", "content": "hello"}]
    chat = generate(messages, max_tokens=4)
    written = params.tokenizer.apply_chat_template(messages)
    assert written.endswith("<|im_start|>assistant\n")
    assert params.tokenizer.decode(chat.prompt_token_ids, skip_special_tokens=False) == written
    ids = generate(np.array(text.prompt_token_ids), max_tokens=4)
    assert ids.token_ids == text.token_ids
    mixed = generate(["hello world", messages, list(text.prompt_token_ids)], max_tokens=4)
    assert [m.token_ids for m in mixed] == [text.token_ids, chat.token_ids, text.token_ids]


@pytest.mark.parametrize(
    ("prompt", "keywords", "message"),
    [
        ("", {}, "prompt is empty"),
        ([], {}, "prompt is empty"),
        (["a", ""], {}, "prompt is empty"),
        ([1] * 512, {}, "prompt has 512 tokens, but the context holds 512"),
        ([1] * 9, {"max_model_len": 9}, "prompt has 9 tokens, but the context holds 9"),
        ([5, -1], {}, r"prompt has token id -1, but ids must be in \[0, 512\)"),
        ([5, 512], {}, r"prompt has token id 512, but ids must be in \[0, 512\)"),
        ([5], {"stop_token_ids": [512]}, "stop_token_ids has token id 512"),
        ([5], {"logit_bias": {600: 1.0}}, "logit_bias has token id 600"),
        ([5, "x"], {}, "must hold integers only"),
        (3, {}, "prompt must be a string"),
        ("a", {"max_token": 3}, "did you mean max_tokens"),
        ("a", {"numerics": "slow"}, "numerics must be 'fast' or 'exact', got 'slow'"),
        ("a", {"max_model_len": 1000}, r"max_model_len must be in \[1, 512\], got 1000"),
        (["a", "b"], {"stream": True}, "stream=True takes one prompt"),
        ("a", {"sampling_params": SamplingParams()}, "not both"),
    ],
)
def test_errors(generate, prompt: Any, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(qjax.RequestError, match=message):
        generate(prompt, **keywords)


def test_generation_stops_at_the_context(generate) -> None:
    result = generate([5] * 60, max_tokens=None, max_model_len=64)
    assert (len(result.token_ids), result.finish_reason) == (4, "length")


def test_sampling_defaults(params) -> None:
    def defaults(**config: Any) -> dict[str, Any]:
        host = type(params.host)("", None, config)
        return qjax.sampling_defaults(qjax.Params(params.tree, params.config, host))

    assert defaults() == {}
    assert defaults(do_sample=False, temperature=0.6) == {}
    assert defaults(do_sample=True, top_p=0.9) == {"temperature": 1.0, "top_p": 0.9}
    assert defaults(temperature=0.6, top_k=20) == {"temperature": 0.6, "top_k": 20}
