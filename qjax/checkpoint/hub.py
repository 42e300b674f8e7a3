"""Models of the Hugging Face hub, through huggingface_hub and its cache.

Its environment variables hold: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT. Only what qjax
reads is fetched, and never a pickle.
"""

from __future__ import annotations

import contextlib
import re
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from qjax.errors import DownloadError

_WANTED = ("*.json", "*.safetensors", "tokenizer*", "*.jinja")
_PICKLED = (".bin", ".pt", ".pth", ".pkl")
_PART = re.compile(r"-\d{5}-of-\d{5}$")


def fetch(repo: str, variant: str | None = None, only: str | None = None) -> tuple[Path, str]:
    """Fetches what a model needs, unless it is in the hub's cache already.

    Args:
      repo: "org/name".
      variant: part of a GGUF file's name, such as "Q4_K_M"; None for the safetensors of the
        repository, or its only GGUF file.
      only: the one file to fetch instead of these.

    Returns:
      The path of a folder with safetensors or of a GGUF file (the first of a split one), or of the
      file `only`; and the licence, "" where unknown.

    Raises:
      DownloadError: no network, no such repository or variant, no permission, no space, or
        interrupted.
    """
    from huggingface_hub import HfApi, constants, snapshot_download  # slow to import
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    what = repo if variant is None else f"{repo}:{variant}"

    def from_cache() -> tuple[Path, str]:
        folder = Path(snapshot_download(repo, local_files_only=True))
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
        return folder / _entry(choose(what, files, variant, only)), ""

    try:
        if constants.HF_HUB_OFFLINE:
            return from_cache()
        try:
            info = HfApi().model_info(repo)
        except HfHubHTTPError:
            raise
        except Exception:  # no answer: whatever the HTTP library of the day raises
            with contextlib.suppress(LocalEntryNotFoundError):
                return from_cache()
            raise
        chosen = choose(what, [file.rfilename for file in info.siblings or []], variant, only)
        folder = Path(snapshot_download(repo, revision=info.sha, allow_patterns=chosen))
        return folder / _entry(chosen), getattr(info.card_data, "license", None) or ""
    except KeyboardInterrupt:
        raise DownloadError(f"download of {what} interrupted; run it again to go on") from None
    except DownloadError:
        raise
    except LocalEntryNotFoundError as error:
        raise DownloadError(
            f"{repo} is not in the hub's cache and HF_HUB_OFFLINE is set: unset it to fetch it"
        ) from error
    except GatedRepoError as error:
        raise DownloadError(
            f"{repo} is gated: accept its terms at https://huggingface.co/{repo}, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise DownloadError(
            f"{repo} is neither a local path nor a repository of the hub that you can see: check "
            "the name, or set HF_TOKEN if it is private"
        ) from error
    except Exception as error:
        raise DownloadError(
            f"{what} could not be fetched from the hub ({type(error).__name__}: {error}): check "
            "the network and the free space, and run this again"
        ) from error


def choose(what: str, files: list[str], variant: str | None, only: str | None = None) -> list[str]:
    """Names of the files to fetch, among all `files` of a repository.

    Raises:
      DownloadError: none fits, or several do; the message lists what there is.
    """
    if only is not None:
        if only not in files:
            raise DownloadError(f"{what} has no {only}")
        return [only]
    top = [file for file in files if "/" not in file]
    if variant is None and any(file.endswith(".safetensors") for file in top):
        wanted = [
            file
            for file in top
            if any(fnmatch(file, pattern) for pattern in _WANTED) and not file.endswith(_PICKLED)
        ]
        # Some repositories hold the weights a second time, in their maker's own naming.
        if any(re.fullmatch(r"model.*\.safetensors", file) for file in wanted):
            wanted = [file for file in wanted if not file.startswith("consolidated")]
        return wanted
    models: dict[str, list[str]] = {}  # name without the number of a part -> files
    for file in files:
        path = PurePosixPath(file)
        if path.suffix == ".gguf" and "mmproj" not in path.name:
            models.setdefault(_PART.sub("", file.removesuffix(".gguf")), []).append(file)
    if variant is not None:
        word = re.compile(rf"(?:^|[-._/]){re.escape(variant)}(?:[-._/]|$)", re.IGNORECASE)
        fitting = {name: parts for name, parts in models.items() if word.search(name)}
    else:
        fitting = models
    if len(fitting) == 1:
        return sorted(next(iter(fitting.values())))
    listing = ", ".join(sorted(models)) or "no GGUF file"
    if variant is None and not models:
        raise DownloadError(f"{what} has neither safetensors nor GGUF files; qjax reads only these")
    problem = "matches several GGUF files" if fitting else "matches no GGUF file"
    raise DownloadError(f"{what} {problem}; name one as org/name:VARIANT. There is: {listing}")


def _entry(chosen: list[str]) -> str:
    """What to open of the chosen files, relative to their folder."""
    return chosen[0] if chosen[0].endswith(".gguf") or len(chosen) == 1 else "."
