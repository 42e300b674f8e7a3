"""Samples for calibration from every kind of data set."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import qjax
from qjax.compress import dataset
from qjax.compress.dataset import tokens
from qjax.errors import DownloadError, QjaxError, RequestError

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture(scope="module")
def params(golden) -> qjax.Params:
    return qjax.load(golden / "gguf-Q4_1" / "model.gguf")


@pytest.fixture
def windows(params):
    """Of TEXT, 16 tokens each, beginning as a text does."""
    flat = np.array(params.tokenizer.encode(TEXT))
    found = flat[: len(flat) // 16 * 16].reshape(-1, 16)
    first = params.tokenizer.encode("")
    found[:, 0] = first[0] if first else found[:, 0]
    return found


def test_text_file(params, windows, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    np.testing.assert_array_equal(tokens(params, file, None, 16, shuffle=False), windows)
    np.testing.assert_array_equal(tokens(params, str(file), 5, 16, shuffle=False), windows[:5])
    assert tokens(params, [TEXT], 5, 16).dtype == np.int32
    np.testing.assert_array_equal(tokens(params, [TEXT], None, 16), windows)


def test_samples_are_drawn_by_the_seed(params):
    ids = np.arange(400).reshape(100, 4)
    first = tokens(params, ids, 10)
    assert len({tuple(row) for row in first}) == 10
    assert {tuple(row) for row in first} <= {tuple(row) for row in ids}
    np.testing.assert_array_equal(first, tokens(params, ids, 10, seed=0))
    assert not np.array_equal(first, tokens(params, ids, 10, seed=1))
    np.testing.assert_array_equal(tokens(params, ids, 10, shuffle=False), ids[:10])


def test_token_ids(params, tmp_path):
    ids = np.arange(60).reshape(5, 12)
    np.save(tmp_path / "ids.npy", ids)
    for given in (ids, ids.tolist(), tmp_path / "ids.npy", np.asarray(ids, np.uint16)):
        np.testing.assert_array_equal(tokens(params, given, shuffle=False), ids)
    np.testing.assert_array_equal(tokens(params, ids, 2, 8, shuffle=False), ids[:2, :8])


def test_a_flat_list_of_ids_is_cut(params):
    first = params.tokenizer.encode("")
    found = tokens(params, list(range(11)), None, 5, shuffle=False)
    expected = np.arange(10).reshape(2, 5)
    expected[:, 0] = first[0] if first else expected[:, 0]
    np.testing.assert_array_equal(found, expected)


def test_rows_of_fields_make_the_same_text(params, tmp_path):
    """Whatever a field is called, its text is encoded as a document of its own."""
    document = params.tokenizer.encode("A question\nAn answer")
    plain = tokens(params, [document] * 10 + [document[:1]], None, 8, shuffle=False)
    rows = [
        {"text": "A question\nAn answer"},
        {"prompt": "A question", "completion": "An answer"},
        {"instruction": "A question", "input": "", "output": "An answer"},
        {"question": "A question", "answer": "An answer"},
        {"article": "A question\nAn answer", "id": 3},
        {"input_ids": document},
    ]
    for row in rows:
        np.testing.assert_array_equal(tokens(params, [row] * 10, None, 8, shuffle=False), plain)
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"body": rows[0]["text"]}) for _ in range(10)))
    found = tokens(params, file, None, 8, shuffle=False, text_column="body")
    np.testing.assert_array_equal(found, plain)


def test_messages_go_through_the_chat_template(params):
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]
    text = params.tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    ids = params.tokenizer.encode(text, add_special_tokens=False)
    turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "there"}]
    expected = tokens(params, ids * 20, None, 16, shuffle=False)
    for row in ({"messages": messages}, {"conversations": turns}):
        np.testing.assert_array_equal(tokens(params, [row] * 20, None, 16, shuffle=False), expected)


def test_the_model_writes_its_own(params):
    found = tokens(params, "self", 3, 12)
    assert found.shape == (3, 12)
    assert len({tuple(row) for row in found}) == 3
    np.testing.assert_array_equal(found, tokens(params, None, 3, 12, seed=0))
    assert not np.array_equal(found, tokens(params, None, 3, 12, seed=5))
    start = params.tokenizer.encode("")
    assert set(found[:, 0]) == ({start[0]} if start else {params.tokenizer.bos_id})


@pytest.mark.parametrize(
    ("recipe", "shape"),
    [("FP8", (32, 32)), ("NVFP4", (32, 32)), ({"GPTQModifier": {"scheme": "W8A16"}}, (128, 64))],
)
def test_how_many_the_model_writes(params, monkeypatch, recipe, shape):
    """Few where they only tell how far inputs reach; never longer than the model takes."""

    class Asked(Exception):
        pass

    def ask(params, count, length, *rest):
        raise Asked(count, length)

    monkeypatch.setattr(dataset, "self_samples", ask)
    limit = replace(params.config, max_position_embeddings=64)
    with pytest.raises(Asked) as asked:
        qjax.oneshot(replace(params, config=limit), recipe)
    assert asked.value.args == shape


BAD = [
    (["short"], {"num_samples": 4, "length": 64}, r"has \d+ tokens, .* 4 of .* 64 take 256"),
    (["short"], {}, "too short"),
    (np.zeros((2, 8), int), {"num_samples": 3}, "has 16 tokens.*3 of .* 8 take 24"),
    (np.zeros((2, 8), int), {"length": 9}, "8 tokens each, and max_seq_length is 9"),
    ([[0, 1], [2, 512]], {}, r"token id 512 at 1, .*\[0, 512\)"),
    ([[0, -1]], {}, "token id -1"),
    (np.zeros((2, 8)), {}, r"integers .* float64 \[2, 8\]"),
    (np.zeros((2, 8, 1), int), {}, "int64"),
    ([], {}, "empty"),
    ([{"body": "text"}], {}, "fields body.*text_column"),
    ([3.5], {}, "3.5"),
    (7, {}, "int"),
    (["text"], {"length": 1}, "max_seq_length"),
    (["text"], {"num_samples": 0}, "num_calibration_samples"),
    ("missing.txt", {}, "is no file"),
]


@pytest.mark.parametrize(("dataset", "settings", "message"), BAD)
def test_bad_data(params, dataset, settings, message):
    with pytest.raises(RequestError, match=message):
        tokens(params, dataset, **settings)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2 is no JSON"),
        ("a.json", b"[1,", "a.json is no JSON"),
        ("a.txt", b"\xff\xfe\xfa", "cannot read the dataset"),
        ("a.npy", b"no numpy", "cannot read the dataset"),
        ("a.txt", b"", "0 tokens|1 tokens"),
    ],
)
def test_bad_files(params, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(QjaxError, match=message):
        tokens(params, tmp_path / name, 2, 8)


def test_hub_datasets(params, monkeypatch):
    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        if "missing" in name:
            raise FileNotFoundError("Couldn't reach the Hub")
        return iter([{"text": TEXT}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    expected = tokens(params, [TEXT], 4, 16)
    np.testing.assert_array_equal(tokens(params, "wikitext", 4, 16), expected)
    tokens(params, "owner/name", 4, 16, splits={"calibration": "train[:5%]"})
    tokens(params, "owner/name", 4, 16, splits="test", dataset_config_name="en")
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", True),
        ("owner/name", None, "train[:5%]", False),
        ("owner/name", "en", "test", True),
    ]
    with pytest.raises(DownloadError, match=r"owner/missing.*Couldn't reach"):
        tokens(params, "owner/missing", 4, 16)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DownloadError, match="datasets library"):
        tokens(params, "owner/name", 4, 16)
