"""SentencePiece's BPE kind, run from its scores: what GGUF calls the `llama` tokenizer model.

The `tokenizers` library wants a list of merges, which for a vocabulary of 262,144 pieces takes
seconds to derive and to load. The scores alone say the same: of all neighbours whose concatenation
is a piece, the pair that makes the piece of the highest score is joined first (Kudo and Richardson
2018, arXiv:1808.06226). Words repeat, so their ids are kept.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

SPACE = "\u2581"  # how a piece spells a space

_WORDS_KEPT = 1 << 14
_LONGEST_KEPT = 64  # characters; longer words hardly come twice


class SpecialTokens:
    """Finds special tokens in text: the leftmost first, and there the longest.

    Args:
      ids: token text -> id. Empty texts are never found.
      rstrip: ids of the tokens that swallow the whitespace behind them.
    """

    def __init__(self, ids: Mapping[str, int], rstrip: frozenset[int] = frozenset()):
        self._ids = {text: i for text, i in ids.items() if text}
        self._rstrip = rstrip
        lengths: dict[str, set[int]] = {}
        for text in self._ids:
            lengths.setdefault(text[0], set()).add(len(text))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        firsts = "".join(map(re.escape, lengths))
        self._first = re.compile(f"[{firsts}]" if firsts else r"(?!)")

    def split(self, text: str) -> list[str | int]:
        """The text in order, with each special token replaced by its id; no part is empty."""
        parts: list[str | int] = []
        done = position = 0
        while match := self._first.search(text, position):
            start = match.start()
            for length in self._lengths[text[start]]:
                found = self._ids.get(text[start : start + length])
                if found is not None:
                    break
            else:
                position = start + 1
                continue
            if done < start:
                parts.append(text[done:start])
            parts.append(found)
            done = position = start + length
            if found in self._rstrip:
                done = position = len(text) - len(text[done:].lstrip())
        if done < len(text):
            parts.append(text[done:])
        return parts


class SentencePieceBPE:
    """Text -> ids by the scores of a SentencePiece BPE vocabulary.

    Args:
      ids: piece, with U+2581 for each space -> id; what may be merged into and out of.
      scores: score of every id, the highest first to be merged.
      specials: the tokens cut out of the text before anything is merged.
      byte_ids: 256 ids of the byte tokens (an empty sequence: no fallback to bytes).
      unk_id: stands for a run of characters that have neither piece nor bytes; None drops them.
      add_space_prefix: put a space before the text, and after each special token.
    """

    def __init__(
        self,
        ids: Mapping[str, int],
        scores: Sequence[float],
        specials: SpecialTokens,
        *,
        byte_ids: Sequence[int] = (),
        unk_id: int | None = None,
        add_space_prefix: bool,
    ):
        self._ids = ids
        self._scores = scores
        self._specials = specials
        self._byte_ids = byte_ids
        self._unk_id = unk_id
        self._prefix = SPACE if add_space_prefix else ""
        # A word ends where a space follows, unless some piece spans such a place.
        spanning = {pair[0] for pair in re.findall(f"[^{SPACE}\0]{SPACE}", "\0".join(ids))}
        self._word_end = re.compile(
            f"(?<=[^{SPACE}{re.escape(''.join(sorted(spanning)))}])(?={SPACE})"
        )
        self._remembered_word = lru_cache(_WORDS_KEPT)(self._encode_word)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; special tokens in it are recognized, none is added."""
        ids: list[int] = []
        for part in self._specials.split(text):
            if isinstance(part, int):
                ids.append(part)
                continue
            for word in self._word_end.split(self._prefix + part.replace(" ", SPACE)):
                known = len(word) <= _LONGEST_KEPT
                ids.extend(self._remembered_word(word) if known else self._encode_word(word))
        return ids

    def _encode_word(self, word: str) -> list[int]:
        ids: list[int] = []
        unknown = False  # whether the last character was
        for piece in self._merge(word):
            found = self._ids.get(piece)
            if found is not None:
                ids.append(found)
            elif self._byte_ids:
                ids.extend(self._byte_ids[byte] for byte in piece.encode())
            elif self._unk_id is not None and not unknown:
                ids.append(self._unk_id)
            unknown = found is None
        return ids

    def _merge(self, word: str) -> list[str]:
        """Joins neighbours, best piece first and leftmost of equals, while any two make a piece."""
        pieces = list(word)
        after = list(range(1, len(pieces) + 1))
        before = list(range(-1, len(pieces) - 1))
        queue: list[tuple[float, int, str, str]] = []

        def offer(place: int, left: str, right: str) -> None:
            made = self._ids.get(left + right)
            if made is not None:
                heapq.heappush(queue, (-self._scores[made], place, left, right))

        for i in range(len(pieces) - 1):
            offer(i, pieces[i], pieces[i + 1])
        while queue:
            _, i, left, right = heapq.heappop(queue)
            j = after[i]
            if j >= len(pieces) or pieces[i] != left or pieces[j] != right:
                continue  # one of the two has been joined to something else since
            pieces[i], pieces[j] = left + right, ""
            after[i] = after[j]
            if after[i] < len(pieces):
                before[after[i]] = i
                offer(i, pieces[i], pieces[after[i]])
            if before[i] >= 0:
                offer(before[i], pieces[before[i]], pieces[i])
        return [piece for piece in pieces if piece]
