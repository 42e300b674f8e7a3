"""Models as qjax itself holds them: arrays in orbax checkpoints, what is static in qjax.json.

Nothing is turned into another format, so that every kind of weight has a place. Arrays that lie on
several devices are written by each of these, and read back onto the same mesh or another. The
folder is `weights/0`, `weights/1`, ... (orbax checkpoints of some gigabytes at most, of which one
is in memory at a time), qjax.json, and beside them config.json and the tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from qjax import ops
from qjax.checkpoint import native
from qjax.checkpoint.detect import read_json, write_json
from qjax.checkpoint.wholes import whole
from qjax.errors import CheckpointError
from qjax.formats.base import QuantizationConfig
from qjax.params import Params
from qjax.qarray import QArray

if TYPE_CHECKING:
    from jax.sharding import Sharding

NAME = "orbax"
FILE = "qjax.json"
_PART_BYTES = 2 << 30

Shard = Callable[[str, tuple[int, ...]], "Sharding"]
"""From the name of an array ("model.layers.0.mlp.up_proj.weight/scale") and its shape to where it
is to lie."""


class Native(QuantizationConfig):
    """Weights of whatever kind, as they are held in memory."""

    name = NAME


def write(params: Params, folder: Path) -> int:
    """Writes the weights of a model into a folder.

    Weights go in the canonical layout, those of a split model whole, each device's part from there;
    but what the user has put on several devices otherwise stays as it is.

    Returns:
      Bytes of all arrays.
    """
    import orbax.checkpoint as ocp

    static, nbytes = [], 0
    with ocp.PyTreeCheckpointer() as writer:
        for index, part in enumerate(_parts(params)):
            arrays, described = native.describe(part, on_host=False)
            writer.save((folder / "weights" / str(index)).absolute(), arrays)
            static.append(described)
            nbytes += sum(array.nbytes for array in arrays.values())
    write_json(folder / FILE, {"format": NAME, "version": native.VERSION, "parts": static})
    return nbytes


def read(folder: Path, sharding: Shard | None = None) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The weights that `write` was given, with the keys of each.

    Args:
      sharding: where each array is to lie; None leaves all on the host.

    Raises:
      CheckpointError: files are missing, damaged, or of another version.
    """
    content = read_json(folder / FILE)
    if content.get("format") != NAME or content.get("version") != native.VERSION:
        raise CheckpointError(
            f"is format {content.get('format')!r:.40} version {content.get('version')!r:.40}, this "
            f"version of qjax reads {NAME} version {native.VERSION}",
            file=folder / FILE,
        )
    for index, static in enumerate(content["parts"]):
        file = folder / "weights" / str(index)
        yield from native.leaves_of(native.restore(_arrays(file, static, sharding), static, file))


def _parts(params: Params) -> Iterator[dict[str, Any]]:
    part: dict[str, Any] = {}
    size = 0
    for path, leaf in native.leaves_of(params.tree):
        if size and size + leaf.nbytes > _PART_BYTES:
            yield part
            part, size = {}, 0
        native.put(part, path, _canonical(params, ".".join(path), leaf))
        size += leaf.nbytes
    yield part


def _canonical(params: Params, name: str, leaf: Any) -> Any:
    if params.mesh is not None:
        return whole(params, name, leaf)
    several = any(
        isinstance(array, jax.Array) and len(array.devices()) > 1 for array in jax.tree.leaves(leaf)
    )
    return leaf if several or not isinstance(leaf, QArray) else ops.unprepare(leaf)


def _arrays(file: Path, static: Mapping[str, Any], sharding: Shard | None) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    wanted: dict[str, Any] = {}
    for entry in static["leaves"]:
        for part, shape in entry["shapes"].items():
            name = ".".join(entry["path"]) + part
            wanted[name] = ocp.RestoreArgs(restore_type=np.ndarray)
            if sharding is not None:
                place = sharding(name, tuple(shape))
                wanted[name] = ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=place)
    try:
        with ocp.PyTreeCheckpointer() as reader:
            return reader.restore(file.absolute(), restore_args=wanted)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot be read by orbax: {error}", file=file) from error
