"""A tree of weights as named plain arrays and JSON, and back, without loss.

Whatever holds arrays of numpy's own dtypes by name (npz, safetensors, orbax) can so hold QArrays:
what is static in them goes into the JSON, and dtypes that numpy does not know (bfloat16, the 8-bit
floats) are kept as unsigned integers of their size, with their name beside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import jax
import ml_dtypes
import numpy as np

from pallas_kernels.inputs import ActSpec
from qjax.errors import CheckpointError
from qjax.qarray import QArray

VERSION = 1
_ARRAYS = ("qvalue", "scale", "zero_point")
_STATIC = tuple(f.name for f in fields(QArray) if f.name not in (*_ARRAYS, "aux"))


def describe(tree: Any, *, on_host: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """Takes a tree apart.

    Args:
      tree: nested dicts, with text for keys, of QArrays (in any layout) and arrays.
      on_host: whether arrays are fetched to the host; else those of jax stay where they are, with
        their sharding.

    Returns:
      (arrays, static): arrays by name, "model.norm.weight" or "lm_head.weight/scale", of dtypes
      that numpy has itself; and what else it takes to restore the tree, to be written as JSON.

    Raises:
      ValueError: two leaves have one name.
    """
    arrays: dict[str, Any] = {}
    leaves = []
    for path, leaf in leaves_of(tree):
        name = ".".join(path)
        entry: dict[str, Any] = {"path": list(path)}
        parts = {"": leaf}
        if isinstance(leaf, QArray):
            parts = {f"/{key}": getattr(leaf, key) for key in _ARRAYS}
            parts |= {f"/aux/{key}": array for key, array in leaf.aux.items()}
            entry["weight"] = {key: getattr(leaf, key) for key in _STATIC}
            entry["weight"]["act"] = None if leaf.act is None else asdict(leaf.act)
        entry["dtypes"], entry["shapes"] = {}, {}
        for part, array in parts.items():
            if array is None:
                continue
            if name + part in arrays:
                raise ValueError(f"two leaves of the tree are called {name + part}")
            array = np.asarray(array) if on_host or not isinstance(array, jax.Array) else array
            entry["dtypes"][part] = array.dtype.name
            entry["shapes"][part] = list(array.shape)
            arrays[name + part] = _viewed(array, _plain(array.dtype))
        leaves.append(entry)
    return arrays, {"version": VERSION, "leaves": leaves}


def restore(arrays: Mapping[str, Any], static: Mapping[str, Any], file: Any = "") -> Any:
    """The tree that `describe` was given.

    Args:
      arrays, static: from `describe`; `static` may have been JSON in between, arrays may be those
        of numpy or jax.
      file: where they lie, for messages.

    Raises:
      CheckpointError: an array is missing, superfluous or of another dtype; or the weights are
        described by another version, or wrongly.
    """
    if static.get("version") != VERSION:
        raise CheckpointError(
            f"is {static.get('version')!r:.80}, this version of qjax reads {VERSION}",
            file=file,
            field="version",
        )
    tree: dict[str, Any] = {}
    used: set[str] = set()
    for entry in static["leaves"]:
        name = ".".join(entry["path"])
        parts = {}
        for part, dtype in entry["dtypes"].items():
            used.add(name + part)
            parts[part] = _restored(arrays, name + part, dtype, file)
        leaf: Any = parts.get("")
        if "weight" in entry:
            leaf = _weight(entry["weight"], parts, name, file)
        elif leaf is None:
            raise CheckpointError("has no array", file=file, field=name)
        put(tree, entry["path"], leaf)
    if left := sorted(arrays.keys() - used):
        raise CheckpointError("belongs to no weight", file=file, field=left[0])
    return tree


def leaves_of(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The QArrays and arrays of nested dicts, each with the keys that lead there."""
    if not isinstance(node, Mapping):
        yield path, node
        return
    for key, value in node.items():
        yield from leaves_of(value, (*path, key))


def put(tree: dict[str, Any], path: Sequence[str], leaf: Any) -> None:
    """Enters a leaf into nested dicts, which grow where it takes that."""
    *parents, last = path
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = leaf


def _weight(static: Mapping[str, Any], parts: Mapping[str, Any], name: str, file: Any) -> QArray:
    given: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in static.items()
    }
    prefix = "/aux/"
    try:
        given["act"] = None if static["act"] is None else ActSpec(**static["act"])
        given |= {key: parts.get(f"/{key}") for key in _ARRAYS}
        aux = {key.removeprefix(prefix): a for key, a in parts.items() if key.startswith(prefix)}
        return QArray(**given, aux=aux)
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"is described wrongly: {error}", file=file, field=name) from error


def _restored(arrays: Mapping[str, Any], name: str, dtype: str, file: Any) -> Any:
    if name not in arrays:
        raise CheckpointError("is missing", file=file, field=name)
    array = arrays[name]
    try:
        wanted = np.dtype(getattr(ml_dtypes, dtype, dtype))
    except TypeError as error:
        raise CheckpointError(f"has no dtype {dtype!r:.80}", file=file, field=name) from error
    if array.dtype != _plain(wanted):
        raise CheckpointError(
            f"has dtype {array.dtype}, but {dtype} is kept as {_plain(wanted)}",
            file=file,
            field=name,
        )
    return _viewed(array, wanted)


def _plain(dtype: np.dtype) -> np.dtype:
    """The dtype of numpy itself in which an array of this one is kept."""
    return np.dtype(f"u{dtype.itemsize}") if dtype.isbuiltin != 1 else dtype


def _viewed(array: Any, dtype: np.dtype) -> Any:
    """The same bits as another dtype of the same size."""
    if array.dtype == dtype:
        return array
    if isinstance(array, jax.Array):
        return jax.lax.bitcast_convert_type(array, dtype)
    return array.view(dtype)
