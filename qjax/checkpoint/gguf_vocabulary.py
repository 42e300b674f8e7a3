"""A folder's tokenizer as GGUF metadata (`tokenizer.ggml.*`): the way back of `tokenizer_gguf`.

Two kinds of tokenizer.json have a form there: byte-level BPE ("gpt2"), whose way of cutting text
into words has a name in llama.cpp, and SentencePiece's BPE ("llama"). The name is found by trying:
what cuts a text full of odd cases as the tokenizer does is it. In the end the metadata must encode
that text as the tokenizer does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qjax.checkpoint.pretokenizers import PRE_TOKENIZERS
from qjax.checkpoint.sentencepiece import SPACE
from qjax.checkpoint.tokenizer import (
    find_template,
    generation_eos_ids,
    read_json,
    read_tokenizer,
    special_tokens,
)
from qjax.checkpoint.tokenizer_gguf import GGUFVocabulary
from qjax.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    import tokenizers

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
# tokenizer_config.json's names -> GGUF's.
_NAMED = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
    "sep_token": "seperator",  # spelled so in the specification
    "mask_token": "mask",
}
# What vocabularies cut differently: contractions in both cases, digits, runs of spaces and of line
# ends, marks beside letters, letters of several scripts and cases, numbers among them.
_ODD_CASES = (
    "Hello, world!  I'm sure you'LL see it's 12345 67,890.12 (3rd)\n\n\n  indented\tTabs \t x_y\r\n"
    "don't DON'T camelCase HTTPServer IPv6 e-mail@example.com https://a.b/c?d=e&f=1#g  "
    "C'est déjà l'été; Größe ÄÖÜ ñandú ßtraße Ελληνικά Русский язык ١٢٣ हिन्दी 日本語のテキスト"
    "、中文字符。한국어 문장 ½ ² Ⅷ → ≠ €100 $5.00 …—«quoted» 'single' ``code`` **bold** "
    "///path\\\\x \u00a0nbsp \u3000wide   end   \n \n x=[1,2,3]; {a:b} <tag/> !!! ??? ... --- +++\n"
)


def vocabulary_metadata(folder: Path, size: int) -> dict[str, Any]:
    """The keys of a folder's tokenizer and chat template.

    Args:
      folder: with tokenizer.json (see `load_tokenizer` for what may lie beside it).
      size: rows of the model's embedding; ids without a token get a name each.

    Raises:
      CheckpointError: a file is missing, damaged or contradicts itself.
      UnsupportedError: a tokenizer that has no form in GGUF.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError("no such file; GGUF files carry their tokenizer", file=file)
    built = read_tokenizer(file)
    parts = json.loads(built.to_str())
    model = parts["model"]
    if model["type"] != "BPE":
        raise UnsupportedError(
            f"{file}: a vocabulary of the type {model['type']}; BPE can be written to GGUF files"
        )
    tokens, types = _tokens(built, model, size, file)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    found: dict[str, Any] = {}
    if model.get("byte_fallback"):
        found |= _sentencepiece(built, tokens, types, merges)
    else:
        name = _pre_tokenizer_name(built, parts, file)
        found |= {"model": "gpt2", "pre": name, "tokens": tokens, "token_type": types}
        found["merges"] = merges
    found |= _named(built, folder)
    metadata = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    template = find_template(folder, read_json(folder / "tokenizer_config.json"))
    if template is not None:
        metadata["tokenizer.chat_template"] = template[0]
    _check(built, metadata, file)
    return metadata


def _tokens(
    built: tokenizers.Tokenizer, model: dict[str, Any], size: int, file: Path
) -> tuple[list[str], np.ndarray]:
    added = built.get_added_tokens_decoder()
    by_id = {i: text for text, i in built.get_vocab(with_added_tokens=True).items()}
    if by_id and max(by_id) >= size:
        raise CheckpointError(
            f"has the token {max(by_id)}, the model's embedding has {size} rows", file=file
        )
    types = np.full(size, _NORMAL, np.int32)
    tokens = []
    for i in range(size):
        if i not in by_id:
            types[i] = _UNUSED
        elif i in added:
            types[i] = _CONTROL if added[i].special else _USER_DEFINED
        tokens.append(by_id.get(i, f"[PAD{i}]"))
    if model.get("byte_fallback"):
        for byte in range(256):
            i = built.token_to_id(f"<0x{byte:02X}>")
            if i is not None:
                types[i] = _BYTE
        unknown = model.get("unk_token") and built.token_to_id(model["unk_token"])
        if isinstance(unknown, int):
            types[unknown] = _UNKNOWN
    return tokens, types


def _sentencepiece(
    built: tokenizers.Tokenizer, tokens: list[str], types: np.ndarray, merges: list[str]
) -> dict[str, Any]:
    """Scores in the order of the merges: who comes first is joined first."""
    rank: dict[str, int] = {}
    for place, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        rank.setdefault(left + right, place)
    scores = [-float(rank.get(token, len(merges))) for token in tokens]
    first = built.encode("a", add_special_tokens=False).tokens[:1]
    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": np.asarray(scores, np.float32),
        "token_type": types,
        "add_space_prefix": bool(first) and first[0].startswith(SPACE),
    }


def _pre_tokenizer_name(built: tokenizers.Tokenizer, parts: dict[str, Any], file: Path) -> str:
    from tokenizers import Regex, pre_tokenizers

    if built.pre_tokenizer is None:
        raise UnsupportedError(f"{file}: has no pre_tokenizer")
    wanted = [piece for piece, _ in built.pre_tokenizer.pre_tokenize_str(_ODD_CASES)]
    normalizer = parts.get("normalizer") or {}
    composed = normalizer.get("type") == "NFC"
    whole_words = bool(parts["model"].get("ignore_merges"))
    found: list[str] = []
    for name, pre in PRE_TOKENIZERS.items():
        cutter = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
            + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        same = [piece for piece, _ in cutter.pre_tokenize_str(_ODD_CASES)] == wanted
        if same and pre.ignore_merges == whole_words:
            if pre.nfc == composed:
                return name
            found.append(name)
    if found:
        return found[0]
    raise UnsupportedError(
        f"{file}: cuts text into words as no tokenizer does that llama.cpp has a name for (of "
        f"{', '.join(PRE_TOKENIZERS)})"
    )


def _named(built: tokenizers.Tokenizer, folder: Path) -> dict[str, Any]:
    config = read_json(folder / "tokenizer_config.json")
    named = special_tokens({**read_json(folder / "special_tokens_map.json"), **config})
    ids = {key: built.token_to_id(named[name]) for name, key in _NAMED.items() if name in named}
    ids = {key: i for key, i in ids.items() if i is not None}
    ends = generation_eos_ids(folder)
    if "eos" not in ids and ends:
        ids["eos"] = min(ends)
    others = sorted(ends - {ids.get("eos")})
    if others:
        ids["eot"] = others[0]
    found: dict[str, Any] = {f"{key}_token_id": i for key, i in ids.items()}
    plain = built.encode("a", add_special_tokens=False).ids
    around = built.encode("a", add_special_tokens=True).ids
    at = next(i for i in range(len(around)) if around[i : i + len(plain)] == plain)
    before, after = around[:at], around[at + len(plain) :]
    for which, put, key in (("before", before, "bos"), ("behind", after, "eos")):
        if put not in ([], [ids.get(key)]):
            raise UnsupportedError(
                f"{folder / 'tokenizer.json'}: puts the tokens {put} {which} a text; a GGUF file "
                f"can say no more than the {key} token"
            )
        found[f"add_{key}_token"] = bool(put)
    return found


def _check(built: tokenizers.Tokenizer, metadata: dict[str, Any], file: Path) -> None:
    encode = GGUFVocabulary(metadata, str(file)).encoder()
    if encode(_ODD_CASES) != built.encode(_ODD_CASES, add_special_tokens=False).ids:
        raise UnsupportedError(
            f"{file}: encodes text as no tokenizer does that GGUF metadata can describe"
        )
