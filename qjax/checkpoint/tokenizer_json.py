"""The files of a Hugging Face tokenizer, made from the vocabulary of a GGUF file.

tokenizer.json is written by the `tokenizers` library: byte-level BPE and unigram as they are built
for our own use, with a decoder and what is put around a text; SentencePiece's BPE with the merges
that its scores stand for, as transformers' converter derives them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qjax.checkpoint.detect import write_json
from qjax.checkpoint.gguf_io import GGUFFile
from qjax.checkpoint.sentencepiece import SPACE
from qjax.checkpoint.tokenizer_gguf import GGUFVocabulary

if TYPE_CHECKING:
    import tokenizers


def write_tokenizer(gguf: GGUFFile, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json.

    Raises:
      CheckpointError: the vocabulary contradicts itself.
      UnsupportedError: it is of a kind that is not read.
    """
    vocabulary = GGUFVocabulary(gguf.metadata, gguf.path)
    built = library_tokenizer(vocabulary)
    built.save(str(folder / "tokenizer.json"))
    named = {"bos": vocabulary.bos_id, "eos": vocabulary.eos_id, "unk": vocabulary.unk_id}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        "clean_up_tokenization_spaces": False,
    }
    tokens = vocabulary.tokens
    config |= {f"{name}_token": tokens[i] for name, i in named.items() if i is not None}
    pad = gguf.metadata.get("tokenizer.ggml.padding_token_id", vocabulary.eos_id)
    if isinstance(pad, int) and 0 <= pad < len(tokens):
        config["pad_token"] = tokens[pad]
    template = gguf.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    write_json(folder / "tokenizer_config.json", config)
    generation = {"eos_token_id": sorted(vocabulary.eos_ids)}
    if vocabulary.bos_id is not None:
        generation = {"bos_token_id": vocabulary.bos_id} | generation
    write_json(folder / "generation_config.json", generation)


def library_tokenizer(vocabulary: GGUFVocabulary) -> tokenizers.Tokenizer:
    """The whole tokenizer as the `tokenizers` library runs it."""
    from tokenizers import decoders, processors

    if vocabulary.model == "llama":
        built = _sentencepiece(vocabulary)
    else:
        built = vocabulary.library_tokenizer()
        byte_level = vocabulary.model == "gpt2"
        built.decoder = decoders.ByteLevel() if byte_level else decoders.Metaspace(SPACE)
    before, after = (
        [vocabulary.tokens[i]] if wanted and i is not None else []
        for wanted, i in (
            (vocabulary.add_bos, vocabulary.bos_id),
            (vocabulary.add_eos, vocabulary.eos_id),
        )
    )
    if before or after:
        ids = {text: vocabulary.tokens.index(text) for text in (*before, *after)}
        built.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B", *after],
            special_tokens=list(ids.items()),
        )
    return built


def _sentencepiece(vocabulary: GGUFVocabulary) -> tokenizers.Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    # Tokens of spaces, which some files spell so, are pieces like any other.
    tokens = [text.replace(" ", SPACE) for text in vocabulary.tokens]
    unk = vocabulary.unk_id
    model = models.BPE(
        {text: i for i, text in enumerate(tokens)},
        _merges(vocabulary, tokens),
        unk_token=None if unk is None else tokens[unk],
        fuse_unk=True,
        byte_fallback=len(vocabulary.byte_values) == 256,
    )
    built = Tokenizer(model)
    spaces = normalizers.Replace(" ", SPACE)
    prefix = [normalizers.Prepend(SPACE)] if vocabulary.add_space_prefix else []
    built.normalizer = normalizers.Sequence([*prefix, spaces])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)] if vocabulary.add_space_prefix else []
    built.decoder = decoders.Sequence([*steps, *strip])
    built.add_tokens(
        [
            AddedToken(
                tokens[i],
                normalized=False,
                special=i in vocabulary.special_ids,
                rstrip=i in vocabulary.rstrip_ids,
            )
            for i in vocabulary.cut_ids
            if tokens[i]
        ]
    )
    return built


def _merges(vocabulary: GGUFVocabulary, tokens: list[str]) -> list[tuple[str, str]]:
    """The pairs that make each piece, those of the highest score first."""
    whole = {*vocabulary.byte_values, *vocabulary.special_ids}
    ids = {text: i for i, text in enumerate(tokens) if i not in whole}
    found = []
    for piece, _ in sorted(ids.items(), key=lambda entry: -vocabulary.scores[entry[1]]):
        pairs = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        known = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        found += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return found
