"""Token ids against those of llama.cpp, sentencepiece and the tokenizers library (golden file), on
texts made to be awkward; decoding; and vocabularies that contradict themselves."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.checkpoint.builtin import cached_path
from qjax.checkpoint.gguf_io import GGUFFile, read_gguf
from qjax.checkpoint.sentencepiece import SpecialTokens
from qjax.checkpoint.tokenizer import load_tokenizer
from qjax.errors import CheckpointError, RequestError, UnsupportedError


@pytest.fixture(scope="module")
def torture(golden):
    return json.loads((golden / "tokenizer_torture.json").read_text("utf-8"))


def gguf(model, tokens, scores=None, types=None, **more):
    """A GGUF file of these tokenizer fields and nothing else."""
    fields = {
        "model": model,
        "tokens": tokens,
        "scores": np.array(scores if scores is not None else [0.0] * len(tokens), np.float32),
        "token_type": np.array(types if types is not None else [1] * len(tokens), np.int32),
        **more,
    }
    metadata = {f"tokenizer.ggml.{k}": v for k, v in fields.items() if v is not None}
    return GGUFFile("some.gguf", {}, {}, metadata)


@pytest.fixture(scope="module")
def tokenizers(torture, golden):
    made = {
        name: load_tokenizer(
            gguf(
                model,
                **torture["vocabularies"][name],
                bos_token_id=1,
                eos_token_id=2,
                unknown_token_id=0,
                **more,
            )
        )
        for name, model, more in (
            ("spm-bpe", "llama", {}),
            ("unigram", "t5", {"remove_extra_whitespaces": True}),
        )
    }
    with read_gguf(golden / "gguf-Q4_1" / "model.gguf") as file:
        return made | {"gguf-Q4_1": load_tokenizer(file)}


@pytest.mark.parametrize("name", ["gguf-Q4_1", "spm-bpe", "unigram"])
def test_ids_equal_those_of_other_tools(torture, tokenizers, name):
    tokenizer = tokenizers[name]
    for text, ids in zip(torture["texts"], torture["ids"][name], strict=True):
        if ids is not None:
            assert tokenizer.encode(text, add_special_tokens=False) == ids, repr(text)


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_ids_of_the_builtin_models(torture, name):
    path = cached_path(name)
    if not path.is_file():
        pytest.skip(f"{name} is not in the cache: qjax pull {name}")
    with read_gguf(path) as file:
        tokenizer = load_tokenizer(file)
    for text, ids in zip(torture["texts"], torture["ids"][name], strict=True):
        assert tokenizer.encode(text) == ids, repr(text)


def test_folder_and_gguf_of_one_model_agree(torture, tokenizers, golden):
    folder = load_tokenizer(golden / "base-tiny-llama")
    from_gguf = tokenizers["gguf-Q4_1"]
    for text, ids in zip(torture["texts"], torture["ids"]["gguf-Q4_1"], strict=True):
        assert folder.encode(text) == ids
        assert folder.decode(ids, False) == from_gguf.decode(ids, False) == text
    assert folder.vocab_size == from_gguf.vocab_size == 512
    assert folder.bos_id == from_gguf.bos_id == 0
    assert folder.eos_ids == {1}
    assert from_gguf.eos_ids == {1, 3}  # GGUF has no generation_config: <|im_end|> by its name
    assert folder.special_ids == from_gguf.special_ids == {0, 1, 2, 3}
    messages = [{"role": "user", "content": "Hi"}]
    assert folder.apply_chat_template(messages) == from_gguf.apply_chat_template(messages)


# --- decoding -------------------------------------------------------------------------------------


@given(text=st.text())
def test_a_stream_shows_whole_characters_and_adds_up(tokenizers, text):
    for name in ("gguf-Q4_1", "spm-bpe"):
        tokenizer = tokenizers[name]
        ids = tokenizer.encode(text, add_special_tokens=False)
        stream = tokenizer.stream(skip_special_tokens=False)
        shown = [stream.push(i) for i in ids]
        assert not any("\ufffd" in part for part in shown) or "\ufffd" in text
        assert stream.flush() == ""
        joined = "".join(shown)
        decoded = tokenizer.decode(ids, skip_special_tokens=False)
        if name == "gguf-Q4_1":
            assert joined == decoded == text
        else:  # SentencePiece puts a space first, and spells a space and U+2581 alike
            assert joined.removeprefix(" ") == decoded
            if "<" not in text and "\n" not in text:  # where special tokens begin
                assert decoded == text.replace("\u2581", " ")


def test_a_stream_holds_back_half_a_character(tokenizers):
    tokenizer = tokenizers["gguf-Q4_1"]
    ids = tokenizer.encode("🙂", add_special_tokens=False)
    assert len(ids) == 4  # this small vocabulary has it byte by byte
    stream = tokenizer.stream()
    assert [stream.push(i) for i in ids] == ["", "", "", "🙂"]
    stream.push(ids[0])
    assert stream.flush() == "\ufffd"
    assert tokenizer.decode([ids[0], *tokenizer.encode("a")]) == "\ufffda"


def test_a_stream_keeps_the_space_that_decode_strips(tokenizers):
    tokenizer = tokenizers["spm-bpe"]
    ids = tokenizer.encode("The license", add_special_tokens=False)
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) == " The license"
    assert tokenizer.decode(ids) == "The license"


def test_special_tokens_are_shown_only_when_asked_for(tokenizers):
    tokenizer = tokenizers["gguf-Q4_1"]
    ids = tokenizer.encode("<|im_start|>a<|im_end|>")
    assert (ids[0], ids[-1]) == (2, 3)
    assert tokenizer.decode(ids) == "a"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>a<|im_end|>"
    assert tokenizer.decode([*ids, 10**6, -1]) == "a"  # rows of a padded head have no text


def test_bos_is_added_where_the_file_says_so(tokenizers):
    assert tokenizers["spm-bpe"].encode("")[:1] == [1]
    assert tokenizers["unigram"].encode("")[-1:] == [2]
    assert tokenizers["gguf-Q4_1"].encode("") == []


def test_half_a_surrogate_pair_is_refused(tokenizers):
    for tokenizer in tokenizers.values():
        with pytest.raises(RequestError, match="surrogate"):
            tokenizer.encode("a\ud800")


def test_the_leftmost_special_token_wins_then_the_longest():
    tokens = SpecialTokens({"ab": 1, "abc": 2, "bcd": 3, "<x>": 4, "": 5}, rstrip=frozenset({4}))
    assert tokens.split("zabcd<x> \n y ab") == ["z", 2, "d", 4, "y ", 1]
    assert SpecialTokens({}).split("ab") == ["ab"]


def test_gemma_decodes_what_only_gguf_calls_control():
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<table>", "a"]
    source = gguf("llama", tokens, types=[3, 3, 3, 3, 3, 1], bos_token_id=2, eos_token_id=1)
    source.metadata["general.architecture"] = "gemma3"
    assert load_tokenizer(source).decode([2, 4, 5, 1]) == "<table>a"


# --- vocabularies that contradict themselves ------------------------------------------------------

SPM = ["<unk>", "<s>", "</s>", "a", "b", "ab"]
BPE = ["a", "b", "ab", "c"]


@pytest.mark.parametrize(
    ("source", "field"),
    [
        (gguf("llama", None, [], []), "tokens"),
        (gguf("llama", [*SPM, "ab"]), "tokens"),
        (gguf("llama", SPM, scores=[0, 0, 0, 0, 0, np.nan]), "scores"),
        (gguf("llama", SPM, types=[2, 3, 3, 1, 1, 6]), "tokens"),
        (gguf("llama", SPM, eos_token_id=6), "eos_token_id"),
        (gguf("llama", SPM, eot_token_id=-1), "eot_token_id"),
        (gguf("llama", SPM[:1]), "bos_token_id"),
        (gguf("llama", SPM, add_bos_token="yes"), "add_bos_token"),
        (gguf("gpt2", BPE), "merges"),
        (gguf("gpt2", BPE, merges=["ab"]), "merges"),
        (gguf("gpt2", BPE, merges=["a d"]), "merges"),
        (gguf("gpt2", BPE, merges=["a b"], add_bos_token=True), "add_bos_token"),
        (gguf("gpt2", [*BPE, "a"], merges=["a b"]), "tokens"),
        (gguf("t5", SPM, unknown_token_id=7), "unknown_token_id"),
        (
            gguf("t5", SPM, precompiled_charsmap=np.array([9, 0, 0], np.int8)),
            "precompiled_charsmap",
        ),
    ],
)
def test_a_vocabulary_that_contradicts_itself(source, field):
    with pytest.raises(CheckpointError, match=r"some\.gguf") as caught:
        load_tokenizer(source)
    assert caught.value.field == f"tokenizer.ggml.{field}"


@pytest.mark.parametrize(
    "source",
    [gguf("rwkv", BPE), gguf("gpt2", BPE, merges=["a b"], pre="no-such")],
)
def test_an_unknown_kind_is_named(source):
    with pytest.raises(UnsupportedError, match=r"rwkv|no-such"):
        load_tokenizer(source)


# --- folders --------------------------------------------------------------------------------------


@pytest.fixture
def folder(golden, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(golden / "base-tiny-llama" / name, tmp_path / name)
        (tmp_path / name).chmod(0o644)
    return tmp_path


def test_names_of_special_tokens_come_from_any_of_the_files(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "x"}')
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_ids == {1, 3, 5}
    assert tokenizer.bos_id == 0
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match="--raw"):
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}])


def test_the_chat_template_may_be_one_of_several(folder):
    named = [{"name": "tool", "template": "T"}, {"name": "default", "template": "D{{ eos_token }}"}]
    config = {"eos_token": "</s>", "chat_template": named}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    messages = [{"role": "user", "content": "a"}]
    assert load_tokenizer(folder).apply_chat_template(messages) == "D</s>"
    (folder / "chat_template.jinja").write_text("file")
    assert load_tokenizer(folder).apply_chat_template(messages) == "file"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_file_is_named(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        load_tokenizer(folder)


def test_a_folder_without_tokenizer_json(tmp_path):
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UnsupportedError, match="save_pretrained"):
        load_tokenizer(tmp_path)


def test_a_decoder_of_another_kind_is_named(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UnsupportedError, match="WordPiece"):
        load_tokenizer(folder)
