"""What a name resolves to; the hub is a cache folder of this machine, or a stand-in."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qjax.checkpoint import builtin, hub
from qjax.checkpoint.source import Source, resolve, resolve_config
from qjax.errors import CheckpointError, DownloadError


@pytest.fixture
def offline_hub(tmp_path, monkeypatch) -> Path:
    """A hub cache that holds "maker/model", laid out by huggingface_hub's rules; no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", os.fspath(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--maker--model"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    return snapshot


@pytest.mark.parametrize("as_type", [str, Path])
def test_local_paths(golden, as_type):
    file = golden / "gguf-Q4_1" / "model.gguf"
    folder = golden / "base-tiny-llama"
    assert resolve(as_type(file)) == Source("gguf", file, "model")
    assert resolve(as_type(file.parent)) == Source("gguf", file, "gguf-Q4_1")
    assert resolve(as_type(folder)) == Source("safetensors", folder, "base-tiny-llama")
    single = folder / "model.safetensors"
    assert resolve(as_type(single)) == Source("safetensors", single, "model")


def test_gguf_file_of_any_name(golden, tmp_path):
    blob = tmp_path / "0a1b2c"
    shutil.copy(golden / "gguf-Q4_1" / "model.gguf", blob)
    assert resolve(blob).kind == "gguf"


def test_home_folder(golden, tmp_path, monkeypatch):
    shutil.copy(golden / "gguf-Q4_1" / "model.gguf", tmp_path)
    monkeypatch.setenv("HOME", os.fspath(tmp_path))
    assert resolve("~/model.gguf").path == tmp_path / "model.gguf"


def test_folders_that_are_no_model(tmp_path):
    with pytest.raises(CheckpointError, match="neither safetensors nor GGUF"):
        resolve(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"\.bin, \.pt\) are not read"):
        resolve(tmp_path)
    with pytest.raises(CheckpointError, match="neither a GGUF nor a safetensors file"):
        resolve(tmp_path / "pytorch_model.bin")
    for name in ("a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "mmproj-a.gguf"):
        (tmp_path / name).touch()
    assert resolve(tmp_path).path.name == "a-00001-of-00002.gguf"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(
        CheckpointError, match=r"several GGUF files.* a-00001-of-00002\.gguf, b\.gguf"
    ):
        resolve(tmp_path)


def test_local_path_comes_before_other_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (builtin.DEFAULT, "maker/model"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "x.gguf").touch()
        assert resolve(name).path == Path(name) / "x.gguf"


def test_builtin_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builtin, "fetch", lambda name: tmp_path / f"{name}.gguf")
    found = resolve("smollm2-135m")
    assert (found.kind, found.path) == ("gguf", tmp_path / "smollm2-135m.gguf")
    assert found.license.startswith("Apache-2.0")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("smollm2", "did you mean smollm2-135m"),
        ("gemma-270m", "did you mean gemma3-270m"),
        ("SmolLM2-135M", "did you mean smollm2-135m"),
        ("a/b/c", "org/name:Q4_K_M"),
        ("", "org/name:Q4_K_M"),
        ("./model", "no such file"),
        ("model.gguf", "no such file"),
        ("maker/model.gguf", "no such file"),
        ("/absent/model", "no such file"),
        (Path("smollm2-135m"), "no such file"),
    ],
)
def test_unknown_name(name, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DownloadError, match=hint) as caught:
        resolve(name)
    for known in (*builtin.MODELS, "org/name:Q4_K_M", ".gguf file"):
        assert known in str(caught.value)


def test_hub_cache_without_network(offline_hub):
    for name in ("config.json", "model.safetensors"):
        (offline_hub / name).touch()
    assert resolve("maker/model") == Source("safetensors", offline_hub, "maker/model")
    for name in ("m-Q4_K_S.gguf", "m-Q4_K_M.gguf"):
        (offline_hub / name).touch()
    found = resolve("maker/model:q4_k_m")
    assert found == Source("gguf", offline_hub / "m-Q4_K_M.gguf", "maker/model:q4_k_m")
    with pytest.raises(DownloadError, match="not in the hub's cache and HF_HUB_OFFLINE is set"):
        resolve("maker/other")


@pytest.fixture
def online_hub(offline_hub, monkeypatch) -> SimpleNamespace:
    """A stand-in for the hub: what it lists, what it raises, and what was asked of it."""
    import huggingface_hub

    state = SimpleNamespace(files=[], error=None, asked=None, snapshot=offline_hub)
    real = huggingface_hub.snapshot_download

    class Api:
        def model_info(self, repo):
            if state.error:
                raise state.error
            siblings = [SimpleNamespace(rfilename=file) for file in state.files]
            card = SimpleNamespace(license="mit")
            return SimpleNamespace(siblings=siblings, sha="0" * 40, card_data=card)

    def snapshot_download(repo, **options):
        if options.get("local_files_only"):
            return real(repo, **options)
        assert options["revision"] == "0" * 40
        state.asked = options["allow_patterns"]
        return os.fspath(offline_hub)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def test_hub_fetches_only_what_is_read(online_hub):
    online_hub.files = [
        "README.md", "config.json", "tokenizer.json", "tokenizer.model", "tokenizer.bin",
        "chat_template.jinja", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "model-00002-of-00002.safetensors", "pytorch_model.bin", "training_args.pt", "run.py",
        "consolidated.safetensors", "original/model.safetensors", "onnx/config.json",
    ]  # fmt: skip
    found = resolve("maker/model")
    assert found == Source("safetensors", online_hub.snapshot, "maker/model", "mit")
    assert sorted(online_hub.asked) == [
        "chat_template.jinja", "config.json", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
        "tokenizer.model",
    ]  # fmt: skip


def test_hub_config_alone(online_hub):
    online_hub.files = ["config.json", "model.safetensors"]
    (online_hub.snapshot / "config.json").touch()
    assert resolve_config("maker/model") == online_hub.snapshot / "config.json"
    assert online_hub.asked == ["config.json"]
    online_hub.files = ["m-Q4_0.gguf"]
    with pytest.raises(DownloadError, match=r"maker/model has no config\.json"):
        resolve_config("maker/model")


def test_config_of_local_paths(golden):
    folder = golden / "base-tiny-llama"
    file = golden / "gguf-Q4_1" / "model.gguf"
    for path, found in (
        (folder, folder / "config.json"),
        (folder / "config.json", folder / "config.json"),
        (str(file), file),
        (file.parent, file),
    ):
        assert resolve_config(path) == found
    with pytest.raises(CheckpointError, match=r"stands without a config\.json"):
        resolve_config(folder / "model.safetensors")


def test_hub_variant(online_hub):
    online_hub.files = [
        "m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-Q4_K.gguf", "mmproj-m-Q4_K_M.gguf", "m-IQ4_K_M.gguf",
        "Q8_0/m-Q8_0-00002-of-00002.gguf", "Q8_0/m-Q8_0-00001-of-00002.gguf", "config.json",
    ]  # fmt: skip
    found = resolve("maker/model:Q4_K_M")
    assert (found.kind, found.path) == ("gguf", online_hub.snapshot / "m-Q4_K_M.gguf")
    assert online_hub.asked == ["m-Q4_K_M.gguf"]
    found = resolve("maker/model:q8_0")
    assert found.path == online_hub.snapshot / "Q8_0" / "m-Q8_0-00001-of-00002.gguf"
    assert len(online_hub.asked) == 2
    with pytest.raises(DownloadError, match=r"Q9_0 matches no GGUF file.*m-Q4_K_S"):
        resolve("maker/model:Q9_0")
    with pytest.raises(DownloadError, match=r"several GGUF files; name one as org/name:VARIANT"):
        resolve("maker/model")
    online_hub.files = ["only.gguf", "README.md"]
    assert resolve("maker/model").path.name == "only.gguf"
    online_hub.files = ["pytorch_model.bin", "config.json"]
    with pytest.raises(DownloadError, match="neither safetensors nor GGUF"):
        resolve("maker/model")


def test_hub_errors(online_hub):
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    response: Any = SimpleNamespace(headers={}, request=None)  # httpx or requests, by version

    for error, message in (
        (GatedRepoError("no", response=response), "gated: accept its terms"),
        (RepositoryNotFoundError("no", response=response), "neither a local path nor a repository"),
        (HfHubHTTPError("no", response=response), "check the network and the free space"),
        (OSError(28, "No space left on device"), "No space left"),
        (KeyboardInterrupt(), "interrupted; run it again"),
    ):
        online_hub.error = error
        shutil.rmtree(online_hub.snapshot.parents[1], ignore_errors=True)
        with pytest.raises(DownloadError, match=message):
            resolve("maker/model")


def test_hub_out_of_reach_uses_the_cache(online_hub):
    (online_hub.snapshot / "m-Q4_0.gguf").touch()
    online_hub.error = ConnectionError("no route")
    assert resolve("maker/model:Q4_0").path == online_hub.snapshot / "m-Q4_0.gguf"
    with pytest.raises(DownloadError, match=r"no route.*check the network"):
        resolve("maker/other")


def test_choose_without_standard_names():
    """A repository that has only its maker's own naming still gives its files."""
    files = ["consolidated.safetensors", "params.json"]
    assert hub.choose("maker/model", files, None) == files
