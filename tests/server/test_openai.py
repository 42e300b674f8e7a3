"""What OpenAI's own client gets, of a model that transformers ran before."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from tokenizers import Tokenizer

from tests.server.conftest import MAX_MODEL_LEN, NAME, Running

Reference = Mapping[str, Any]
HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def reference(golden: Path) -> Reference:
    return dict(np.load(golden / "base-tiny-llama" / "reference.npz"))


@pytest.fixture(scope="module")
def tokenizer(golden: Path) -> Tokenizer:
    return Tokenizer.from_file(str(golden / "base-tiny-llama" / "tokenizer.json"))


def prompt_of(reference: Reference, number: int) -> list[int]:
    return reference[f"ids_{number}"].tolist()


def greedy_text(reference: Reference, tokenizer: Tokenizer, number: int) -> str:
    return tokenizer.decode(reference[f"greedy_{number}"].tolist())


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (NAME, "model", "qjax")
    assert model.to_dict()["max_model_len"] == MAX_MODEL_LEN
    quantization = model.to_dict()["quantization"]
    assert isinstance(quantization, dict)
    assert quantization["qtype"] == "bf16"


def test_completion(client: openai.OpenAI, reference: Reference, tokenizer: Tokenizer) -> None:
    """Two prompts at once, with what transformers makes of them."""
    prompts = [prompt_of(reference, 0), prompt_of(reference, 1)]
    found = client.completions.create(model=NAME, prompt=prompts, max_tokens=32, temperature=0)
    assert [choice.text for choice in found.choices] == [
        greedy_text(reference, tokenizer, number) for number in (0, 1)
    ]
    assert [choice.index for choice in found.choices] == [0, 1]
    assert [choice.finish_reason for choice in found.choices] == ["length"] * 2
    assert found.object == "text_completion"
    assert found.id.startswith("cmpl-")
    assert found.model == NAME
    usage = found.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (8 + 33, 64)
    assert usage.total_tokens == 8 + 33 + 64
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens is not None


def test_text_and_its_tokens_are_the_same_prompt(
    client: openai.OpenAI, tokenizer: Tokenizer
) -> None:
    texts = "class Foo", "import os"
    ids = [tokenizer.encode(text).ids for text in texts]
    one = client.completions.create(model=NAME, prompt=list(texts), max_tokens=8, temperature=0)
    other = client.completions.create(model=NAME, prompt=ids, max_tokens=8, temperature=0)
    assert [choice.text for choice in one.choices] == [choice.text for choice in other.choices]
    assert one.usage == other.usage


def test_completion_stream(
    client: openai.OpenAI, reference: Reference, tokenizer: Tokenizer
) -> None:
    chunks = list(
        client.completions.create(
            model=NAME,
            prompt=[prompt_of(reference, 0), prompt_of(reference, 1)],
            max_tokens=32,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *pieces, last = chunks
    for number in (0, 1):
        choices = [c for chunk in pieces for c in chunk.choices if c.index == number]
        text = "".join(choice.text for choice in choices)
        assert text == greedy_text(reference, tokenizer, number)
        assert [choice.finish_reason for choice in choices[:-1]] == [None] * (len(choices) - 1)
        assert choices[-1].finish_reason == "length"
    assert len(pieces) > 2
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 64
    assert {chunk.id for chunk in chunks} == {last.id}


def test_echo_gives_the_likelihood_of_a_text(client: openai.OpenAI, reference: Reference) -> None:
    """As lm-eval asks for it; against transformers' logits in float64."""
    ids = prompt_of(reference, 1)
    found = client.completions.create(
        model=NAME, prompt=[ids], max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234
    )
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert len(logprobs.token_logprobs) == len(ids) + 1
    assert logprobs.token_logprobs[0] is None
    for position, logits in zip(reference["pos_1"], reference["logits_1"], strict=True):
        exact = logits.astype(np.float64)
        exact -= np.log(np.sum(np.exp(exact - exact.max()))) + exact.max()
        top = logprobs.top_logprobs[position + 1]
        assert max(top.values()) == pytest.approx(exact.max(), abs=1e-3)
        if position + 1 < len(ids):
            wanted = exact[ids[position + 1]]
            assert logprobs.token_logprobs[position + 1] == pytest.approx(wanted, abs=1e-3)
            assert 1 <= len(top) <= 2


def test_echo_of_nothing_generated(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    text = "def main():"
    found = client.completions.create(
        model=NAME, prompt=text, max_tokens=0, echo=True, logprobs=0, temperature=0
    )
    (choice,) = found.choices
    assert choice.text == text
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    tokens = choice.logprobs.tokens or []
    assert tokens == [tokenizer.decode([i]) for i in tokenizer.encode(text).ids]
    assert choice.logprobs.text_offset == [text.index(t, i) for i, t in offsets(text, tokens)]


def offsets(text: str, tokens: list[str]) -> list[tuple[int, str]]:
    return [(len("".join(tokens[:i])), token) for i, token in enumerate(tokens)]


def test_chat(client: openai.OpenAI, running: Running, tokenizer: Tokenizer) -> None:
    """The same as completing what the template makes of the messages."""
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "2"}],
        },
    ]
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none\n2<|im_end|>\n"
    prompt += "<|im_start|>assistant\n"
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    assert running.post("/tokenize", {"messages": messages}).json()["tokens"] == ids

    options: Any = {"model": NAME, "max_tokens": 12, "temperature": 0}
    plain = client.completions.create(prompt=ids, **options)
    found = client.chat.completions.create(messages=messages, **options)
    (choice,) = found.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == plain.choices[0].text
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "length"
    assert found.object == "chat.completion"
    assert found.id.startswith("chatcmpl-")
    assert found.system_fingerprint
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(ids), 12)


def test_chat_stream(client: openai.OpenAI) -> None:
    options: Any = {"model": NAME, "messages": HELLO, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**options)
    stream = client.chat.completions.create(
        stream=True, stream_options={"include_usage": True}, **options
    )
    first, *pieces, last = list(stream)
    assert first.choices[0].delta.role == "assistant"
    assert first.object == "chat.completion.chunk"
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == whole.choices[0].message.content
    assert [p.choices[0].finish_reason for p in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert all(piece.usage is None for piece in pieces)
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.total_tokens == whole.usage.total_tokens


def test_usage_in_every_chunk(running: Running) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    asked = {"prompt": "a", "max_tokens": 12, "ignore_eos": True, "temperature": 0}
    found = running.post("/v1/completions", {**asked, "stream": True, "stream_options": options})
    *events, done = [line for line in found.text.split("\n\n") if line]
    assert done == "data: [DONE]"
    counts = [
        json.loads(event.removeprefix("data: "))["usage"]["completion_tokens"] for event in events
    ]
    assert counts == sorted(counts)
    assert counts[-1] == 12


def test_chat_logprobs(client: openai.OpenAI) -> None:
    options: Any = {"model": NAME, "messages": HELLO, "max_tokens": 6, "temperature": 0}
    options |= {"logprobs": True, "top_logprobs": 3}
    choice = client.chat.completions.create(**options).choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    assert len(content) == 6
    for token in content:
        top = [each.logprob for each in token.top_logprobs]
        assert len(top) == 3
        assert top == sorted(top, reverse=True)
        assert token.logprob == top[0]  # greedy
        assert sum(np.exp(top)) <= 1
        assert bytes(token.bytes or ()).decode(errors="replace") == token.token
    assert b"".join(bytes(t.bytes or ()) for t in content).decode() == choice.message.content
    streamed = client.chat.completions.create(stream=True, **options)
    pieces = [c.logprobs for chunk in streamed for c in chunk.choices if c.logprobs]
    assert [t for piece in pieces for t in piece.content or []] == content


def test_samples_and_seed(client: openai.OpenAI) -> None:
    """n answers of one prompt differ, and come again with the same seed."""

    def ask(**more: Any) -> list[str | None]:
        found = client.chat.completions.create(
            model=NAME, messages=HELLO, max_tokens=12, temperature=1.5, n=3, **more
        )
        assert [choice.index for choice in found.choices] == [0, 1, 2]
        return [choice.message.content for choice in found.choices]

    first = ask(seed=-7)
    assert len(set(first)) == 3
    assert ask(seed=-7) == first
    assert ask(seed=8) != first
    assert ask() != ask()


def test_stop(client: openai.OpenAI, reference: Reference, tokenizer: Tokenizer) -> None:
    text = greedy_text(reference, tokenizer, 1)
    stop = text[20:24]
    found = client.completions.create(
        model=NAME,
        prompt=prompt_of(reference, 1),
        max_tokens=32,
        temperature=0,
        stop=["never", stop],
    )
    (choice,) = found.choices
    assert choice.text == text[: text.index(stop)]
    assert choice.finish_reason == "stop"
    assert choice.to_dict()["stop_reason"] == stop


@pytest.mark.parametrize(
    ("param", "value", "message"),
    [
        ("temperature", -1, "temperature must be in [0, inf), got -1."),
        ("top_p", 0, "top_p must be in (0, 1], got 0."),
        ("max_tokens", 0, "max_tokens must be at least 1, got 0."),
        ("max_tokens", 10_000, f"max_model_len is {MAX_MODEL_LEN}"),
        ("n", 1_000_000, "n must be at most 128, got 1000000."),
        ("n", 64, "n times the number of prompts must be at most 32, got 64."),
        ("seed", 2**64, "seed must be in"),
        ("stop", [""], "stop must hold non-empty strings"),
        ("stop", ["x"] * 65, "stop must hold at most 64 strings, got 65."),
        ("stop_token_ids", [3] * 65, "stop_token_ids must hold at most 64 ids, got 65."),
        ("allowed_token_ids", [3] * 513, "allowed_token_ids must hold at most 512 token ids"),
        ("logit_bias", {"hello": 1}, "logit_bias must have token ids as keys"),
        ("logit_bias", {"9999": 1}, "logit_bias has token id 9999"),
        ("logit_bias", {"9": 101}, "logit_bias must be in [-100, 100], got 101."),
        ("frequency_penalty", 3, "frequency_penalty must be in [-2, 2], got 3."),
        ("top_logprobs", 21, "top_logprobs must be in [0, 20], got 21."),
        ("response_format", {"type": "xml"}, "response_format.type must be text, json_object or"),
        ("messages", [], "messages is empty"),
        ("messages", [{"role": "user", "content": "x " * 600}], "max_model_len"),
        (
            "messages",
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0].type must be text, got 'image_url'.",
        ),
        ("functions", [{"name": "f"}], "functions is not supported: use tools."),
        ("tools", [{"type": "function", "function": {"name": "f"}}], "chat template"),
        ("stream_options", {"include_usage": True}, "stream_options goes with stream"),
    ],
)
def test_errors_name_the_field(client: openai.OpenAI, param: str, value: Any, message: str) -> None:
    body = {"logprobs": True, param: value}  # some are vLLM's
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=NAME, messages=HELLO, extra_body=body)
    error = caught.value
    assert error.param == param
    assert error.type == "invalid_request_error"
    assert message in error.message


def test_a_stream_is_refused_before_it_begins(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="max_model_len"):
        client.completions.create(model=NAME, prompt=[3] * MAX_MODEL_LEN, stream=True)


def test_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=HELLO)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert NAME in caught.value.message


def test_tokens_there_and_back(running: Running, tokenizer: Tokenizer) -> None:
    text = "import numpy as np"
    found = running.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    ids = tokenizer.encode(text).ids
    assert found["tokens"] == ids
    assert found["count"] == len(ids)
    assert found["max_model_len"] == MAX_MODEL_LEN
    assert "".join(found["token_strs"]) == text
    assert running.post("/detokenize", {"tokens": ids}).json() == {"prompt": text}
    for body, param in (({"tokens": [-1]}, "tokens"), ({}, "tokens"), ({"tokens": "x"}, "tokens")):
        refused = running.post("/detokenize", body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
