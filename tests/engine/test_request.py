"""Text of a request: stop strings, what is held back while streaming, what ends it."""

import codecs
from typing import Any

import numpy as np
import pytest

from qjax.engine.request import OutputText, Request
from qjax.engine.sampling_params import SamplingParams

EOS = 0


class Bytes:
    """A tokenizer whose tokens are bytes; 0 is a special token."""

    def stream(self, skip_special_tokens: bool = True) -> "Bytes":
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return self

    def push(self, token: int) -> str:
        return "" if token == EOS else self._decoder.decode(bytes([token]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


def request_of(max_tokens: int = 100, **sampling: Any) -> Request:
    params = SamplingParams(max_tokens=max_tokens, **sampling)
    return Request(
        prompt_ids=(1, 2, 3),
        params=params,
        text=OutputText(Bytes(), params),
        eos_ids=frozenset([EOS]),
        max_tokens=max_tokens,
        key=np.zeros(2, np.uint32),
    )


def feed(request: Request, data: bytes) -> list[str]:
    """The pieces that were shown as the tokens came."""
    pieces = []
    for token in data:
        if request.finish_reason is None:
            request.receive(token, 1.0)
            pieces.append(request.text.take())
    return pieces


def ending(request: Request) -> tuple[str, str | None, str | int | None]:
    return request.text.text, request.finish_reason, request.stop_reason


def test_eos_ends_and_is_in_the_tokens_but_not_in_the_text() -> None:
    request = request_of()
    feed(request, b"hi\0more")
    assert ending(request) == ("hi", "stop", None)
    assert request.output_ids == [*b"hi", EOS]


def test_ignore_eos_goes_on() -> None:
    request = request_of(max_tokens=4, ignore_eos=True)
    feed(request, b"a\0bcd")
    assert ending(request) == ("abc", "length", None)


def test_stop_token_is_named_and_left_out() -> None:
    request = request_of(stop_token_ids=[ord("x")])
    feed(request, b"abxc")
    assert ending(request) == ("ab", "stop", ord("x"))
    request = request_of(stop_token_ids=[ord("x")], include_stop_str_in_output=True)
    feed(request, b"abxc")
    assert request.text.text == "abx"


@pytest.mark.parametrize(
    ("include", "text"),
    [(False, "one "), (True, "one STOP")],
)
def test_stop_string_cuts_the_text_and_never_shows(include: bool, text: str) -> None:
    request = request_of(stop=["STOP", "nothing"], include_stop_str_in_output=include)
    pieces = feed(request, b"one STOP two")
    assert ending(request) == (text, "stop", "STOP")
    assert "".join(pieces) == text


def test_the_earliest_stop_string_wins() -> None:
    request = request_of(stop=["bc", "abcd"])
    feed(request, b"xabcd")
    assert ending(request) == ("xa", "stop", "bc")


def test_what_might_become_a_stop_string_is_held_back() -> None:
    request = request_of(stop=["12345"])
    assert feed(request, b"abcdefg") == ["", "", "", "", "a", "b", "c"]
    assert feed(request, b"\0") == ["defg"]


def test_length() -> None:
    request = request_of(max_tokens=3)
    assert "".join(feed(request, b"abcdef")) == "abc"
    assert ending(request) == ("abc", "length", None)


def test_half_a_character_shows_only_when_nothing_more_comes() -> None:
    request = request_of(max_tokens=5)
    pieces = feed(request, "aé€".encode()[:5])
    assert pieces == ["a", "", "é", "", "�"]


def test_min_tokens_puts_off_every_stop() -> None:
    request = request_of(min_tokens=3, stop=["b"], max_tokens=6)
    feed(request, b"abacab")
    assert ending(request) == ("abaca", "stop", "b")


def test_counts_through_prefill_decode_and_restart() -> None:
    request = request_of()
    request.advance(2)
    assert (request.wants_prefill, request.num_sampled) == (True, 0)
    request.advance(1)
    assert (request.wants_prefill, request.num_sampled) == (False, 1)
    request.receive(65, 1.0)
    request.advance(1)
    request.receive(66, 1.0)
    assert (request.num_computed, request.num_sampled) == (4, 2)
    request.restart()
    assert request.known_ids == (1, 2, 3, 65, 66)
    request.advance(5)
    assert (request.wants_prefill, request.num_sampled) == (False, 3)
