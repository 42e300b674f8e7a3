"""Sampling parameters: defaults, and an error for each thing that can be wrong."""

import math

import numpy as np
import pytest

from qjax.engine.sampling_params import SamplingParams
from qjax.errors import RequestError


def test_defaults_are_greedy_and_256_tokens() -> None:
    params = SamplingParams()
    assert (params.temperature, params.max_tokens, params.stop) == (0.0, 256, ())
    assert params.greedy
    assert not params.penalized


def test_values_are_normalized() -> None:
    params = SamplingParams.of(
        stop="END", stop_token_ids=[np.int64(3)], top_p=1, logit_bias={4: -1}
    )
    assert params.stop == ("END",)
    assert params.stop_token_ids == (3,)
    assert params.logit_bias == {4: -1.0}
    assert SamplingParams.of(stop=None, stop_token_ids=None).stop == ()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("top_p", 0, "top_p must be in (0, 1], got 0."),
        ("top_p", 1.5, "top_p must be in (0, 1], got 1.5."),
        ("top_p", math.nan, "top_p must be finite, got nan."),
        ("temperature", -0.1, "temperature must be in [0, inf), got -0.1."),
        ("temperature", math.inf, "temperature must be finite, got inf."),
        ("temperature", "hot", "temperature must be a number, got 'hot'."),
        ("top_k", -2, "top_k must be at least -1, got -2."),
        ("top_k", 2.5, "top_k must be an integer, got 2.5."),
        ("min_p", 2, "min_p must be in [0, 1], got 2."),
        ("presence_penalty", 3, "presence_penalty must be in [-2, 2], got 3."),
        ("frequency_penalty", -3, "frequency_penalty must be in [-2, 2], got -3."),
        ("repetition_penalty", 0, "repetition_penalty must be in (0, inf), got 0."),
        ("max_tokens", 0, "max_tokens must be at least 1, got 0."),
        ("max_tokens", True, "max_tokens must be an integer, got True."),
        ("min_tokens", 300, "min_tokens must be at most max_tokens (256), got 300."),
        ("n", 0, "n must be at least 1, got 0."),
        ("logprobs", 21, "logprobs must be in [0, 20], got 21."),
        ("prompt_logprobs", -1, "prompt_logprobs must be in [0, 20], got -1."),
        ("seed", -1, "seed must be in [0, 18446744073709551615], got -1."),
        ("stop", ["a", ""], "stop must hold non-empty strings, got ''."),
        ("stop", [3], "stop must hold non-empty strings, got 3."),
        ("stop_token_ids", [-1], "a token id in stop_token_ids must be at least 0, got -1."),
        ("allowed_token_ids", [], "allowed_token_ids must name at least one token, got none."),
        ("logit_bias", {3: math.nan}, "logit_bias must be finite, got nan."),
    ],
)
def test_errors_name_field_range_and_value(field: str, value: object, message: str) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams.of(**{field: value})
    assert str(error.value) == message


def test_unknown_keywords_get_a_suggestion() -> None:
    with pytest.raises(RequestError, match="'topp': did you mean top_p"):
        SamplingParams.of(topp=0.5)
    with pytest.raises(RequestError, match="known: n, max_tokens"):
        SamplingParams.of(zzz=1)
