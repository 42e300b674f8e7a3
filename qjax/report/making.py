"""Makes the quantizations of a report, in a folder where a later run finds them."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np

from qjax.api import load, save
from qjax.compress import dataset
from qjax.compress.oneshot import oneshot
from qjax.errors import RequestError
from qjax.params import Params
from qjax.report.methods import Method

SIXTEEN = {"bf16": "bfloat16", "f16": "float16"}
SAMPLES = 128


@dataclass(frozen=True)
class Samples:
    """Attributes:
    calibration: see `qjax.compress.dataset.tokens`.
    num_samples, seq_len: how many, of how many tokens; None for 512, or what the model takes.
    """

    calibration: str
    num_samples: int
    seq_len: int | None


@dataclass(frozen=True)
class Made:
    """Attributes:
    path: of a model.
    seconds: that making it took; None where it was given, or begun in an earlier run.
    temporary: it is not wanted after it was measured.
    """

    path: str | PathLike[str]
    seconds: float | None
    temporary: bool

    def discard(self) -> None:
        """Removes it, where it is temporary."""
        path = Path(self.path)
        if self.temporary and path.is_dir():
            shutil.rmtree(path)
        elif self.temporary:
            path.unlink()


def told(base: str | PathLike[str], samples: Samples) -> dict[str, Any]:
    """What tells models apart that one method made."""
    return {"base": fspath(base), **asdict(samples)}


@contextmanager
def work_folder(
    keep: str | PathLike[str] | None, base: str | PathLike[str], samples: Samples
) -> Iterator[Path]:
    """Where models are made: `keep`, or a folder that is gone when this ends.

    Raises:
      RequestError: `keep` holds models that were made otherwise, or something else.
    """
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="qjax-report-") as name:
            yield Path(name)
        return
    folder, now = Path(keep), told(base, samples)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "made.json"
    if file.exists():
        if (before := json.loads(file.read_text("utf-8"))) != now:
            raise RequestError(
                f"keep: {folder} has models made with {before}, these would be made with {now}: "
                "name another folder."
            )
    elif any(folder.iterdir()):
        raise RequestError(f"keep: {folder} holds something else: name a new folder.")
    else:
        file.write_text(json.dumps(now) + "\n", "utf-8")
    yield folder


def sixteen_bits(base: str | PathLike[str], folder: Path) -> str | PathLike[str]:
    """A folder of safetensors with the numbers of a model in 16 bits: its own, or a new one."""
    path = folder / "bfloat16"
    if path.exists():
        return path
    params = load(base)
    own = params.host.origin.folder
    most = max(params.summary().uses, key=lambda use: use.weights)
    if own is not None and most.qtype in SIXTEEN and not most.method:
        return own
    save(params, path, "safetensors", dtype="bfloat16", lossy=True)
    return path


def tokens(base: str | PathLike[str], samples: Samples, folder: Path) -> np.ndarray:
    """Samples int32 [S, T], which later runs find in the folder.

    It is the base as it was given that writes some, if it comes to that: a quantized one is faster.
    """
    file = folder / "samples.npy"
    if file.exists():
        return np.load(file, allow_pickle=False)
    found = dataset.tokens(
        load(base), samples.calibration, samples.num_samples, samples.seq_len, progress=True
    )
    np.save(file, found)
    return found


def make(
    method: Method,
    folder: Path,
    samples: Callable[[], np.ndarray],
    temporary: bool,
    base: Params,
    path: str | PathLike[str],
) -> Made:
    """The model that a method makes of a base of 16 bits, or the one that is there.

    Args:
      folder: for the models of all methods.
      samples: gives tokens, where the method wants some.
      temporary: it is not to be kept.
      base, path: a model, and its folder.
    """
    output = folder / (f"{method.name}.gguf" if method.gguf else method.name)
    note = folder / f"{method.name}.json"
    if output.exists():
        found = json.loads(note.read_text("utf-8")) if note.exists() else {"seconds": None}
        return Made(output, found["seconds"], temporary)
    data = samples() if method.samples(base) else None
    begun = any(folder.glob(f".{output.name}.*.unfinished"))
    started = time.perf_counter()
    if method.scheme:
        oneshot(base, method.recipe(base), data, output, format=method.format)
    else:
        save(load(path, quantization=method.format), output, method.format)
    seconds = None if begun else time.perf_counter() - started
    note.write_text(json.dumps({"seconds": seconds}) + "\n", "utf-8")
    return Made(output, seconds, temporary)
