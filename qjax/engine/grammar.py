"""What a form of text means for tokens: which of them may come next, found by llguidance.

A form is compiled where the caller is, not between two steps of the engine, and within limits: the
library counts its work, so that too large a form fails soon and the same way everywhere.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, proxy

import numpy as np

from qjax.engine.grammar_check import LIMITS, check
from qjax.engine.structured_outputs import StructuredOutputs
from qjax.errors import RequestError, UnsupportedError

if TYPE_CHECKING:
    import llguidance

    from qjax.checkpoint.tokenizer import Tokenizer

# Compiled forms that are kept for each model.
_KEPT = 64


class Matcher:
    """Follows one text through a form.

    Attributes:
      mask: int32, V / 32 and perhaps one more: a bit for each token, whether it may come next, the
        lowest bit of the first one.
      complete: whether the text is one of the form, and nothing may follow.
      error: why it cannot be followed any further, or None.
    """

    def __init__(self, matcher: llguidance.LLMatcher, mask: np.ndarray):
        self._matcher = matcher
        self.mask: np.ndarray = mask
        self.complete: bool = False
        self.error: str | None = None

    def consume(self, token: int) -> None:
        """Goes on by the token that came."""
        if not self._matcher.consume_token(token):
            self.error = _short(self._matcher.get_error())
        elif self._matcher.is_stopped():
            self.complete = True
        else:
            self.mask = _mask(self._matcher)
            if self._matcher.is_error():
                self.error = _short(self._matcher.get_error())


class Grammars:
    """Compiles forms for one vocabulary, and keeps them. May be called from several threads.

    Args:
      tokenizer: whose tokens make the text.
      vocab_size: tokens that the model tells apart; those past the tokenizer's never come.
      eos_ids: what may come where the text is complete.

    Raises:
      UnsupportedError: llguidance is not installed.
      RequestError: no token ends a sequence.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]):
        try:
            import llguidance
        except ImportError:
            raise UnsupportedError(
                "structured outputs need llguidance: python -m pip install llguidance"
            ) from None
        eos_ids = frozenset(i for i in eos_ids if i < vocab_size)
        if not eos_ids:
            raise RequestError(
                "structured_outputs need a token that ends a sequence, and this model has none."
            )
        self._vocabulary = llguidance.LLTokenizer(
            _Tokens(tokenizer, vocab_size, eos_ids),  # type: ignore[arg-type]
            eos_token=sorted(eos_ids),
        )
        self._kept: dict[StructuredOutputs, Matcher] = {}
        self._compiling = threading.Lock()  # whoever asks for much takes one processor, not all

    def matcher(self, outputs: StructuredOutputs) -> Matcher:
        """A Matcher at the beginning of a text.

        Raises:
          RequestError: the form is faulty, or too large.
        """
        first = self._kept.get(outputs)
        if first is None:
            with self._compiling:
                first = self._kept.get(outputs) or self._compile(outputs)
                self._kept[outputs] = first
                if len(self._kept) > _KEPT:
                    del self._kept[next(iter(self._kept))]
        return Matcher(first._matcher.deep_copy(), first.mask)

    def _compile(self, outputs: StructuredOutputs) -> Matcher:
        from llguidance import LLMatcher, LLParserLimits

        name, grammar = _grammar(outputs)
        # What choices and objects come to is small.
        reason = None if outputs.choice or outputs.json_object else check(grammar)
        if reason is None:
            limits = LLParserLimits(**LIMITS)
            matcher = LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
            mask = _mask(matcher)
            if not matcher.is_error():
                return Matcher(matcher, mask)
            reason = matcher.get_error()
        reason = _short(reason)
        if not outputs.grammar:  # no place in what was made of it here means anything to callers
            reason = re.sub(r"^at \d+\(\d+\): |failed to compile JSON schema: ", "", reason)
        raise RequestError(f"{name} cannot be followed: {reason}")


_grammars: WeakKeyDictionary[Tokenizer, Grammars] = WeakKeyDictionary()
_making = threading.Lock()


def grammars(tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]) -> Grammars:
    """The Grammars of a model, made once: it takes a second for a large vocabulary."""
    with _making:
        if tokenizer not in _grammars:
            _grammars[tokenizer] = Grammars(tokenizer, vocab_size, eos_ids)
        return _grammars[tokenizer]


def without(mask: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """A mask without some tokens; as it is where they are all that it allows."""
    if not tokens:
        return mask
    ids = np.asarray(tokens)
    less = mask.copy()
    bits = np.left_shift(np.uint32(1), (ids & 31).astype(np.uint32))
    np.bitwise_and.at(less.view(np.uint32), ids >> 5, ~bits)
    return less if less.any() else mask


class _Tokens:
    """A tokenizer as llguidance asks for it."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]):
        self._tokenizer = proxy(tokenizer)  # what is kept for it must not keep it
        self.eos_token_id = min(eos_ids)
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids | eos_ids)

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


# In a schema: a model that may write any white space can write nothing else to the end.
WHITESPACE = {"x-guidance": {"whitespace_pattern": r"[ ]|\n[ \t]{0,32}"}}
# How text is cut into tokens is left to the model; else masks would tokenize all that must follow.
_OPTIONS = '\n%llguidance {"no_forcing": true}\n'


def _grammar(outputs: StructuredOutputs) -> tuple[str, str]:
    """(name of the field that is given, grammar as llguidance takes it)."""
    from llguidance import regex_to_lark

    name = next(field.name for field in fields(outputs) if getattr(outputs, field.name))
    if outputs.json is not None:
        assert isinstance(outputs.json, str)
        grammar = _of_schema(json.loads(outputs.json))
    elif outputs.json_object:
        grammar = _of_schema({"type": "object"})
    elif outputs.regex is not None:
        grammar = f"start: /{regex_to_lark(outputs.regex, use_ascii='')}/"
    elif outputs.choice is not None:
        choices = (json.dumps(each, ensure_ascii=False) for each in outputs.choice)
        grammar = "start: " + " | ".join(choices)
    else:
        assert outputs.grammar is not None
        grammar = outputs.grammar
    return name, grammar + _OPTIONS


def _of_schema(schema: dict[str, Any]) -> str:
    return "start: %json " + json.dumps(schema | WHITESPACE, ensure_ascii=False)


def _mask(matcher: llguidance.LLMatcher) -> np.ndarray:
    return np.frombuffer(matcher.compute_bitmask(), np.int32)


def _short(reason: str) -> str:
    """One line of what llguidance says, without the grammar that it quotes."""
    reason = re.split(r"\n *\d+ \| |<non-verbose/>", reason)[0]
    reason = reason.replace("NoExtensionBias", "there is no such text")
    return " ".join(reason.split())[:300]
