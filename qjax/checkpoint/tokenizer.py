"""Text to token ids and back, from a checkpoint folder or a GGUF file.

One `Tokenizer` for every kind of vocabulary. Decoding works on bytes: each token stands for some
bytes, and text is what UTF-8 makes of them, so a stream can never show half a character and joined
pieces equal the whole. Bytes that are no UTF-8 become U+FFFD.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qjax.checkpoint.chat import ChatTemplate
from qjax.checkpoint.sentencepiece import SPACE
from qjax.errors import CheckpointError, RequestError, UnsupportedError

if TYPE_CHECKING:
    import tokenizers

    from qjax.checkpoint.gguf_io import GGUFFile

_LARGEST_FILE = 1 << 28


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Attributes:
    vocab_size: number of ids that have a text; a model's head may have more rows.
    bos_id: id that begins a text, or None.
    eos_id: id that ends a text, or None.
    eos_ids: ids that end a reply.
    special_ids: ids that `decode` and `stream` leave out unless told otherwise.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    eos_ids: frozenset[int]
    special_ids: frozenset[int] = field(repr=False)
    chat_template: ChatTemplate | None = field(repr=False)
    _encode: Callable[[str, bool], list[int]] = field(repr=False)
    _token_bytes: Callable[[int], bytes] = field(repr=False)
    _strip_space: bool = field(repr=False)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`. Special tokens written out in it become their ids.

        Args:
          text: any text; what a chat template gave is encoded with add_special_tokens=False, since
            templates write BOS themselves.
          add_special_tokens: also add what the model expects around a text (BOS, seldom EOS).

        Raises:
          RequestError: the text holds half a surrogate pair, which has no UTF-8 form.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text has no UTF-8 form: character {error.start} is half a surrogate pair"
            ) from None
        return self._encode(text, add_special_tokens)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`, without the space that SentencePiece put first. Unknown ids are empty."""
        stream = self.stream(skip_special_tokens)
        text = "".join(map(stream.push, ids)) + stream.flush()
        return text.removeprefix(" ") if self._strip_space else text

    def stream(self, skip_special_tokens: bool = True) -> TokenStream:
        """A decoder for ids that come one by one and continue a text: a leading space is kept."""
        skipped = self.special_ids if skip_special_tokens else frozenset[int]()
        return TokenStream(self._token_bytes, skipped)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that an id stands for; none for an id that the vocabulary does not have."""
        return self._token_bytes(token)

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt that the model's chat template makes of `messages`.

        Encode it with add_special_tokens=False.

        Args:
          messages: {"role": ..., "content": ...} each, oldest first.
          add_generation_prompt: end with what opens the model's reply.
          tools: functions that the model may call, see `ChatTemplate.render`.

        Raises:
          RequestError: the model has no chat template, or its template refuses these messages.
          CheckpointError: the template is faulty or asks for too much work.
        """
        if self.chat_template is None:
            raise RequestError(
                "this model has no chat template: give the prompt as one string, which is "
                "completed as it is (on the command line: --raw)"
            )
        return self.chat_template.render(messages, add_generation_prompt, tools)


class TokenStream:
    """Ids in, text out as soon as it is whole. Made by `Tokenizer.stream`."""

    def __init__(self, token_bytes: Callable[[int], bytes], skipped: frozenset[int]):
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that became whole with `token`; often empty inside a character."""
        if token in self._skipped:
            return ""
        return self._utf8.decode(self._token_bytes(token))

    def flush(self) -> str:
        """What is left at the end: U+FFFD where a character was cut short, else empty."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(source: str | os.PathLike[str] | GGUFFile) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
      source: a folder with tokenizer.json (and tokenizer_config.json, special_tokens_map.json,
        generation_config.json, chat_template.jinja where there are such), or an open GGUF file.

    Raises:
      CheckpointError: a file is missing, damaged, or contradicts itself.
      UnsupportedError: a kind of tokenizer that qjax does not run.
    """
    if isinstance(source, (str, os.PathLike)):
        return _from_folder(Path(source))
    return _from_gguf(source.metadata, os.fspath(source.path))


# --- GGUF -----------------------------------------------------------------------------------------


def _from_gguf(metadata: dict[str, Any], file: str) -> Tokenizer:
    from qjax.checkpoint.tokenizer_gguf import GGUFVocabulary

    vocabulary = GGUFVocabulary(metadata, file)
    tokens = vocabulary.tokens
    encode = vocabulary.encoder()
    before = [i for i in (vocabulary.bos_id,) if vocabulary.add_bos and i is not None]
    after = [i for i in (vocabulary.eos_id,) if vocabulary.add_eos and i is not None]
    template = metadata.get("tokenizer.chat_template")
    named = {"bos_token": vocabulary.bos_id, "eos_token": vocabulary.eos_id}
    return Tokenizer(
        vocab_size=len(tokens),
        bos_id=vocabulary.bos_id,
        eos_id=vocabulary.eos_id,
        eos_ids=vocabulary.eos_ids,
        special_ids=vocabulary.special_ids,
        chat_template=None
        if template is None
        else ChatTemplate(
            template,
            {name: "" if i is None else tokens[i] for name, i in named.items()},
            file=file,
        ),
        _encode=lambda text, special: [*before, *encode(text), *after] if special else encode(text),
        _token_bytes=_token_bytes(
            lambda i: tokens[i] if 0 <= i < len(tokens) else None,
            frozenset(vocabulary.cut_ids),
            vocabulary.byte_values if vocabulary.model != "gpt2" else None,
        ),
        _strip_space=vocabulary.add_space_prefix,
    )


# --- folders --------------------------------------------------------------------------------------


def _from_folder(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        if (folder / "tokenizer.model").is_file():
            raise UnsupportedError(
                f"{folder} has tokenizer.model but no tokenizer.json. Make one with transformers: "
                f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
            )
        raise CheckpointError("no such file; the folder has no tokenizer", file=file)
    config = read_json(folder / "tokenizer_config.json")
    named = special_tokens({**read_json(folder / "special_tokens_map.json"), **config})
    built = read_tokenizer(file)

    ids = {name: built.token_to_id(text) for name, text in named.items()}
    added = built.get_added_tokens_decoder()
    byte_values, strip_space = _decoder_kind(built, file)
    template = find_template(folder, config)
    eos_ids = generation_eos_ids(folder) | {ids.get("eos_token")}
    return Tokenizer(
        vocab_size=built.get_vocab_size(),
        bos_id=ids.get("bos_token"),
        eos_id=ids.get("eos_token"),
        eos_ids=frozenset(i for i in eos_ids if i is not None),
        special_ids=frozenset(i for i, token in added.items() if token.special),
        chat_template=None if template is None else ChatTemplate(template[0], named, template[1]),
        _encode=lambda text, special: built.encode(text, add_special_tokens=special).ids,
        _token_bytes=_token_bytes(
            lambda i: built.id_to_token(i) if 0 <= i < 1 << 31 else None,
            frozenset(added),
            byte_values,
        ),
        _strip_space=strip_space,
    )


def read_tokenizer(file: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Library

    text = _read_text(file)
    try:
        built = Library.from_str(text)
    except Exception as error:
        raise CheckpointError(str(error)[:200], file=file) from None
    built.no_truncation()  # a length limit is the engine's affair
    built.no_padding()
    return built


def _decoder_kind(built: tokenizers.Tokenizer, file: Path) -> tuple[dict[int, int] | None, bool]:
    """(id -> byte of the byte tokens, or None for a byte-level vocabulary; strip a first space)."""
    decoder = {} if built.decoder is None else json.loads(built.decoder.__getstate__())
    steps = decoder.get("decoders", [decoder])
    kinds = {step.get("type") for step in steps}
    if kinds == {"ByteLevel"}:
        return None, False
    if kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        spelled = {step["pattern"].get("String") for step in steps if step["type"] == "Replace"}
        if "Metaspace" in kinds or spelled == {SPACE}:
            found = {byte: built.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
            byte_values = {i: byte for byte, i in found.items() if i is not None}
            prefixed = any(
                s["type"] == "Metaspace" and s["prepend_scheme"] != "never" for s in steps
            )
            return byte_values, "Strip" in kinds or prefixed
    raise UnsupportedError(
        f"{file}: its decoder is {' + '.join(sorted(map(str, kinds)))}; byte-level and "
        "SentencePiece decoders are supported"
    )


def special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Name ("bos_token", ...) -> text, from entries that are texts or {"content": text, ...}."""
    named = {}
    for name, entry in config.items():
        if name.endswith("_token"):
            text = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(text, str):
                named[name] = text
    return named


def generation_eos_ids(folder: Path) -> set[int]:
    file = folder / "generation_config.json"
    found = read_json(file).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise CheckpointError(
            f"is {str(found)[:40]!r}, not token ids", file=file, field="eos_token_id"
        )
    return set(ids)


def find_template(folder: Path, config: dict[str, Any]) -> tuple[str, str] | None:
    """(template, file it is from), of the places in the order that transformers looks."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return _read_text(file), str(file)
    file = folder / "tokenizer_config.json"
    found = config.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise CheckpointError("is not a text", file=file, field="chat_template")
    return None if found is None else (found, str(file))


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not JSON: {error}", file=file) from None
    if not isinstance(found, dict):
        raise CheckpointError("is not a JSON object", file=file)
    return found


def _read_text(file: Path) -> str:
    if file.stat().st_size > _LARGEST_FILE:
        raise CheckpointError(f"is larger than {_LARGEST_FILE >> 20} MiB", file=file)
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError("is not UTF-8", file=file, offset=error.start) from None


# --- bytes of tokens ------------------------------------------------------------------------------


def _token_bytes(
    text: Callable[[int], str | None], whole: frozenset[int], byte_values: dict[int, int] | None
) -> Callable[[int], bytes]:
    """A function from id to the bytes it stands for; ids without a text have none.

    Args:
      text: id -> how the vocabulary spells it.
      whole: ids of added tokens, which are spelled as they read.
      byte_values: id -> byte; None for a byte-level vocabulary, whose every letter is a byte.
    """
    level = _byte_level_alphabet()
    kept: dict[int, bytes] = {}

    def find(token: int) -> bytes:
        piece = text(token)
        if piece is None:
            return b""
        if byte_values is not None:
            if token in byte_values:
                return bytes([byte_values[token]])
            return piece.replace(SPACE, " ").encode()
        if token in whole or not all(letter in level for letter in piece):
            return piece.encode()
        return bytes(level[letter] for letter in piece)

    def token_bytes(token: int) -> bytes:
        if token not in kept:
            kept[token] = find(token)
        return kept[token]

    return token_bytes


def _byte_level_alphabet() -> dict[str, int]:
    """Letter -> byte of byte-level vocabularies.

    Printable Latin-1 bytes stand for themselves; the others, in order, for the letters from U+0100
    on (GPT-2's encoder.py).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
