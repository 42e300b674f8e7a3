"""Tokenizers from GGUF metadata (`tokenizer.ggml.*`).

Three kinds: `gpt2` (byte-level BPE) and `t5` (unigram) are built with the `tokenizers` library,
`llama` (SentencePiece BPE) runs from its scores in `sentencepiece.py`. Where llama.cpp and the
tokenizer.json that the same model has on the Hugging Face hub part ways, the latter is followed:

- Special tokens are cut out leftmost first, then longest; llama.cpp takes the longest first,
  anywhere in the text.
- Special tokens in the text of a user are special (llama.cpp: a switch of the caller).
- A literal U+2581 in the text is part of SentencePiece's own whitespace tokens.
- Text for Qwen models is brought into NFC.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from qjax.checkpoint.pretokenizers import PRE_TOKENIZERS
from qjax.checkpoint.sentencepiece import SPACE, SentencePieceBPE, SpecialTokens
from qjax.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    import tokenizers

# Values of tokenizer.ggml.token_type that matter here.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_PREFIX = "tokenizer.ggml."

# Tokens that end a reply, whichever of them the metadata names: files made from chat models often
# name only one (the list is llama.cpp's).
_END_TEXTS = (
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>"),
    *("<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<end_of_utterance>", "<eos>"),
    *("<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<｜end▁of▁sentence｜>"),
)
# In gpt-oss's format <|end|> closes one message of several; these two close the reply.
_NOT_END_BESIDE = ("<|end|>", ("<|return|>", "<|call|>"))


# Gemma's files call thousands of tokens control tokens that its tokenizer.json counts as text, HTML
# tags among them; these are the special ones.
_GEMMA_SPECIAL = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
    *("<start_of_image>", "<end_of_image>"),
)


class GGUFVocabulary:
    """The vocabulary and settings that GGUF metadata describes, checked against each other.

    Attributes:
      model: "gpt2", "llama" or "t5".
      tokens: text of each id, as spelled in the file.
      architecture: the model's, which decides where the file says less than tokenizer.json does.
      special_ids: ids that decoding leaves out unless told otherwise.
      cut_ids: ids of the tokens that are found in text as they stand: these and user-defined ones.
      byte_values: id -> byte, of the tokens that stand for one byte.
      bos_id, eos_id, unk_id: None where the vocabulary has none.
      eos_ids: every token that ends a reply.
      add_bos, add_eos: put first, or last, when text is encoded.
      add_space_prefix: SentencePiece's space before the text.
    """

    def __init__(self, metadata: dict[str, Any], file: str):
        self._metadata = metadata
        self._file = file
        self.model: str = self._get("model", str, None)
        if self.model not in ("gpt2", "llama", "t5"):
            raise UnsupportedError(
                f"{file}: {_PREFIX}model is {self.model!r}; tokenizers of the kinds gpt2, llama "
                "(SentencePiece) and t5 (unigram) can be built"
            )
        self.tokens: list[str] = self._get("tokens", list, None)
        if not self.tokens:
            self._fail("tokens", "is missing: the file has no vocabulary")
        size = len(self.tokens)
        self.types: np.ndarray = self._get("token_type", np.ndarray, np.ones(size, np.int32))
        scores = self._get("scores", np.ndarray, np.zeros(size, np.float32))
        if not np.isfinite(scores).all():
            self._fail("scores", "holds a value that is not finite")
        # The score of a user-defined piece is never read from the file: converters write anything.
        self.scores = np.where(self.types == _USER_DEFINED, 0.0, scores).astype(np.float64)
        self.byte_values: dict[int, int] = {}
        for i in np.flatnonzero(self.types == _BYTE).tolist():
            if not re.fullmatch("<0x[0-9A-Fa-f]{2}>", self.tokens[i]):
                self._fail(
                    "tokens", f"{self.tokens[i][:40]!r} is marked as a byte but is not <0x..>"
                )
            self.byte_values[i] = int(self.tokens[i][3:5], 16)
        cut = np.isin(self.types, (_UNKNOWN, _CONTROL, _USER_DEFINED))
        self.cut_ids: list[int] = np.flatnonzero(cut).tolist()
        self.architecture = str(metadata.get("general.architecture"))
        if self.architecture.startswith("gemma"):
            special = [i for i in self.cut_ids if self.tokens[i] in _GEMMA_SPECIAL]
        else:
            special = [i for i in self.cut_ids if self.types[i] != _USER_DEFINED]
        self.special_ids = frozenset(special)

        spm, unigram = self.model == "llama", self.model == "t5"
        self.bos_id = self._get_id("bos", 1 if spm else None)
        self.eos_id = self._get_id("eos", {"llama": 2, "t5": 1}.get(self.model))
        self.unk_id = self._get_id("unknown", {"llama": 0, "t5": 2}.get(self.model))
        self.add_bos = self._get("add_bos_token", bool, spm or self._pre_adds_bos())
        self.add_eos = self._get("add_eos_token", bool, unigram)
        self.add_space_prefix = self._get("add_space_prefix", bool, self.model != "gpt2")
        for name, wanted in (("bos", self.add_bos), ("eos", self.add_eos)):
            if wanted and getattr(self, f"{name}_id") is None:
                self._fail(f"add_{name}_token", f"is set, but {_PREFIX}{name}_token_id is missing")
        self.eos_ids = self._find_eos_ids()

    def _get(self, name: str, kind: type, default: Any) -> Any:
        found = self._metadata.get(_PREFIX + name, default)
        if found is not None and not isinstance(found, kind):
            self._fail(name, f"is {str(found)[:40]!r}, not of type {kind.__name__}")
        return found

    def _get_id(self, name: str, default: int | None) -> int | None:
        found = self._get(f"{name}_token_id", int, default)
        if found is not None and not 0 <= found < len(self.tokens):
            self._fail(f"{name}_token_id", f"is {found}; there are {len(self.tokens)} tokens")
        return found

    def _fail(self, name: str, reason: str) -> NoReturn:
        raise CheckpointError(reason, file=self._file, field=_PREFIX + name)

    def _pre_adds_bos(self) -> bool:
        return self.model == "gpt2" and self._pre_tokenizer().add_bos

    def _pre_tokenizer(self):
        name = self._get("pre", str, "default")
        if name not in PRE_TOKENIZERS:
            raise UnsupportedError(
                f"{self._file}: {_PREFIX}pre is {name!r}; known are {', '.join(PRE_TOKENIZERS)}. "
                "A folder with the model's tokenizer.json works with any."
            )
        return PRE_TOKENIZERS[name]

    def _find_eos_ids(self) -> frozenset[int]:
        named = {self._get_id(name, None) for name in ("eot", "eom")}
        ends = set(_END_TEXTS)
        cut = {self.tokens[i]: i for i in self.cut_ids if self.tokens[i] in ends}
        text, others = _NOT_END_BESIDE
        if all(other in cut for other in others):
            cut.pop(text, None)
        return frozenset({*named, self.eos_id, *cut.values()} - {None})

    def _by_text(self, ids: range | list[int]) -> dict[str, int]:
        found = {self.tokens[i]: i for i in ids}
        if len(found) != len(ids):
            seen: set[str] = set()
            twice = next(t for t in (self.tokens[i] for i in ids) if t in seen or seen.add(t))
            self._fail("tokens", f"has {twice[:40]!r} twice")
        return found

    def encoder(self) -> Callable[[str], list[int]]:
        """A function from text to ids, which recognizes special tokens and adds none.

        Raises CheckpointError for a vocabulary that contradicts itself.
        """
        if self.model == "llama":
            return self._sentencepiece().encode
        built = self.library_tokenizer()
        return lambda text: built.encode(text, add_special_tokens=False).ids

    def library_tokenizer(self) -> tokenizers.Tokenizer:
        """What the `tokenizers` library makes of a vocabulary that is not SentencePiece's BPE.

        Raises CheckpointError for a vocabulary that contradicts itself.
        """
        return self._byte_level_bpe() if self.model == "gpt2" else self._unigram()

    @property
    def rstrip_ids(self) -> frozenset[int]:
        """Tokens that swallow the whitespace behind them: in Phi-3's tokenizer.json those of the
        chat format, line ends too.
        """
        keep = {"<s>", "<unk>", "<|endoftext|>"}
        phi3 = self.architecture == "phi3"
        return frozenset(i for i in self.cut_ids if phi3 and self.tokens[i] not in keep)

    def _sentencepiece(self) -> SentencePieceBPE:
        ids = self._by_text(range(len(self.tokens)))
        cut = {}
        for i in self.cut_ids:
            text = self.tokens[i]
            cut[text.replace(" ", SPACE)] = i
            del ids[text]
            if self.types[i] == _USER_DEFINED:
                ids[text.replace(" ", SPACE)] = i
        for i in self.byte_values:
            del ids[self.tokens[i]]
        by_byte = {byte: i for i, byte in self.byte_values.items()}
        return SentencePieceBPE(
            ids,
            self.scores.tolist(),
            SpecialTokens(cut, self.rstrip_ids),
            byte_ids=[by_byte[b] for b in range(256)] if len(by_byte) == 256 else (),
            unk_id=self.unk_id,
            add_space_prefix=self.add_space_prefix,
        )

    def _byte_level_bpe(self) -> tokenizers.Tokenizer:
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

        pre = self._pre_tokenizer()
        merges = self._get("merges", list, None)
        if merges is None:
            self._fail("merges", "is missing, and byte-level BPE needs it")
        # Parts may not hold a space, but some files have merges of whole added tokens: the first
        # space behind the first character parts them.
        pairs = []
        for i, merge in enumerate(merges):
            at = merge.find(" ", 1)
            if at < 0:
                self._fail("merges", f"entry {i}, {merge[:40]!r}, is not two parts")
            pairs.append((merge[:at], merge[at + 1 :]))
        vocabulary = self._by_text(range(len(self.tokens)))
        try:
            model = models.BPE(vocabulary, pairs, ignore_merges=pre.ignore_merges)
        except Exception as error:
            self._fail("merges", str(error)[:200])
        built = Tokenizer(model)
        if pre.nfc:
            built.normalizer = normalizers.NFC()
        built.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
            + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        self._add_cut_tokens(built)
        return built

    def _unigram(self) -> tokenizers.Tokenizer:
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

        self._by_text(range(len(self.tokens)))  # refuses duplicates
        pieces = [
            (text, float(score)) for text, score in zip(self.tokens, self.scores, strict=True)
        ]
        try:
            model = models.Unigram(pieces, self.unk_id, len(self.byte_values) == 256)
        except Exception as error:
            self._fail("tokens", str(error)[:200])
        built = Tokenizer(model)
        steps: list[Any] = []
        charsmap = self._metadata.get(_PREFIX + "precompiled_charsmap")
        if charsmap is not None:
            try:
                steps.append(
                    normalizers.Precompiled(np.asarray(charsmap).astype(np.uint8).tobytes())
                )
            except Exception as error:
                self._fail("precompiled_charsmap", str(error)[:200])
        if self._get("remove_extra_whitespaces", bool, False):
            steps += [
                normalizers.Replace(Regex(e), r) for e, r in (("^ +| +$", ""), (" {2,}", " "))
            ]
        built.normalizer = normalizers.Sequence(steps)
        scheme = "always" if self.add_space_prefix else "never"
        built.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, scheme, split=False)
        self._add_cut_tokens(built)
        return built

    def _add_cut_tokens(self, built: tokenizers.Tokenizer) -> None:
        from tokenizers import AddedToken

        built.add_tokens(
            [
                AddedToken(self.tokens[i], normalized=False, special=i in self.special_ids)
                for i in self.cut_ids
                if self.tokens[i]
            ]
        )
